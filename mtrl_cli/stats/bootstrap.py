"""Statistics of episodes: running means for the log, and intervals for an evaluation. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
AGGREGATES = ("mean", "median", "iqm", "min")
CHUNK = 100  # resamples at a time, which bounds memory at 57 games of 100 episodes to a few MB


def iqm(values: ArrayLike) -> float:
    """The interquartile mean: the mean of what is left when the lowest and the highest 25 % (rounded down) are dropped.

    Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice", section 4.3. Raises ValueError if there are none.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    if flat.size == 0:
        raise ValueError("the interquartile mean of no values does not exist")
    return float(trimmed_means(flat[None])[0])


def trimmed_means(rows_RV: Floats) -> Floats:
    """Row-wise interquartile mean: [R, V] -> [R]."""
    count = rows_RV.shape[1]
    cut = count // 4
    return np.sort(rows_RV, axis=1)[:, cut : count - cut].mean(axis=1)


def bootstrap_mean_ci(returns: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval (low, high) of the mean of `returns`, episodes drawn with replacement.

    One episode gives an interval without width, which says nothing about the spread: show it only where there are more.
    Raises ValueError if there are none.
    """
    values = np.asarray(returns, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("the mean of no episodes has no interval")
    random = np.random.default_rng(seed)
    means = np.concatenate([_resample(values, size, random).mean(axis=1) for size in _chunks(resamples)])
    low, high = percentile_interval(means, confidence)
    return low, high


def over_tasks(scores: Mapping[str, Sequence[float]], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """What one network reaches over its tasks, from each task's normalised scores, one for each evaluation episode.

    Returns {"mean", "median", "iqm", "min", "ci": {each of these: [low, high]}}, and {} where no task has a score. Mean, median and
    min are taken over the tasks' means; iqm over all episodes of all tasks together, as Agarwal et al. 2021 take it over all
    runs and tasks (so a task with more episodes weighs more there).

    The intervals are a stratified bootstrap's percentiles: each resample draws, in every task on its own, as many of that task's
    episodes as it has, with replacement. Tasks are fixed and the network is one: the interval covers the chance in the episodes,
    not the chance in training. For that, compare runs of several seeds.
    """
    if not scores:
        return {}
    strata = [np.asarray(values, dtype=np.float64).ravel() for values in scores.values()]
    for name, stratum in zip(scores, strata, strict=True):
        if stratum.size == 0:
            raise ValueError(f"task {name!r} has no episodes")
    random = np.random.default_rng(seed)
    chunks = [_aggregate([_resample(stratum, size, random) for stratum in strata]) for size in _chunks(resamples)]
    result: dict[str, Any] = {name: float(value[0]) for name, value in _aggregate([stratum[None] for stratum in strata]).items()}
    result["ci"] = {name: list(percentile_interval(np.concatenate([chunk[name] for chunk in chunks]), confidence)) for name in AGGREGATES}
    return result


def _aggregate(strata: list[Floats]) -> dict[str, Floats]:
    """The aggregates of R resamples: each stratum [R, episodes of the task] -> each aggregate [R]."""
    means_RK = np.stack([stratum.mean(axis=1) for stratum in strata], axis=1)
    return {
        "mean": means_RK.mean(axis=1),
        "median": np.median(means_RK, axis=1),
        "iqm": trimmed_means(np.concatenate(strata, axis=1)),
        "min": means_RK.min(axis=1),
    }


def _resample(values: Floats, resamples: int, random: np.random.Generator) -> Floats:
    """`resamples` draws with replacement: [V] -> [R, V]."""
    return values[random.integers(0, values.size, size=(resamples, values.size))]


def _chunks(resamples: int) -> list[int]:
    return [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]


def percentile_interval(values: Floats, confidence: float) -> tuple[float, float]:
    """The middle part of resampled values, [R]: (low, high)."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
