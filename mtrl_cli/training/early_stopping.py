"""Early stopping by patience (Prechelt 1998, "Early Stopping - But When?")."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtrl_cli.machine.saved import Saved


@dataclass
class EarlyStopping(Saved):
    """Stops a run whose evaluations no longer improve; higher metrics are better.

    A value is an improvement if it exceeds the best value by more than `min_delta`. The first value is an improvement. Small
    gains add up, because the best value changes only with an improvement.

    Args:
        metric: name of the metric; None: never stop.
        patience: consecutive evaluations without an improvement before the run stops.
        min_delta: smallest improvement.

    Attributes:
        best, best_at: best value, and its step.
        without: consecutive evaluations without an improvement so far.
    """

    saved = ("best", "best_at", "without")

    metric: str | None
    patience: int
    min_delta: float
    best: float | None = None
    best_at: int | None = None
    without: int = 0

    @property
    def stopped(self) -> bool:
        """Whether the run should stop."""
        return self.without >= self.patience

    @property
    def reason(self) -> str:
        """Reason for stopping, as a sentence."""
        assert self.best is not None, "no evaluation was recorded"
        margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
        times = f"{self.without} evaluation{'' if self.without == 1 else 's'}"
        return f"{self.metric} has not risen above {self.best:.4g}{margin}, its value at step {self.best_at:,}, in {times}"

    def update(self, step: int, value: float | None) -> None:
        """Record the metric of an evaluation. A missing value or NaN is not an improvement."""
        if self.metric is None:
            return
        if value is not None and not math.isnan(value) and (self.best is None or value > self.best + self.min_delta):
            self.best, self.best_at, self.without = float(value), step, 0
        elif self.best is not None:
            self.without += 1

    def reset_patience(self) -> None:
        """Reset the patience and keep the best value, for a run with an extended budget."""
        self.without = 0
