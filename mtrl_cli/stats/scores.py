"""Scores of several runs on several tasks in few numbers, with their intervals: R runs (seeds) of one configuration, K tasks. Numpy only.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice": aggregates (section 4.3), stratified bootstrap
intervals (4.1), performance profiles (4.2), probability of improvement (4.3). The metrics are those of its authors' package, rliable.

An interval is None where there is one run: the spread over seeds cannot be told from that. B is the number of resamples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mtrl_cli.stats import bootstrap

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Interval = tuple[float, float]
AGGREGATES = ("iqm", "mean", "median", "optimality_gap")
CONFIDENCE = 0.95
RESAMPLES = 2000
RESAMPLES_OF_BANDS = 500  # whose ends are read off a picture


def resampled(runs: int, tasks: int, resamples: int = RESAMPLES, seed: int = 0) -> Rows:
    """The runs of a stratified bootstrap's resamples, [B, R, K]: in each task on its own, R runs drawn with replacement (section 4.1)."""
    return np.random.default_rng(seed).integers(0, runs, (resamples, runs, tasks))


def aggregates(scores_RK: Floats) -> dict[str, float]:
    """Over all tasks: mean and median of the tasks' means, the interquartile mean of all scores, and the optimality gap, how far they are
    on average below 1 (those above count as 1; less is better). Section 4.3."""
    return {name: float(values[0]) for name, values in _aggregates(scores_RK[None]).items()}


def _aggregates(scores_BRK: Floats) -> dict[str, Floats]:
    means_BK = scores_BRK.mean(axis=1)
    return {
        "iqm": bootstrap.trimmed_means(scores_BRK.reshape(len(scores_BRK), -1)),
        "mean": means_BK.mean(axis=1),
        "median": np.median(means_BK, axis=1),
        "optimality_gap": 1 - np.minimum(scores_BRK, 1).mean(axis=(1, 2)),
    }


def aggregate_intervals(scores_RK: Floats, rows_BRK: Rows | None = None) -> dict[str, Interval | None]:
    """The stratified bootstrap's percentile interval of each aggregate (section 4.1); `rows_BRK`: the runs drawn, None: `resampled`."""
    if len(scores_RK) == 1:
        return dict.fromkeys(AGGREGATES)
    parts = [_aggregates(_drawn(scores_RK, rows)) for rows in _in_chunks(scores_RK, rows_BRK)]
    return {name: _interval(np.concatenate([part[name] for part in parts])) for name in AGGREGATES}


def task_intervals(scores_RK: Floats, rows_BRK: Rows | None = None) -> list[Interval | None]:
    """The bootstrap's percentile interval of each task's mean over runs, K of them (section 4.1); `rows_BRK`: see above."""
    if len(scores_RK) == 1:
        return [None] * scores_RK.shape[1]
    means_BK = np.concatenate([_drawn(scores_RK, rows).mean(axis=1) for rows in _in_chunks(scores_RK, rows_BRK)])
    return [_interval(means_B) for means_B in means_BK.T]


def probability_of_improvement(x_RK: Floats, y_SK: Floats) -> float:
    """How likely it is that a run of X scores higher than one of Y, on average over tasks; that both score the same counts half.

    It is the Mann-Whitney statistic over its largest value (section 4.3, "probability of improvement"). X has R runs, Y has S.
    """
    return float(_wins(x_RK, y_SK).mean())


def probability_interval(x_RK: Floats, y_SK: Floats, x_BRK: Rows | None = None, y_BSK: Rows | None = None) -> Interval | None:
    """The stratified bootstrap's interval of `probability_of_improvement` (section 4.1), the runs of X and of Y drawn independently."""
    if len(x_RK) == 1 or len(y_SK) == 1:
        return None
    wins_KRS = _wins(x_RK, y_SK).transpose(2, 0, 1)
    x_BRK = resampled(*x_RK.shape) if x_BRK is None else x_BRK
    y_BSK = resampled(len(y_SK), y_SK.shape[1], seed=1) if y_BSK is None else y_BSK
    # How often each pair is drawn is the product of how often its two runs are.
    drawn_KBS = _times(x_BRK, len(x_RK)) @ wins_KRS
    values_B = (drawn_KBS * _times(y_BSK, len(y_SK))).sum(axis=(0, 2)) / wins_KRS.size
    return _interval(values_B)


