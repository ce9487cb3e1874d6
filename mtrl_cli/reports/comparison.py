"""Variants that can be compared: configurations with the same tasks and budget. In an ablation they differ in one factor only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mtrl_cli.metric_names import STEPS_PER_SECOND
from mtrl_cli.reports import grouping
from mtrl_cli.reports.run_data import RunData, RunGroup, first_completed
from mtrl_cli.reports.wording import counted, some, titled
from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats import sharing as sharing_stats
from mtrl_cli.stats.bootstrap import Estimate, Floats

FACTORS = {"network/sharing": ("network.sharing",), "task_weights": ("task_weights",), "init_from": ("init_from", "transfer")}
"""The sections of the configuration that belong to a factor. The width of the network belongs to the sharing structure as well."""
MAX_ABLATIONS = 6
"""Ablations (such as one per learning rate) of one factor on a page; all runs are in its tables of scores."""
FEW_SEEDS = 5
ONE_SEED = "One seed of each configuration: there are no intervals, and a difference may be chance alone. Run more seeds (seed=range(5))."
NO_RESULTS, SUPERSEDED = "no results of all tasks", "superseded by another run"


@dataclass(frozen=True)
class Variant:
    """The completed runs of one configuration, one for each seed: R runs, K tasks.

    Attributes:
        name: unique within the benchmark: film, or `independent (30k)`.
        option: of the factor of an ablation, such as film; else the name.
        runs: in order of their seeds.
        left_out: seeds of the other runs, each with the reason.
        parameters: parameter counts "total", "shared" and by task; empty where unknown.
        scores_RK: final scores in the tasks with reference scores.
        results_RK: final results in all tasks, in each task's own unit.
    """

    name: str
    option: str
    runs: tuple[RunData, ...]
    left_out: tuple[tuple[int, str], ...]
    parameters: Mapping[str, int]
    scores_RK: Floats
    results_RK: Floats

    @property
    def total(self) -> int | None:
        """The parameter count."""
        return self.parameters.get("total")

    @cached_property
    def aggregates(self) -> dict[str, Estimate]:
        """Scores over all runs and tasks, by name: `stats.scores.AGGREGATES`; {} without scores."""
        return score_stats.aggregates(self.scores_RK) if self.scores_RK.size else {}

    @property
    def iqm(self) -> float:
        """The interquartile mean of scores; 0 without scores."""
        return self.aggregates["iqm"].value if self.aggregates else 0.0


@dataclass(frozen=True)
class Benchmark:
    """Variants with the same tasks and budget; in an ablation also with the same values of every key outside a factor.

    Attributes:
        env, steps: the pack and the budget in steps per task.
        tasks: in order.
        scored: the tasks that have reference scores; the others are compared by their returns.
        variants: in the order of their groups.
        about: distinguishes it from other benchmarks in titles; empty for the only one.
        suffix: of the names of its tables and plots; empty for the first or only one.
    """

    env: str
    steps: int
    tasks: tuple[str, ...]
    scored: tuple[str, ...]
    variants: tuple[Variant, ...]
    about: str
    suffix: str = ""

    @property
    def compared(self) -> list[Variant]:
        """The variants that have completed runs."""
        return [variant for variant in self.variants if variant.runs]

    @cached_property
    def ranked(self) -> list[Variant]:
        """The variants that have completed runs, the best first."""
        return sorted(self.compared, key=lambda variant: -variant.iqm)

    @property
    def name(self) -> str:
        """A name such as `minatar_pack (5 tasks), 100,000 steps per task`."""
        return f"{self.env} ({counted(len(self.tasks), 'task')}), {self.steps:,} steps per task"

    @property
    def anchor(self) -> str:
        """The suffix in anchors of sections."""
        return self.suffix.replace("_", "-")

    def cautions(self) -> list[str]:
        """Return lines about single seeds and few seeds."""
        seeds = {variant.name: len(variant.runs) for variant in self.compared}
        single = [name for name, count in seeds.items() if count == 1]
        if single and len(single) == len(seeds):
            return [ONE_SEED]
        lines = [f"One seed, so no interval: {some(single)}."] if single else []
        fewest = min((count for count in seeds.values() if count > 1), default=FEW_SEEDS)
        few = f"Intervals over {fewest} seeds are too narrow. Run {FEW_SEEDS} or more."
        return [*lines, few] if fewest < FEW_SEEDS else lines

    def title(self, text: str) -> str:
        """Add the text that distinguishes the benchmark to a section's title."""
        return titled(text, self.about)

    def named(self, task: str) -> str:
        """Name a task in a table, with its unit if it has no scores."""
        return task if task in self.scored else f"{task} (return)"

    def split(self, option: str) -> tuple[list[Variant], list[Variant]]:
        """Split the variants that have completed runs into those with a baseline option and the others."""
        return [each for each in self.compared if each.option == option], [each for each in self.compared if each.option != option]


