"""Runs as a report sees them: read from their folders, which may come from strangers, and put together by configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run's validation: `step` per task, `seconds` of work until then, mean return and normalised score by task."""

    step: int
    seconds: float
    returns: Mapping[str, float]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: its folder.
        name: short, and unique among the runs of a report.
        status: completed, running, stopped, failed, pruned, waiting; or unreadable: `error` says why, and nothing else is known.
        error: why it failed, or cannot be read.
        command: the `mtrl train …` that repeats it.
        config: its configuration by dotted key (`configuration.flat`); empty where unreadable.
        overrides: of a sweep's trial, the words in which it differs from the others.
        number: of a sweep's trial.
        env, tasks, seed, steps_per_task: of its configuration.
        step: per task, that it has reached; `seconds` of work until then.
        evaluations: in order of their steps.
        final_returns, final_scores: by task, of the test of the last network, or else of the last evaluation; `is_tested` says which.
        parameters: "total", "shared" and each task's own; empty where a run does not tell.
        figures: all others by name as (step, value) in order: grad/cosine/a~b, routing/…, features/…, perf/….
    """

    path: Path
    name: str
    status: str
    error: str | None
    command: str
    config: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    number: int | None = None
    env: str = ""
    tasks: tuple[str, ...] = ()
    seed: int = 0
    steps_per_task: int = 0
    step: int = 0
    seconds: float = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    final_returns: Mapping[str, float] = field(default_factory=dict)
    final_scores: Mapping[str, float] = field(default_factory=dict)
    is_tested: bool = False
    parameters: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, which differ in their seeds alone.

    Attributes:
        label: what sets it apart from the other groups of a report, in a few words: `film`, `film, pcgrad`.
        values: the keys that differ between groups, as words: {"network/sharing": "film"}.
        runs: in order of their seeds.
    """

    label: str
    values: Mapping[str, str]
    runs: tuple[Run, ...]
