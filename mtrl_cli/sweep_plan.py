"""What a sweep is to do: the words of its runs, the values that these differ in, and how they are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Value = str | int | float
"""Of one key in one trial: a choice as the word that it was written as, a number drawn from an interval."""


@dataclass(frozen=True)
class Choices:
    """The values that a key may take, each as the word that stands behind `KEY=`: `film`, `null`, `[a,b]`, `0`."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """The numbers that a key may take: from `low` to `high`, both included; `log`: even on a logarithmic scale; `whole`: integers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do.

    Attributes:
        words: the overrides that all runs have, as `mtrl train` takes them.
        axes: what they differ in, by key, in the order in which it was given.
        points: of a grid, the values of each trial, in order; None: an Optuna sampler chooses `search["trials"]` of them.
        search: the section `sweep` of conf/sweep.yaml, checked; its sampler is never auto.
        launcher: the section `launcher`, checked: of each worker its own, and no part of what makes two sweeps the same.
        trusted_packages: that the user named.
        env: the pack's name.
        steps_per_task: the budget of a run (the largest of them).
        run_dir: the sweep's folder; None: a new one under runs/sweeps.
    """

    words: tuple[str, ...]
    axes: Mapping[str, Choices | Interval]
    points: tuple[Mapping[str, Value], ...] | None
    search: Mapping[str, Any]
    launcher: Mapping[str, Any]
    trusted_packages: tuple[str, ...]
    env: str
    steps_per_task: int
    run_dir: Path | None

    @property
    def trials(self) -> int:
        """How many trials the sweep has."""
        return len(self.points) if self.points is not None else int(self.search["trials"])

    def overrides(self, values: Mapping[str, Value]) -> list[str]:
        """The words in which one trial differs from others: `["network/sharing=film", "seed=3"]`."""
        return [f"{key}={value}" for key, value in values.items()]
