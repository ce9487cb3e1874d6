"""Intervals between events of a run."""

from __future__ import annotations


class Every:
    """An event that is due at the first step at or past each multiple of an interval.

    Args:
        interval: steps; 0: no multiples.
        last: step of the last event; -1: there was none.

    Attributes:
        interval, last: as above. The caller sets `last` after an event.
    """

    def __init__(self, interval: int, last: int = 0):
        self.interval = interval
        self.last = last

    def passed(self, step: int) -> bool:
        """Whether there is a multiple of the interval after the last event, up to `step`."""
        return self.interval > 0 and step // self.interval > max(self.last, 0) // self.interval

    def due(self, step: int, finished: bool = False) -> bool:
        """Whether the event is due at `step`: a multiple has passed, or the run is `finished`; never twice at the same step."""
        return step != self.last and (finished or self.passed(step))
