"""Schedule of the share of random actions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class EpsilonSchedule:
    """Share of random actions of each task: linear from `start` to the final value of the task over `steps`, then constant.

    Args:
        start: epsilon at step 0.
        ends: final epsilon of each task, `[K]`.
        steps: steps per task of the linear part; 0: the final values from the start.
    """

    def __init__(self, start: float, ends: Sequence[float], steps: int):
        self._start = start
        self._ends = np.asarray(ends, dtype=np.float32)
        self._steps = steps

    def __call__(self, step: int) -> np.ndarray:
        """Epsilon of each task at a step, float32 `[K]`."""
        progress = min(1.0, step / self._steps) if self._steps else 1.0
        return ((1 - progress) * self._start + progress * self._ends).astype(np.float32)
