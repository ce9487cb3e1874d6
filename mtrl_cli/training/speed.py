"""Speed of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Steps per task and updates, per second."""

    steps: float
    updates: float


class SpeedMeter:
    """Measures the speed of a run between ticks or, with updates in bursts, between the ends of bursts.

    An agent that learns from rollouts makes all updates from a rollout at once. The speed between two arbitrary ticks depends on the number
    of bursts between them, so the speed is measured over whole rollouts: from the end of one burst to the end of another.

    Args:
        step, updates: step and number of updates at the start of the measurement.
        in_bursts: whether updates are made in bursts.
        now: function that returns the time in seconds.
    """

    def __init__(self, step: int, updates: int, in_bursts: bool, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._in_bursts = in_bursts
        self._had_burst = False
        self._updates = updates
        self._paused = 0.0
        self._from = self._to = self._mark(step, updates)
        self._speed: Speed | None = None

    def _mark(self, step: int, updates: int) -> tuple[float, int, int]:
        return self._now() - self._paused, step, updates

    def tick(self, step: int, updates: int) -> bool:
        """Record the state of the run after a tick. Returns whether the speed can be measured up to this tick."""
        is_burst, self._updates = updates != self._updates, updates
        if self._in_bursts and self._had_burst and not is_burst:
            return False
        self._to = self._mark(step, updates)
        if self._in_bursts and is_burst and not self._had_burst:
            self._had_burst = True
            self._from = self._to  # the first burst may follow an incomplete rollout
        return True

    def read(self) -> Speed:
        """Return the speed since the last call, or the result of the last call if no rollout was completed since."""
        seconds, steps, updates = (to - start for to, start in zip(self._to, self._from, strict=True))
        if steps > 0 or self._speed is None:
            self._speed = Speed(steps / max(1e-9, seconds), updates / max(1e-9, seconds))
            self._from = self._to
        return self._speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of a context."""
        start, paused = self._now(), self._paused
        yield
        self._paused = paused + self._now() - start
