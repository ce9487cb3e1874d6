"""Ablations: groups of runs that differ in one factor, such as the sharing structure or the source of the network, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtrl_cli.metric_names import STEPS_PER_SECOND
from mtrl_cli.reports import grouping
from mtrl_cli.reports.run_data import RunData, RunGroup
from mtrl_cli.stats import sharing as sharing_stats
from mtrl_cli.stats.bootstrap import Estimate, Floats

FACTORS = {"network/sharing": ("network.sharing",), "task_weights": ("task_weights",), "init_from": ("init_from", "transfer")}
"""The sections of the configuration that belong to a factor. The width of the network belongs to the sharing structure as well."""


@dataclass(frozen=True)
class Variant:
    """The runs with one option of the factor.

    Attributes:
        name: unique within the ablation: film, or `independent (30k)`.
        option: film.
        runs: the completed runs, in order of their seeds.
        left_out: the other runs with the reason: `seed 2 (failed)`.
        total, shared, own: parameter counts, `own` as the mean over tasks; None where unknown.
        scores_SK: final results of `runs`, in each task's own unit.
        is_tested: whether all final results are from the test.
    """

    name: str
    option: str
    runs: tuple[RunData, ...]
    left_out: tuple[str, ...]
    total: int | None
    shared: int | None
    own: float | None
    scores_SK: Floats
    is_tested: bool


@dataclass(frozen=True)
class Ablation:
    """Variants with the same tasks, budget and values of every key outside the factor.

    Attributes:
        about: the values in which it differs from the report's other ablations; empty for the only one.
        env, steps: the pack and the budget in steps per task.
        tasks: in order.
        scored: whether each task has normalised scores; the others are compared by their returns.
        variants: in the order of their groups.
    """

    about: str
    env: str
    steps: int
    tasks: tuple[str, ...]
    scored: tuple[bool, ...]
    variants: tuple[Variant, ...]

    @property
    def scored_tasks(self) -> list[str]:
        """The tasks that have normalised scores."""
        return [task for task, is_scored in zip(self.tasks, self.scored, strict=True) if is_scored]

    def named(self, task: str) -> str:
        """Name a task in a table, with its unit where that is no score."""
        return task if task in self.scored_tasks else f"{task} (return)"


@dataclass(frozen=True)
class Comparison:
    """A variant compared with a baseline; differences are the variant's minus the baseline's.

    Attributes:
        mean, iqm: differences of scores over tasks; None where no task has scores.
        tasks: differences of each task, in its own unit.
        efficiency: times fewer steps to the baseline's final score; None where the curves have no steps in common.
        time, cost: seconds of a training step, and of the whole budget, over the baseline's; None where unknown.
    """

    variant: Variant
    baseline: Variant
    mean: Estimate | None
    iqm: Estimate | None
    tasks: tuple[Estimate, ...]
    efficiency: Estimate | None
    time: float | None
    cost: float | None


# -- ablations ------------------------------------------------------------------------------------------------------------------


def ablations(groups: Sequence[RunGroup], factor: str) -> list[Ablation]:
    """Put groups together that differ in a factor only, in their order.

    Args:
        groups: all of the report.
        factor: one of `FACTORS`.
    """
    counted = grouping.counting([run for group in groups for run in group.runs])
    together: dict[tuple[tuple[str, str], ...], list[RunGroup]] = {}
    for group in groups:
        others = {key: value for key, value in counted(group.first).items() if not _is_factor(key, factor, group.first)}
        together.setdefault(tuple(sorted(others.items())), []).append(group)
    abouts = _abouts(list(together.values()), [dict(values) for values in together])
    return [_ablation(own, factor, about) for own, about in zip(together.values(), abouts, strict=True)]


def _is_factor(key: str, factor: str, run: RunData) -> bool:
    is_width = factor == "network/sharing" and (key == grouping.SIZE or key in grouping.widths(run))
    return is_width or any(_is_in(key, section) for section in FACTORS[factor])


def _abouts(grouped: Sequence[Sequence[RunGroup]], values: Sequence[Mapping[str, str]]) -> list[str]:
    """Describe each ablation by the values that differ between ablations: those of the group labels, or else the first keys."""
    if len(grouped) == 1:
        return [""]
    keys = dict.fromkeys(key for own in values for key in own)
    differing = [key for key in keys if len({own.get(key) for own in values}) > 1]
    words = []
    for groups, own in zip(grouped, values, strict=True):
        labels = {key: value for key, value in groups[0].values.items() if any(_is_in(each, key) for each in differing)}
        words.append(labels or {key: own.get(key, "-").strip("'") for key in differing[:3]})
    return [", ".join(f"{key}={value}" for key, value in own.items()) for own in words]


def _is_in(key: str, section: str) -> bool:
    """Return whether a dotted key is a section or lies in it: `task_weights._target_` in `task_weights`."""
    section = section.replace("/", ".")
    return key == section or key.startswith(section + ".")


def _ablation(groups: Sequence[RunGroup], factor: str, about: str) -> Ablation:
    first = next((group.first for group in groups if group.first.status == "completed"), groups[0].first)
    chosen = [grouping.chosen(group, first.tasks) for group in groups]
    runs = [run for own in chosen for run in own.runs]
    scored = tuple(bool(runs) and all(task in run.final_scores for run in runs) for task in first.tasks)
    options = [grouping.option(factor, group.first) for group in groups]
    sizes = [_size(group.runs) for group in groups]
    with_size = grouping.sized(options, [size["total"] for size in sizes])
    names = [name if with_size.count(name) == 1 else group.label for name, group in zip(with_size, groups, strict=True)]
    variants = [
        Variant(
            name=name,
            option=option,
            runs=own.runs,
            left_out=_left_out(group, own),
            **size,
            scores_SK=_final(own.runs, first.tasks, scored),
            is_tested=all(run.is_tested for run in own.runs),
        )
        for group, own, name, option, size in zip(groups, chosen, names, options, sizes, strict=True)
    ]
    return Ablation(about, first.env, first.steps_per_task, first.tasks, scored, tuple(variants))


def _final(runs: Sequence[RunData], tasks: Sequence[str], scored: Sequence[bool]) -> Floats:
    """Return the final results of S runs in each task's own unit, `[S, K]`."""
    rows = [[(run.final_scores if known else run.final_returns)[task] for task, known in zip(tasks, scored, strict=True)] for run in runs]
    return np.array(rows, float).reshape(len(runs), len(tasks))


