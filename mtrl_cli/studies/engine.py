"""The study engine: a sweep of chosen trials, then its report. Studies differ only in their trials."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtrl_cli.errors import RunError, Stopped, UserError, show
from mtrl_cli.reports import command as report
from mtrl_cli.reports import html
from mtrl_cli.reports.wording import counted
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.sweeps import command as sweep
from mtrl_cli.sweeps import dry_run
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Axes, Choices, Plan, Points, Value, points_of
from mtrl_cli.sweeps.search_space import SplitOverrides, first_values, key_of, overrides_of, split_overrides

DEFAULT_SEEDS, MAX_SEEDS = 3, 1000
EVALUATIONS = 10
"""Minimum number of evaluations and diagnostics over the budget, unless the user sets their intervals."""


@dataclass(frozen=True)
class Study:
    """A sweep of chosen trials, and the lines that describe it."""

    plan: Plan
    lines: tuple[str, ...]

    def listing(self) -> str:
        """Describe the study and list its trials, for `--dry-run`."""
        return "\n".join([*self.lines, dry_run.list_sweep(self.plan)])


def run(study: Study, *, command: Sequence[str]) -> None:
    """Train the trials that are not completed yet, then write the report into the study's folder.

    Raises:
        UserError: the folder contains other files.
        RunError: a trial failed after all retries; the report, which lists it, is written first.
        Stopped: by a signal, after saving; the same command resumes.
    """
    for line in study.lines:
        print_line(line)
    folder = study.plan.run_dir
    assert folder is not None
    failed = None
    try:
        sweep.run(study.plan, command=command)
    except RunError as error:
        failed = error
    except Stopped:
        print_line("or with the same command, which also writes the report")
        raise
    report.run([folder.expanduser()], None, command)
    if failed is not None:
        raise failed


def plan(overrides: Sequence[str], points: Points, folder: str) -> Plan:
    """Plan the sweep of a study.

    Args:
        overrides: overrides of the sweep, with several values for each key that trials differ in.
        points: function that selects the trials from the axes.
        folder: name of the default folder under runs/studies; `{env}` is the environment's name.
    """
    made = sweep_plan.make(overrides, points)
    return replace(made, run_dir=made.run_dir or Path("runs/studies") / folder.format(env=made.env))


# -- overrides ------------------------------------------------------------------------------------------------------------------


def parse(overrides: Sequence[str]) -> tuple[list[str], SplitOverrides, list[str]]:
    """Split the overrides of a study.

    Returns:
        The overrides except the seeds, the same overrides split, and the axis of seeds (see `split_seeds`).

    Raises:
        UserError: matplotlib, which the report needs, is missing; an override is wrong; or a key has an interval of values.
    """
    html.require()
    others, seeds = split_seeds(overrides)
    split = split_overrides(others)
    for key, axis in split.axes.items():
        if not isinstance(axis, Choices):
            raise UserError(f"{key}: a study needs a list of values, got an interval. Give values, or use mtrl sweep")
    return others, split, seeds


def split_seeds(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `seeds=N` and `seed=FIRST` off the overrides and return the other overrides and the seed axis: N seeds from FIRST on.

    A list of seeds (`seed=1,5`) stays as it is; `seeds` cannot be given with it.
    """
    others = [override for override in overrides if key_of(override) != "seeds"]
    counts, first = values_in(overrides, "seeds"), next(iter(values_in(overrides, "seed")), "0")
    if len(counts) > 1 or (counts and not (counts[0].isdecimal() and 0 < int(counts[0]) <= MAX_SEEDS)):
        raise UserError(f"seeds must be one integer from 1 to {MAX_SEEDS}, got {show(','.join(counts))}")
    if not re.fullmatch(r"\d{1,15}", first):
        if counts:
            raise UserError(f"seed={show(first)} and seeds={counts[0]} both choose the seeds. Give only one of them")
        return others, []
    number = int(counts[0]) if counts else DEFAULT_SEEDS
    values = ",".join(str(int(first) + index) for index in range(number))
    return [override for override in others if key_of(override) != "seed"], [f"seed={values}"]


def values_in(overrides: Sequence[str], key: str) -> list[str]:
    """Return the texts that overrides give to a key."""
    return [override.partition("=")[2] for override in overrides if key_of(override) == key]


def first_trial(split: SplitOverrides, without: Sequence[str] = ()) -> list[str]:
    """Return the overrides of the run with the first value of each axis, without some keys."""
    axes = overrides_of(first_values(split.axes))
    trusted = [override for override in split.sweep if key_of(override) == "trusted_packages"]
    return [*(override for override in [*split.shared, *axes] if key_of(override) not in without), *trusted]


def values_of(split: SplitOverrides, key: str) -> list[str]:
    """Return the values that the overrides give to a key: one, several, or none."""
    axis = split.axes.get(key)
    return list(axis.values) if isinstance(axis, Choices) else values_in(split.shared, key)


def refuse_early_stopping(config: Mapping[str, Any]) -> None:
    """Raise UserError where runs may end before their budget."""
    if config["early_stopping"]["metric"] is not None:
        raise UserError("early_stopping.metric: a study compares runs of the same budget. Omit early_stopping.metric")


def evaluation_overrides(config: Mapping[str, Any], given: set[str], keys: Sequence[str]) -> list[str]:
    """Return overrides of interval keys that the user has not given, if their intervals are too long for curves."""
    longest = max(1, config["steps_per_task"] // EVALUATIONS)
    intervals = {key: config[key.partition(".")[0]][key.partition(".")[2]] for key in keys if key not in given}
    return [f"{key}={longest}" for key, every in intervals.items() if not 0 < every <= longest]


# -- trials ---------------------------------------------------------------------------------------------------------------------


def combinations(axes: Axes, without: Sequence[str]) -> Sequence[Mapping[str, Value]]:
    """Return the combinations of all axes except those in `without`; the seed varies slowest."""
    keys = sorted(axes, key=lambda key: key != "seed")
    return points_of({key: axes[key] for key in keys if key not in without}, None)


def extent(plan: Plan) -> str:
    """Describe the size of a study: `12 runs of 40,000 steps per task, 3 seeds`."""
    seeds = plan.axes.get("seed")
    number = len(seeds.values) if isinstance(seeds, Choices) else 1
    return f"{plan.trials} runs of {plan.steps_per_task:,} steps per task, {counted(number, 'seed')}"
