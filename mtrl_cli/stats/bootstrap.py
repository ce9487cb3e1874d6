"""Percentile bootstrap: the only implementation of intervals, and the statistics of one network's episodes. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtrl_cli.metric_names import AGGREGATES

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Draws = Iterable[tuple[Indices, ...]]
Method = Literal["linear", "nearest"]
CONFIDENCE = 0.95
RESAMPLES = 2000
CHUNK = 100  # resamples at a time, which bounds memory at 57 tasks of 100 episodes to a few MB


@dataclass(frozen=True)
class Estimate:
    """A statistic and its bootstrap interval; `low` and `high` are None where the samples do not allow an interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


# -- the core -------------------------------------------------------------------------------------------------------------------


def draw(*shapes: tuple[int, ...], resamples: int = RESAMPLES, seed: int = 0, chunk: int = CHUNK) -> Iterator[tuple[Indices, ...]]:
    """Draw bootstrap resamples of one or several samples, a chunk at a time.

    A sample of shape `(n,)` has n values, drawn with replacement. A sample of shape `(n, K)` is stratified: n values are drawn in each of
    K strata independently (Agarwal et al. 2021, section 4.1). Samples are drawn independently of each other.

    Yields:
        For each shape the indices of the drawn values, `[B, *shape]`, with B at most `chunk`.
    """
    random = np.random.default_rng(seed)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        yield tuple(random.integers(0, shape[0], (count, *shape)) for shape in shapes)


def interval(statistic: Callable[..., Floats], draws: Draws, method: Method = "linear") -> tuple[Floats, Floats]:
    """Compute the percentile bootstrap interval of a statistic.

    Args:
        statistic: maps the indices of B resamples to its values, `[B, ...]`.
        draws: the resamples, from `draw`.
        method: `nearest` for statistics that may be infinite, which cannot be interpolated.

    Returns:
        Low and high ends, `[...]`; NaN where the statistic of a resample is NaN.
    """
    values = np.concatenate([statistic(*indices) for indices in draws])
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0, method=method)
    return low, high


def estimates(
    statistic: Callable[..., Floats], *shapes: tuple[int, ...], draws: Draws | None = None, method: Method = "linear"
) -> list[Estimate]:
    """Compute V statistics of some samples with their intervals.

    There is no interval where a sample has a single value, or where the statistic of a resample does not exist (NaN).

    Args:
        statistic: maps the indices of B resamples, one array `[B, *shape]` per sample, to its values `[B, V]`.
        shapes: one per sample, see `draw`.
        draws: the resamples; None: `draw(*shapes)`.
        method: see `interval`.
    """
    every = tuple(np.broadcast_to(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)), shape)[None] for shape in shapes)
    values_V = statistic(*every)[0]
    if min(shape[0] for shape in shapes) < 2:
        return [Estimate(float(value)) for value in values_V]
    low_V, high_V = interval(statistic, draw(*shapes) if draws is None else draws, method)
    return [
        Estimate(float(value)) if np.isnan([value, low, high]).any() else Estimate(float(value), float(low), float(high))
        for value, low, high in zip(values_V, low_V, high_V, strict=True)
    ]


def trimmed_means(values_RV: Floats) -> Floats:
    """Compute row-wise interquartile means, [R, V, ...] -> [R, ...]: without the lowest and the highest quarter of values (rounded down).

    Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice", section 4.3.
    """
    count = values_RV.shape[1]
    cut = count // 4
    return np.sort(values_RV, axis=1)[:, cut : count - cut].mean(axis=1)


# -- episodes of one network ----------------------------------------------------------------------------------------------------


def bootstrap_mean_ci(returns: Sequence[float]) -> tuple[float, float]:
    """Compute the interval (low, high) of the mean of `returns`, episodes drawn with replacement.

    One episode gives an interval of zero width: show the interval only for several episodes.
    """
    values = np.asarray(returns, dtype=np.float64)
    low, high = interval(lambda rows: values[rows].mean(axis=1), draw(values.shape))
    return float(low), float(high)


def over_tasks(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Aggregate one network's normalized scores over its tasks, from the scores of each task's evaluation episodes.

    Mean, median and min are over the tasks' means. The interquartile mean is over all episodes of all tasks together, like that of
    Agarwal et al. 2021 over all runs and tasks, so a task with more episodes has more weight.

    The bootstrap is stratified: each resample draws episodes separately for every task, as many as the task has. Tasks and
    network are fixed: the interval reflects the randomness of episodes, not of training. To estimate
    the randomness of training, compare runs of several seeds.

    Returns:
        {"mean", "median", "iqm", "min", "ci": {each aggregate: [low, high]}}; {} where no task has a score.
    """
    if not scores:
        return {}
    strata = [np.asarray(values, dtype=np.float64) for values in scores.values()]

    def aggregate(*rows: Indices) -> Floats:
        return _aggregates([stratum[of_stratum] for stratum, of_stratum in zip(strata, rows, strict=True)])

    values = _aggregates([stratum[None] for stratum in strata])[0]
    low, high = interval(aggregate, draw(*(stratum.shape for stratum in strata)))
    ends = np.column_stack([low, high])
    return {**dict(zip(AGGREGATES, values.tolist(), strict=True)), "ci": dict(zip(AGGREGATES, ends.tolist(), strict=True))}


def _aggregates(strata: list[Floats]) -> Floats:
    """Compute `AGGREGATES` of B resamples: each stratum [B, episodes of the task] -> [B, 4]."""
    means_BK = np.stack([stratum.mean(axis=1) for stratum in strata], axis=1)
    iqm_B = trimmed_means(np.concatenate(strata, axis=1))
    return np.column_stack([means_BK.mean(axis=1), np.median(means_BK, axis=1), iqm_B, means_BK.min(axis=1)])
