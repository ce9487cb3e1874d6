"""What one way to share a network is worth beside another: the runs of two configurations compared. Numpy only.

S runs of the one, T of the other, K tasks, P evaluations. Runs are drawn whole, with replacement, and within each configuration: these
are the strata of the bootstrap. The tasks of a run were learned by one network, so their scores go together; the two configurations'
runs do not, though their seeds be equal: networks of other shapes begin with other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtrl_cli.stats import bootstrap
from mtrl_cli.stats import transfer as transfer_stats

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
RESAMPLES = 2000
LARGEST = 10_000
"""So many runs are drawn at a time, which bounds memory."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; no interval where one of the two sides is a single run."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below 0; else 0, as where there is none."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Gain:
    """What the one has more than the other: in the mean over tasks, in the interquartile mean, and in each task, in order."""

    mean: Estimate
    iqm: Estimate
    tasks: tuple[Estimate, ...]


def gain(ours_SK: Floats, theirs_TK: Floats, *, seed: int = 0) -> Gain:
    """Differences of final scores, ours less theirs.

    The mean is over the tasks' means, the interquartile mean over all runs and tasks together (Agarwal et al. 2021, "Deep RL at the Edge
    of the Statistical Precipice", section 4.3).
    """

    def statistics(ours_BS: Rows, theirs_BT: Rows) -> Floats:
        of_ours, of_theirs = ours_SK[ours_BS], theirs_TK[theirs_BT]
        tasks_BK = of_ours.mean(axis=1) - of_theirs.mean(axis=1)
        iqm_B = bootstrap.trimmed_means(of_ours.reshape(len(of_ours), -1)) - bootstrap.trimmed_means(of_theirs.reshape(len(of_theirs), -1))
        return np.column_stack([tasks_BK.mean(axis=1), iqm_B, tasks_BK])

    mean, iqm, *tasks = over_runs(statistics, len(ours_SK), len(theirs_TK), seed=seed)
    return Gain(mean, iqm, tuple(tasks))


def data_efficiency(ours: tuple[Floats, Floats], theirs: tuple[Floats, Floats], *, seed: int = 0) -> Estimate:
    """How many times fewer steps it takes us to reach what the others end with: their steps over ours, 0 where we never do.

    Of the mean curves over runs; their steps are those until they first reach it themselves.

    Args:
        ours, theirs: steps `[P]`, and the runs' curves `[S, P]`.
    """

    def statistics(ours_BS: Rows, theirs_BT: Rows) -> Floats:
        our_BP, their_BP = ours[1][ours_BS].mean(axis=1), theirs[1][theirs_BT].mean(axis=1)
        ends_B = their_BP[:, -1]
        reached_B = transfer_stats.steps_to_each(ours[0], our_BP, ends_B)
        # Before the first step there is nothing to divide by: what is there from the start took a step.
        return (np.maximum(transfer_stats.steps_to_each(theirs[0], their_BP, ends_B), 1) / np.maximum(reached_B, 1))[:, None]

    return over_runs(statistics, len(ours[1]), len(theirs[1]), seed=seed)[0]


def over_runs(
    statistics: Callable[[Rows, Rows], Floats], ours: int, theirs: int, *, confidence: float = 0.95, seed: int = 0
) -> list[Estimate]:
    """Statistics of two sets of runs and their percentile bootstrap intervals.

    Args:
        statistics: of B draws of runs, whose indices it is given, `[B, S]` and `[B, T]`: any number of them, `[B, V]`.
        ours, theirs: how many runs there are.
    """
    values = statistics(np.arange(ours)[None], np.arange(theirs)[None])[0]
    if min(ours, theirs) < 2:
        return [Estimate(float(value)) for value in values]
    random = np.random.default_rng(seed)
    size = max(1, LARGEST // max(ours, theirs))
    resampled = []
    for start in range(0, RESAMPLES, size):
        many = min(size, RESAMPLES - start)
        resampled.append(statistics(*(random.integers(0, runs, (many, runs)) for runs in (ours, theirs))))
    low, high = np.quantile(np.concatenate(resampled), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [Estimate(float(value), float(below), float(above)) for value, below, above in zip(values, low, high, strict=True)]


def nearest_size(total: int, others: Sequence[float], within: float = 0.05) -> int | None:
    """Which of several numbers of parameters is nearest to ours, where one lies within a share of it: its index."""
    distances = [abs(other - total) / total for other in others]
    best = min(range(len(others)), key=distances.__getitem__, default=None)
    return best if best is not None and distances[best] <= within else None