def _left_out(group: RunGroup, chosen: grouping.Chosen) -> tuple[str, ...]:
    others = [(run, run.status) for run in group.runs if run.status != "completed"]
    others += [(run, "no results of all tasks") for run in chosen.incomplete] + [
        (run, "superseded by another run") for run in chosen.superseded
    ]
    return tuple(f"seed {run.seed} ({why})" for run, why in sorted(others, key=lambda other: other[0].seed))


def _size(runs: Sequence[RunData]) -> dict[str, Any]:
    counts: Mapping[str, int] = next((run.parameters for run in runs if run.parameters.get("total")), {})
    own = [value for name, value in counts.items() if name not in ("total", "shared")]
    return {"total": counts.get("total"), "shared": counts.get("shared"), "own": sum(own) / len(own) if own else None}


# -- comparisons ----------------------------------------------------------------------------------------------------------------


def compare(ablation: Ablation, variant: Variant, baseline: Variant) -> Comparison:
    """Compare two variants, both with completed runs."""
    scored = np.array(ablation.scored, bool)
    over_tasks = sharing_stats.gain(variant.scores_SK[:, scored], baseline.scores_SK[:, scored]) if scored.any() else None
    ours, theirs = mean_curves(ablation, variant), mean_curves(ablation, baseline)
    return Comparison(
        variant=variant,
        baseline=baseline,
        mean=None if over_tasks is None else over_tasks.mean,
        iqm=None if over_tasks is None else over_tasks.iqm,
        tasks=sharing_stats.gain(variant.scores_SK, baseline.scores_SK).tasks,
        efficiency=None if ours is None or theirs is None else sharing_stats.data_efficiency(ours, theirs),
        time=_ratio(step_seconds(variant), step_seconds(baseline)),
        cost=_ratio(budget_seconds(variant), budget_seconds(baseline)),
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def mean_curves(ablation: Ablation, variant: Variant) -> tuple[Floats, Floats] | None:
    """Return the curves over the scored tasks, or of a single task without scores; None where there are none."""
    tasks = ablation.scored_tasks or (list(ablation.tasks) if len(ablation.tasks) == 1 else [])
    return curves(variant.runs, tasks, is_scored=bool(ablation.scored_tasks))


def curves(runs: Sequence[RunData], tasks: Sequence[str], *, is_scored: bool) -> tuple[Floats, Floats] | None:
    """Return learning curves of validation: steps `[P]` and the means over tasks `[S, P]`, at the evaluations that all runs have.

    Returns None where the runs have no evaluation in common, or there is no task.
    """
    if not tasks:
        return None
    by_step = []
    for run in runs:
        results = {each.step: each.scores if is_scored else each.returns for each in run.evaluations}
        by_step.append({step: float(np.mean([own[task] for task in tasks])) for step, own in results.items() if set(tasks) <= own.keys()})
    steps = sorted(set.intersection(*(set(own) for own in by_step))) if by_step else []
    return (np.array(steps, float), np.array([[own[step] for step in steps] for own in by_step])) if steps else None


def step_seconds(variant: Variant) -> float | None:
    """Return the seconds of a training step in one task's environment, without evaluating and saving: the mean over runs."""
    rates = [[value for _, value in run.metrics.get(STEPS_PER_SECOND, ()) if value > 0] for run in variant.runs]
    return float(np.mean([1 / np.median(of_run) for of_run in rates if of_run])) if any(rates) else None


def budget_seconds(variant: Variant) -> float | None:
    """Return the seconds of the whole budget, with evaluating and saving: the mean over runs."""
    known = [run.seconds for run in variant.runs if run.seconds > 0]
    return float(np.mean(known)) if known else None


# -- diagnostics ----------------------------------------------------------------------------------------------------------------


def at_the_end(variant: Variant, name: str) -> float | None:
    """Return a metric's last value: the mean over the runs that have it."""
    found = [run.metrics[name][-1][1] for run in variant.runs if run.metrics.get(name)]
    return float(np.mean(found)) if found else None


def over_training(variant: Variant, name: str) -> float | None:
    """Return a metric's mean over training: the mean over the runs that have it."""
    found = [np.mean([value for _, value in run.metrics[name]]) for run in variant.runs if run.metrics.get(name)]
    return float(np.mean(found)) if found else None


def between_tasks(ablation: Ablation, variant: Variant, name: str) -> Floats | None:
    """Return a pairwise metric of tasks at the end, `[K, K]`: 1 on the diagonal, NaN where missing; None where it is missing for all."""
    tasks = ablation.tasks
    table = np.full((len(tasks), len(tasks)), np.nan)
    for a, one in enumerate(tasks):
        for b, other in enumerate(tasks[a + 1 :], a + 1):
            value = at_the_end(variant, f"{name}/{one}~{other}")
            if value is not None:
                table[a, b] = table[b, a] = value
    if np.isnan(table).all():
        return None
    np.fill_diagonal(table, 1.0)
    return table


def routings(ablation: Ablation, variant: Variant) -> dict[str, Floats]:
    """Return how each gate routes each task at the end: by the gate's name, `[K, choices]`."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for name in dict.fromkeys(name for run in variant.runs for name in run.metrics if name.startswith("routing/")):
        before, _, choice = name.removeprefix("routing/").rpartition("/")
        row = next((k for k, task in enumerate(ablation.tasks) if before.endswith(f"/{task}")), None)
        value = at_the_end(variant, name)
        if row is not None and choice.isdecimal() and len(choice) < 4 and value is not None:
            found.setdefault(before[: -len(ablation.tasks[row]) - 1], {})[row, int(choice)] = value
    tables = {}
    for name, shares in found.items():
        tables[name] = np.full((len(ablation.tasks), 1 + max(choice for _, choice in shares)), np.nan)
        for place, value in shares.items():
            tables[name][place] = value
    return tables
