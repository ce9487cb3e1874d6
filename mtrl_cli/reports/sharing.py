"""Report sections on sharing structures and task weights, each compared with its baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from mtrl_cli.metric_names import GRAD_CONFLICT, GRAD_COSINE
from mtrl_cli.reports import comparison, grouping, sharing_plots
from mtrl_cli.reports.comparison import MAX_ABLATIONS, Benchmark, Variant, budget_seconds, step_seconds
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.run_data import RunGroup
from mtrl_cli.reports.wording import counted, some
from mtrl_cli.stats.bootstrap import Estimate
from mtrl_cli.stats.sharing import gain, nearest_size

Pairs = list[tuple[Variant, Variant]]
BASELINE, UNIFORM = "independent", "uniform"
TITLE, WEIGHTS_TITLE = "Sharing compared with independent networks", "Task weights compared with uniform weights"
ADVICE = "mtrl study sharing env=… trains all structures and independent networks at one size"
INTERVALS = (
    "In brackets: 95% bootstrap intervals of differences. Runs are resampled whole within each configuration, because the tasks of a run "
    "share one network. Runs with equal seeds are not paired."
)
EFFICIENCY = "Times fewer steps: the baseline's steps to its own final score over the structure's steps to that score; 0: not reached."
SAME_SIZE = (
    "Compared with independent networks, same total parameters",
    "sharing_same_size",
    f"No run with network/sharing={BASELINE} has the parameter count of another structure (within 5%): "
    "network.parameters=N equalises the counts.",
)
FULL_SIZE = (
    "Compared with one full network per task",
    "sharing_full",
    f"No run with network/sharing={BASELINE} has a larger network, such as one full network per task (network.parameters=null).",
)
"""The two kinds of comparison with independent networks: title, name of the files, and the line for a missing baseline."""


def sections(groups: Sequence[RunGroup]) -> list[Section]:
    """Return a section on sharing structures for each ablation, and those on task weights."""
    if not groups:
        return []
    found = comparison.ablations(groups, "network/sharing")
    compared = [each for each in found if len({variant.option for variant in each.variants}) > 1]
    if not compared:
        return [*_without_comparison(found), *_weights(groups)]
    shown = comparison.numbered(compared)
    made = [_sharing(each, _not_shown(found, compared) if each is shown[-1] else []) for each in shown]
    return [*made, *_weights(groups)]


def summary(groups: Sequence[RunGroup]) -> list[str]:
    """Return a line for a report whose runs all have the same sharing structure; [] for other reports."""
    options = {grouping.option("network/sharing", group.first) for group in groups}
    return [f"All runs have one sharing structure, {options.pop()}, so sharing is not compared: {ADVICE}."] if len(options) == 1 else []


def _not_shown(found: Sequence[Benchmark], compared: Sequence[Benchmark]) -> list[str]:
    lines = []
    if len(compared) > MAX_ABLATIONS:
        rest = [each.about for each in compared[MAX_ABLATIONS:]]
        lines.append(f"{len(rest)} more comparisons are not shown here: {some(rest, separator='; ')}.")
    alone = [f"{each.about or each.env} ({each.variants[0].option})" for each in found if each not in compared]
    if alone:
        lines.append(f"One structure only, so not compared: {some(alone, separator='; ')}.")
    return lines


def _without_comparison(found: Sequence[Benchmark]) -> list[Section]:
    """Return a section with the reason why structures are not compared, or with the diagnostics of a single structure."""
    if len({variant.option for ablation in found for variant in ablation.variants}) > 1:
        line = f"Runs with different structures also differ in tasks, budget or other values, so sharing is not compared. {ADVICE}."
        return [Section("sharing", TITLE, [line])]
    parts = _diagnostics(found[0]) if len(found) == 1 else []
    return [Section("diagnostics", "Gradients, features and routing", [], parts)] if parts else []


# -- sharing --------------------------------------------------------------------------------------------------------------------


def _sharing(ablation: Benchmark, notes: Sequence[str]) -> Section:
    lines = introduction(ablation)
    parts: list[Table | Picture] = [_results_table(ablation, f"sharing{ablation.suffix}", "structure")]
    baselines, structures = ablation.split(BASELINE)
    if not baselines:
        lines.append(f"No completed run has network/sharing={BASELINE}, the baseline, so sharing is not compared: {ADVICE}.")
    same, full = _pairs(ablation.compared, baselines)
    for (title, name, missing), pairs in ((SAME_SIZE, same), (FULL_SIZE, full)):
        if pairs:
            parts += _compared(ablation, pairs, title, f"{name}{ablation.suffix}")
            alone = [variant.name for variant in structures if all(variant is not ours for ours, _ in pairs)]
            lines += [f"{title}: no baseline of that size for {some(alone)}."] if alone else []
        elif baselines:
            lines.append(missing)
    parts += _diagnostics(ablation)
    return Section(f"sharing{ablation.anchor}", ablation.title(TITLE), [*lines, *notes], parts)


def _pairs(variants: Sequence[Variant], baselines: Sequence[Variant]) -> tuple[Pairs, Pairs]:
    """Return structures with the independent networks of the same size, and variants with the largest independent networks."""
    sizes = [variant.total or math.inf for variant in baselines]
    same, full = [], []
    for variant in variants:
        nearest = nearest_size(variant.total, sizes) if variant.total else None
        equal = None if nearest is None else baselines[nearest]
        largest = max((each for each in baselines if each is not equal), key=lambda each: each.total or 0, default=None)
        if equal is not None and variant.option != BASELINE:
            same.append((variant, equal))
        if largest is not None and largest is not variant and (variant.total is None or (largest.total or math.inf) > variant.total):
            full.append((variant, largest))
    return same, full


def introduction(ablation: Benchmark) -> list[str]:
    """Describe an ablation: tasks, budget, runs, and everything that limits the comparison."""
    seeds = {len(variant.runs) for variant in ablation.compared}
    runs = "no completed run" if not seeds else counted(min(seeds), "completed run")
    if len(seeds) > 1:
        runs = f"{min(seeds)} to {max(seeds)} completed runs"
    tasks = counted(len(ablation.tasks), "task")
    lines = [f"{ablation.env}, {tasks}, {ablation.steps:,} steps per task, {runs} of each configuration; all other values are equal."]
    lines += ablation.cautions()
    unscored = [task for task in ablation.tasks if task not in ablation.scored]
    if unscored and seeds:
        lines.append(f"Without reference scores, so compared by returns and in no mean over tasks: {some(unscored)}.")
    completed = [run for variant in ablation.compared for run in variant.runs]
    if any(run.test is None for run in completed):
        lines.append("Some runs have no test: their last validation is used.")
    keys = (*grouping.MACHINES, *grouping.RESOLVED_BY_MACHINE)
    machines = [key for key in keys if len({str(run.config.get(key)) for run in completed}) > 1]
    if machines:
        lines.append(f"The runs differ in {', '.join(machines)}: their times are not comparable.")
    left_out = [
        f"{variant.name}: {', '.join(f'seed {seed} ({reason})' for seed, reason in variant.left_out)}"
        for variant in ablation.variants
        if variant.left_out
    ]
    return [*lines, *([f"Left out: {some(left_out, 20, '; ')}."] if left_out else [])]


def _results_table(ablation: Benchmark, name: str, first: str) -> Table:
    header = [first, "runs", "score, mean", "score, IQM", "parameters", "shared", "own, each task", "ms per step", "budget, s"]
    rows: list[list[Cell]] = []
    for variant in ablation.compared:
        scores = [variant.aggregates.get("mean"), variant.aggregates.get("iqm")]
        own = [count for name, count in variant.parameters.items() if name not in ("total", "shared")]
        sizes = [variant.total, variant.parameters.get("shared"), round(sum(own) / len(own)) if own else None]
        step = step_seconds(variant)
        costs = [None if step is None else 1000 * step, budget_seconds(variant)]
        rows.append([variant.name, len(variant.runs), *scores, *sizes, *costs])
    notes = ["Milliseconds per training step of one task's environment; seconds of the whole budget with evaluating and saving."]
    return Table(name, "Results and cost", header, rows, notes)


def _compared(ablation: Benchmark, pairs: Pairs, title: str, name: str) -> list[Table | Picture]:
    """Return the differences of variants from their baselines over tasks and per task."""
    header = ["", "baseline", "score, mean", "score, IQM", "times fewer steps", "time per step", "training cost", "gained", "lost"]
    rows: list[list[Cell]] = []
    by_task: dict[str, Sequence[Estimate]] = {}
    changes = []
    for variant, baseline in pairs:
        over_tasks = gain(variant.scores_RK, baseline.scores_RK) if ablation.scored else None
        scores = [None, None] if over_tasks is None else [over_tasks.mean, over_tasks.iqm]
        steps = comparison.efficiency(ablation, variant, baseline)
        costs = [_ratio(of(variant), of(baseline)) for of in (step_seconds, budget_seconds)]
        by_task[variant.name] = tasks = gain(variant.results_RK, baseline.results_RK).tasks
        signs = list(zip(ablation.tasks, (each.sign for each in tasks), strict=True))
        gained, lost = (", ".join(task for task, own in signs if own == sign) for sign in (1, -1))
        rows.append([variant.name, baseline.name, *scores, steps, *costs, gained, lost])
        changes.append(f"{variant.name}: gained {gained or 'none'}; lost {lost or 'none'}")
    notes = [
        "Scores: differences from the baseline. Times and costs: ratios to the baseline's.",
        EFFICIENCY,
        INTERVALS,
        "Gained and lost: tasks whose whole interval lies above or below 0; without any effect this happens to 1 task in 20.",
    ]
    table = Table(name, title, header, rows, notes)
    units = [ablation.named(task) for task in ablation.tasks]
    of_tasks: list[list[Cell]] = [[variant, *estimates] for variant, estimates in by_task.items()]
    details = Table(f"{name}_tasks", f"{title}: per task", ["", *units], of_tasks, ["Differences of final scores from the baseline."])
    picture = Picture(
        f"{name}_transfer",
        f"{title}: tasks gained and lost",
        f"Differences from the baseline, a row for each variant and a column for each task. Significant: {'. '.join(changes)}.",
        partial(sharing_plots.differences, ablation, by_task),
        ["Framed and bold: the interval excludes 0."],
    )
    return [table, picture, details]


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


# -- diagnostics ----------------------------------------------------------------------------------------------------------------


def _diagnostics(ablation: Benchmark) -> list[Table | Picture]:
    """Return the tables and plots of gradient conflict, task routing and feature similarity."""
    variants, suffix = ablation.compared, ablation.suffix
    if len(ablation.tasks) == 1 or not variants:
        return []
    at_the_end = {
        "conflicting pairs, at the end": GRAD_CONFLICT,
        "gradient cosine, at the end": f"{GRAD_COSINE}/mean",
        "feature similarity (CKA)": "features/cka",
        "feature rank": "features/rank",
        "dormant neurons": "features/dormant",
    }
    header = ["", "conflicting pairs, over training", *at_the_end]
    rows: list[list[Cell]] = []
    for each in variants:
        ends = [comparison.metric(each, name) for name in at_the_end.values()]
        rows.append([each.name, comparison.metric(each, GRAD_CONFLICT, over_training=True), *ends])
    if all(cell is None for row in rows for cell in row[1:]):
        return []
    notes = [
        "Means over runs. Conflicting pairs: pairs of tasks whose gradients of the shared parameters have a negative cosine; independent "
        "networks have none.",
        "CKA: similarity of two tasks' features for the same observations; 1: equal up to rotation and scale.",
    ]
    parts: list[Table | Picture] = [Table(f"sharing_inside{suffix}", "Gradients and features", header, rows, notes)]
    conflicts = [variant for variant in variants if any(len(run.metrics.get(GRAD_CONFLICT, ())) > 1 for run in variant.runs)]
    if conflicts:
        text = "Share of task pairs with conflicting gradients over training, a line for each variant."
        draw = partial(sharing_plots.conflict, conflicts)
        parts.append(Picture(f"sharing_conflict{suffix}", "Gradient conflict over training", text, draw))
    for metric, name, title, text in (
        (GRAD_COSINE, "gradients", "Gradient cosines of task pairs at the end", "cosines of the tasks' gradients"),
        ("features/cka", "features", "Feature similarity of task pairs at the end", "CKA of the tasks' features"),
    ):
        tables = {each.name: table for each in variants if (table := comparison.between_tasks(ablation, each, metric)) is not None}
        if tables:
            draw = partial(sharing_plots.matrices, tables, ablation.tasks)
            parts.append(Picture(f"sharing_{name}{suffix}", title, f"A matrix of tasks by tasks for each variant: {text}.", draw))
    gates = {f"{each.name}: {name}": table for each in variants for name, table in comparison.routings(ablation, each).items()}
    if gates:
        text = "A matrix of tasks by choices for each gate: the share of a task's samples, or of its weight, that each choice gets."
        draw = partial(sharing_plots.matrices, gates, ablation.tasks, of_choices=True)
        parts.append(Picture(f"sharing_routing{suffix}", "Routing at the end", text, draw))
    return parts


# -- task weights ---------------------------------------------------------------------------------------------------------------


def _weights(groups: Sequence[RunGroup]) -> list[Section]:
    """Return a section for each ablation that has uniform and other task weights."""
    found = [ablation for ablation in comparison.ablations(groups, "task_weights") if all(ablation.split(UNIFORM))]
    return [_weights_section(ablation) for ablation in comparison.numbered(found)]


def _weights_section(ablation: Benchmark) -> Section:
    (baseline, *_), others = ablation.split(UNIFORM)
    parts = [
        _results_table(ablation, f"weights{ablation.suffix}", "task weights"),
        *_compared(ablation, [(each, baseline) for each in others], "Compared with uniform weights", f"weights_uniform{ablation.suffix}"),
    ]
    return Section(f"weights{ablation.anchor}", ablation.title(WEIGHTS_TITLE), introduction(ablation), parts)
