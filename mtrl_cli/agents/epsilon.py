"""Quantities that change over a run, as functions of the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class EpsilonSchedule:
    """Each task's share of random actions: linear from `start` to that task's end over `steps`, then constant.

    Args:
        start: epsilon at step 0, for every task.
        ends: each task's final epsilon, `[K]`.
        steps: steps per task over which it falls; 0: the final values from the start.
    """

    def __init__(self, start: float, ends: Sequence[float], steps: int):
        self._start, self._ends, self._steps = start, np.asarray(ends, dtype=np.float32), steps

    def __call__(self, step: int) -> np.ndarray:
        """Epsilon of each task at a step, float32 `[K]`."""
        progress = min(1.0, step / self._steps) if self._steps else 1.0
        return ((1 - progress) * self._start + progress * self._ends).astype(np.float32)
