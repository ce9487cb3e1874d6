"""Aggregate scores of several runs on several tasks, with intervals: R runs (seeds) of one configuration, K tasks. Numpy only.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice": aggregates (section 4.3), stratified bootstrap
intervals (4.1), performance profiles (4.2), probability of improvement (4.3). The metrics are those of its authors' package, rliable.

A single run has no interval, because one run does not show the spread over seeds. B is the number of resamples.
"""

from __future__ import annotations

import numpy as np

from mtrl_cli.stats.bootstrap import Draws, Estimate, Floats, Indices, draw, estimates, interval, trimmed_means

AGGREGATES = ("iqm", "mean", "median", "optimality_gap")
RESAMPLES_OF_BANDS = 500  # fewer are enough for plots
Band = tuple[Floats, Floats]


def aggregates(scores_RK: Floats, draws: Draws | None = None) -> dict[str, Estimate]:
    """Aggregate over all runs and tasks: `AGGREGATES` (section 4.3), with stratified bootstrap intervals (4.1).

    Mean and median are over the tasks' means, the interquartile mean is over all scores. The optimality gap is the mean distance of scores
    from 1 (scores above 1 count as 1; less is better).

    Args:
        scores_RK: final scores.
        draws: resamples; None: resamples of `draw`.
    """

    def statistic(rows_BRK: Indices) -> Floats:
        scores_BRK = _resampled(scores_RK, rows_BRK)
        means_BK = scores_BRK.mean(axis=1)
        iqm_B = trimmed_means(scores_BRK.reshape(len(scores_BRK), -1))
        gap_B = 1 - np.minimum(scores_BRK, 1).mean(axis=(1, 2))
        return np.column_stack([iqm_B, means_BK.mean(axis=1), np.median(means_BK, axis=1), gap_B])

    return dict(zip(AGGREGATES, estimates(statistic, scores_RK.shape, draws=draws), strict=True))


def task_means(scores_RK: Floats, draws: Draws | None = None) -> list[Estimate]:
    """Compute each task's mean over runs with its bootstrap interval (section 4.1)."""
    return estimates(lambda rows_BRK: _resampled(scores_RK, rows_BRK).mean(axis=1), scores_RK.shape, draws=draws)


def probability_of_improvement(x_RK: Floats, y_SK: Floats, draws: Draws | None = None) -> Estimate:
    """Estimate the probability that a run of X scores higher than a run of Y, on average over tasks; ties count half.

    The estimate is the Mann-Whitney statistic over its largest value (section 4.3, "probability of improvement"). X has R runs, Y has S;
    the runs of X and Y are drawn independently (section 4.1).
    """
    x, y = x_RK[:, None], y_SK[None]
    wins_KRS = ((x > y) + 0.5 * (x == y)).transpose(2, 0, 1)

    def statistic(x_BRK: Indices, y_BSK: Indices) -> Floats:
        # A pair is drawn as often as the product of its two runs' counts.
        drawn_KBS = _counts(x_BRK, len(x_RK)) @ wins_KRS
        return ((drawn_KBS * _counts(y_BSK, len(y_SK))).sum(axis=(0, 2)) / wins_KRS.size)[:, None]

    if draws is None:
        draws = ((*of_x, *of_y) for of_x, of_y in zip(draw(x_RK.shape), draw(y_SK.shape, seed=1), strict=True))
    return estimates(statistic, x_RK.shape, y_SK.shape, draws=draws)[0]


def _counts(rows_BRK: Indices, runs: int) -> Floats:
    """Count the draws of each run for each task and resample, [K, B, R]."""
    resamples, _, tasks = rows_BRK.shape
    place = np.arange(resamples)[:, None, None] * tasks + np.arange(tasks)
    counts = np.bincount((place * runs + rows_BRK).ravel(), minlength=resamples * tasks * runs)
    return counts.reshape(resamples, tasks, runs).transpose(1, 0, 2).astype(np.float64)


def profile(scores_RK: Floats, taus_T: Floats) -> Floats:
    """Compute the run-score distribution (section 4.2): the fraction of all scores above each threshold, [T]."""
    return _profiles(scores_RK[None], taus_T)[0]


def profile_band(scores_RK: Floats, taus_T: Floats, draws: Draws | None = None) -> Band | None:
    """Compute the pointwise stratified bootstrap interval of a profile (sections 4.1, 4.2): low [T], high [T]; None for a single run."""
    if len(scores_RK) == 1:
        return None
    return interval(lambda rows_BRK: _profiles(_resampled(scores_RK, rows_BRK), taus_T), draw(scores_RK.shape) if draws is None else draws)


def _profiles(scores_BRK: Floats, taus_T: Floats) -> Floats:
    ordered_BV = np.sort(scores_BRK.reshape(len(scores_BRK), -1), axis=1)
    return np.stack([1 - np.searchsorted(row_V, taus_T, side="right") / len(row_V) for row_V in ordered_BV])


def curve(values_RKP: Floats) -> Floats:
    """Compute the interquartile mean over runs and tasks at each of P points of learning curves, [P]."""
    return trimmed_means(values_RKP.reshape(1, -1, values_RKP.shape[2]))[0]


def curve_band(values_RKP: Floats, draws: Draws | None = None) -> Band | None:
    """Compute the pointwise stratified bootstrap interval of `curve`: low [P], high [P]; None for a single run."""
    runs, tasks, points = values_RKP.shape
    if runs == 1:
        return None
    draws = draw((runs, tasks), resamples=RESAMPLES_OF_BANDS) if draws is None else draws
    return interval(lambda rows_BRK: trimmed_means(_resampled(values_RKP, rows_BRK).reshape(len(rows_BRK), -1, points)), draws)


def _resampled(scores_RK: Floats, rows_BRK: Indices) -> Floats:
    """Return the drawn runs of each task: [R, K, ...] -> [B, R, K, ...]."""
    return scores_RK[rows_BRK, np.arange(scores_RK.shape[1])]