# -- benchmarks and ablations ---------------------------------------------------------------------------------------------------


def benchmarks(groups: Sequence[RunGroup]) -> list[Benchmark]:
    """Put groups with the same tasks and budget together, ordered by the first group of each benchmark."""
    together: dict[Any, list[RunGroup]] = {}
    for group in groups:
        together.setdefault((group.first.env, group.first.tasks, group.first.steps_per_task), []).append(group)
    labels = [[group.label for group in own] for own in together.values()]
    found = [_benchmark(own, names, names) for own, names in zip(together.values(), labels, strict=True)]
    return found if len(found) == 1 else [replace(each, about=each.name, suffix=f"_{number}") for number, each in enumerate(found, 1)]


def ablations(groups: Sequence[RunGroup], factor: str) -> list[Benchmark]:
    """Put groups together that differ only in a factor, ordered by the first group of each ablation.

    Args:
        groups: all of the report.
        factor: one of `FACTORS`.
    """
    counts = grouping.counting([run for group in groups for run in group.runs])
    together: dict[tuple[tuple[str, str], ...], list[RunGroup]] = {}
    for group in groups:
        others = {key: value for key, value in counts(group.first).items() if not _is_factor(key, factor, group.first)}
        together.setdefault(tuple(sorted(others.items())), []).append(group)
    abouts = _abouts(list(together.values()), [dict(values) for values in together])
    return [_ablation(own, factor, about) for own, about in zip(together.values(), abouts, strict=True)]


def numbered(found: Sequence[Benchmark]) -> list[Benchmark]:
    """Return the first `MAX_ABLATIONS` ablations, with suffixes for all but the first."""
    return [replace(each, suffix=f"_{number}" if number > 1 else "") for number, each in enumerate(found[:MAX_ABLATIONS], 1)]


def _is_factor(key: str, factor: str, run: RunData) -> bool:
    is_width = factor == "network/sharing" and (key == grouping.SIZE or key in grouping.widths(run))
    return is_width or any(_is_in(key, section) for section in FACTORS[factor])


def _abouts(grouped: Sequence[Sequence[RunGroup]], values: Sequence[Mapping[str, str]]) -> list[str]:
    """Describe each ablation by the values that differ between ablations: those of the group labels, or else the first keys."""
    if len(grouped) == 1:
        return [""]
    keys = dict.fromkeys(key for own in values for key in own)
    differing = [key for key in keys if len({own.get(key) for own in values}) > 1]
    described = []
    for groups, own in zip(grouped, values, strict=True):
        labels = {key: value for key, value in groups[0].values.items() if any(_is_in(each, key) for each in differing)}
        described.append(labels or {key: own.get(key, "-").strip("'") for key in differing[:3]})
    return [", ".join(f"{key}={value}" for key, value in own.items()) for own in described]


def _is_in(key: str, section: str) -> bool:
    """Return whether a dotted key is a section or lies in it: `task_weights._target_` in `task_weights`."""
    section = section.replace("/", ".")
    return key == section or key.startswith(section + ".")


def _ablation(groups: Sequence[RunGroup], factor: str, about: str) -> Benchmark:
    options = [grouping.option(factor, group.first) for group in groups]
    names = grouping.sized(options, [_parameters(group).get("total") for group in groups])
    unique = [name if names.count(name) == 1 else group.label for name, group in zip(names, groups, strict=True)]
    return _benchmark(groups, unique, options, about)


def _benchmark(groups: Sequence[RunGroup], names: Sequence[str], options: Sequence[str], about: str = "") -> Benchmark:
    first = first_completed([group.first for group in groups])
    chosen = [_choose(group, first.tasks) for group in groups]
    compared = [run for runs, _ in chosen for run in runs]
    scored = tuple(task for task in first.tasks if compared and all(task in run.final_scores for run in compared))
    variants = [
        Variant(
            name=name,
            option=option,
            runs=runs,
            left_out=left_out,
            parameters=_parameters(group),
            scores_RK=_final(runs, scored, scored),
            results_RK=_final(runs, first.tasks, scored),
        )
        for group, (runs, left_out), name, option in zip(groups, chosen, names, options, strict=True)
    ]
    return Benchmark(first.env, first.steps_per_task, first.tasks, scored, tuple(variants), about)


