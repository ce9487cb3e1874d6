"""Stopping a run whose validation no longer improves (Prechelt 1998, "Early Stopping - But When?", by patience)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Hears a metric at each evaluation; higher is better.

    A value counts as an improvement if it is above the best so far by more than `min_delta`; the first one is. Slow progress adds up,
    as the best changes with improvements only.

    Args:
        metric: its name; None: nothing is heard, and nothing stops.
        patience: so many evaluations one after the other without an improvement are enough.
        min_delta: see above.
    """

    def __init__(self, *, metric: str | None, patience: int, min_delta: float):
        assert patience > 0, patience
        assert min_delta >= 0, min_delta
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.best: float | None = None
        self.best_at: int | None = None
        self.without = 0

    @property
    def stopped(self) -> bool:
        """Whether it is enough."""
        return self.without >= self.patience

    @property
    def reason(self) -> str:
        """Why, in words."""
        assert self.best is not None, "nothing was heard"
        margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
        times = f"{self.without} evaluation{'' if self.without == 1 else 's'}"
        return f"{self.metric} has not risen above {self.best:.4g}{margin}, its value at step {self.best_at:,}, in {times}"

    def hear(self, step: int, value: float | None) -> None:
        """Take the metric's value at an evaluation; one that is missing, or no number, is no improvement."""
        if self.metric is None:
            return
        if value is not None and not math.isnan(value) and (self.best is None or value > self.best + self.min_delta):
            self.best, self.best_at, self.without = float(value), step, 0
        elif self.best is not None:
            self.without += 1

    def begin_anew(self) -> None:
        """Be patient again: the run was given a further budget. What is best so far stays."""
        self.without = 0

    def state_dict(self) -> dict[str, Any]:
        """What was heard."""
        return {"best": self.best, "best_at": self.best_at, "without": self.without}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        best, best_at = state["best"], state["best_at"]
        self.best, self.best_at = None if best is None else float(best), None if best_at is None else int(best_at)
        self.without = int(state["without"])