def _times(rows_BRK: Rows, runs: int) -> Floats:
    """How often each run is drawn for each task and resample, [K, B, R]."""
    resamples, _, tasks = rows_BRK.shape
    place = np.arange(resamples)[:, None, None] * tasks + np.arange(tasks)
    counts = np.bincount((place * runs + rows_BRK).ravel(), minlength=resamples * tasks * runs)
    return counts.reshape(resamples, tasks, runs).transpose(1, 0, 2).astype(np.float64)


def _wins(x_RK: Floats, y_SK: Floats) -> Floats:
    x, y = x_RK[:, None], y_SK[None]
    return (x > y) + 0.5 * (x == y)


def profile(scores_RK: Floats, taus_T: Floats) -> Floats:
    """The run-score distribution (section 4.2): which share of all scores is above each threshold, [T]."""
    return _profiles(scores_RK[None], taus_T)[0]


def profile_band(scores_RK: Floats, taus_T: Floats, rows_BRK: Rows | None = None) -> tuple[Floats, Floats] | None:
    """The stratified bootstrap's interval of a profile (sections 4.1, 4.2), at each threshold for itself: low [T], high [T]."""
    if len(scores_RK) == 1:
        return None
    profiles_BT = np.concatenate([_profiles(_drawn(scores_RK, rows), taus_T) for rows in _in_chunks(scores_RK, rows_BRK)])
    return _band(profiles_BT)


def _profiles(scores_BRK: Floats, taus_T: Floats) -> Floats:
    ordered_BV = np.sort(scores_BRK.reshape(len(scores_BRK), -1), axis=1)
    return np.stack([1 - np.searchsorted(row_V, taus_T, side="right") / len(row_V) for row_V in ordered_BV])


def curve(values_RKP: Floats) -> Floats:
    """The interquartile mean over runs and tasks at each of P points of learning curves, [P]; of one run and task, that curve."""
    return bootstrap.trimmed_means(values_RKP.reshape(-1, values_RKP.shape[2]).T)


def curve_band(values_RKP: Floats, rows_BRK: Rows | None = None) -> tuple[Floats, Floats] | None:
    """The stratified bootstrap's interval of `curve`, at each point for itself: low [P], high [P]."""
    runs, tasks, points = values_RKP.shape
    if runs == 1:
        return None
    rows_BRK = resampled(runs, tasks, RESAMPLES_OF_BANDS) if rows_BRK is None else rows_BRK
    curves = [bootstrap.trimmed_means(_drawn(values_RKP[:, :, point], rows_BRK).reshape(len(rows_BRK), -1)) for point in range(points)]
    return _band(np.stack(curves, axis=1))


def _drawn(scores_RK: Floats, rows_BRK: Rows) -> Floats:
    return scores_RK[rows_BRK, np.arange(scores_RK.shape[1])]


def _in_chunks(scores_RK: Floats, rows_BRK: Rows | None) -> Iterator[Rows]:
    """Some resamples at a time, which bounds memory."""
    rows_BRK = resampled(len(scores_RK), scores_RK.shape[1]) if rows_BRK is None else rows_BRK
    for start in range(0, len(rows_BRK), bootstrap.CHUNK):
        yield rows_BRK[start : start + bootstrap.CHUNK]


def _interval(values_B: Floats) -> Interval:
    return bootstrap.percentile_interval(values_B, CONFIDENCE)


def _band(values_BP: Floats) -> tuple[Floats, Floats]:
    low_P, high_P = np.quantile(values_BP, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low_P, high_P