def _choose(group: RunGroup, tasks: Sequence[str]) -> tuple[tuple[RunData, ...], tuple[tuple[int, str], ...]]:
    """Choose the completed runs of a group with results of all tasks, the last of each seed; and list the seeds of the other runs."""
    found: dict[int, RunData] = {}
    left_out = []
    for run in group.runs:
        if run.status != "completed":
            left_out.append((run.seed, run.status))
        elif not tasks or not run.final_returns.keys() >= set(tasks):
            left_out.append((run.seed, NO_RESULTS))
        else:
            left_out += [(run.seed, SUPERSEDED)] if run.seed in found else []
            found[run.seed] = run
    return tuple(found.values()), tuple(left_out)


def _final(runs: Sequence[RunData], tasks: Sequence[str], scored: Sequence[str]) -> Floats:
    """Return the final results of R runs in some tasks, `[R, K]`: scores of scored tasks, else returns."""
    rows = [[(run.final_scores if task in scored else run.final_returns)[task] for task in tasks] for run in runs]
    return np.array(rows, float).reshape(len(runs), len(tasks))


def _parameters(group: RunGroup) -> Mapping[str, int]:
    return next((run.parameters for run in group.runs if run.parameters.get("total")), {})


# -- curves and costs -----------------------------------------------------------------------------------------------------------


def efficiency(benchmark: Benchmark, variant: Variant, baseline: Variant) -> Estimate | None:
    """Compute times fewer steps to the baseline's final score: over the scored tasks, or of a single task without scores.

    Returns None where there is no such task, or where the runs of a variant have no evaluation in common.
    """
    tasks = benchmark.scored or (benchmark.tasks if len(benchmark.tasks) == 1 else ())
    ours, theirs = (curves(each.runs, tasks, is_scored=bool(benchmark.scored)) for each in (variant, baseline))
    return None if ours is None or theirs is None else sharing_stats.data_efficiency(ours, theirs)


def curves(runs: Sequence[RunData], tasks: Sequence[str], *, is_scored: bool) -> tuple[Floats, Floats] | None:
    """Return validation curves: steps `[P]` and task means `[S, P]` of S runs, at the evaluations that all runs share.

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


def metric(variant: Variant, name: str, *, over_training: bool = False) -> float | None:
    """Return a metric's last value, or its mean over training: the mean over the runs that have it."""
    series = [[value for _, value in run.metrics[name]] for run in variant.runs if run.metrics.get(name)]
    return float(np.mean([np.mean(own) if over_training else own[-1] for own in series])) if series else None


def between_tasks(benchmark: Benchmark, variant: Variant, name: str) -> Floats | None:
    """Return a pairwise metric of tasks at the end, `[K, K]`: 1 on the diagonal, NaN where missing; None where it is missing for all."""
    table = np.full((len(benchmark.tasks), len(benchmark.tasks)), np.nan)
    for (a, one), (b, other) in itertools.combinations(enumerate(benchmark.tasks), 2):
        table[a, b] = table[b, a] = metric(variant, f"{name}/{one}~{other}")  # None becomes NaN
    if np.isnan(table).all():
        return None
    np.fill_diagonal(table, 1.0)
    return table


def routings(benchmark: Benchmark, variant: Variant) -> dict[str, Floats]:
    """Return the shares with which each gate routes each task at the end: by the gate's name, `[K, choices]`."""
    pattern = re.compile(rf"routing/(.+)/({'|'.join(map(re.escape, benchmark.tasks))})/([0-9]{{1,3}})")
    found: dict[str, dict[tuple[int, int], float | None]] = {}
    for match in filter(None, map(pattern.fullmatch, dict.fromkeys(name for run in variant.runs for name in run.metrics))):
        gate, task, choice = match.groups()
        found.setdefault(gate, {})[benchmark.tasks.index(task), int(choice)] = metric(variant, match[0])
    tables = {}
    for gate, shares in found.items():
        tables[gate] = np.full((len(benchmark.tasks), 1 + max(choice for _, choice in shares)), np.nan)
        for place, share in shares.items():
            tables[gate][place] = share
    return tables
