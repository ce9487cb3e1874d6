"""Differences between the runs of two configurations, such as two sharing structures. Numpy only.

S runs of `ours`, T runs of `baseline`, K tasks, P evaluations. Whole runs are drawn, separately for each configuration, because the scores
of the tasks of one network are dependent. Runs with equal seeds are not paired, because networks of different shapes start from different
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mtrl_cli.stats.bootstrap import Estimate, Floats, Indices, draw, estimates, trimmed_means
from mtrl_cli.stats.transfer import steps_to_threshold

CHUNK = 10_000  # runs drawn at a time, which bounds memory


@dataclass(frozen=True)
class Gain:
    """Differences of scores: in the mean over tasks, in the interquartile mean, and in each task, in order."""

    mean: Estimate
    iqm: Estimate
    tasks: tuple[Estimate, ...]


def gain(ours_SK: Floats, baseline_TK: Floats) -> Gain:
    """Compute differences of final scores, `ours` minus `baseline`.

    The mean is over the tasks' means, the interquartile mean over all runs and tasks together (Agarwal et al. 2021, "Deep RL at the Edge
    of the Statistical Precipice", section 4.3).
    """

    def statistic(ours_BS: Indices, baseline_BT: Indices) -> Floats:
        ours_BSK, baseline_BTK = ours_SK[ours_BS], baseline_TK[baseline_BT]
        tasks_BK = ours_BSK.mean(axis=1) - baseline_BTK.mean(axis=1)
        iqm_B = trimmed_means(ours_BSK.reshape(len(ours_BS), -1)) - trimmed_means(baseline_BTK.reshape(len(baseline_BT), -1))
        return np.column_stack([tasks_BK.mean(axis=1), iqm_B, tasks_BK])

    mean, iqm, *tasks = _estimates(statistic, len(ours_SK), len(baseline_TK))
    return Gain(mean, iqm, tuple(tasks))


def data_efficiency(ours: tuple[Floats, Floats], baseline: tuple[Floats, Floats]) -> Estimate:
    """Compute the ratio of steps to the baseline's final score: steps of the baseline over steps of `ours`; 0 if `ours` never does.

    The curves are means over runs. The steps of the baseline are counted until its curve first reaches its final score.

    Args:
        ours, baseline: steps `[P]`, and the runs' curves `[S, P]`.
    """

    def statistic(ours_BS: Indices, baseline_BT: Indices) -> Floats:
        ours_BP, baseline_BP = ours[1][ours_BS].mean(axis=1), baseline[1][baseline_BT].mean(axis=1)
        final_B = baseline_BP[:, -1]
        # A score reached before the first step counts as reached after one step, as a ratio to 0 does not exist.
        needed_B = np.maximum(steps_to_threshold(ours[0], ours_BP, final_B), 1)
        return (np.maximum(steps_to_threshold(baseline[0], baseline_BP, final_B), 1) / needed_B)[:, None]

    return _estimates(statistic, len(ours[1]), len(baseline[1]))[0]


def _estimates(statistic: Callable[..., Floats], ours: int, baseline: int) -> list[Estimate]:
    shapes = (ours,), (baseline,)
    return estimates(statistic, *shapes, draws=draw(*shapes, chunk=max(1, CHUNK // max(ours, baseline))))


def nearest_size(total: int, others: Sequence[float], within: float = 0.05) -> int | None:
    """Return the index of the parameter count nearest to `total`; None if the difference is more than `within` times `total`."""
    distances = [abs(other - total) / total for other in others]
    best = min(range(len(others)), key=distances.__getitem__, default=None)
    return best if best is not None and distances[best] <= within else None
