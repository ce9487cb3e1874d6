"""Report sections on sharing structures and task weights, each compared with its baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from mtrl_cli.metric_names import GRAD_CONFLICT, GRAD_COSINE
from mtrl_cli.reports import comparison, grouping, sharing_plots
from mtrl_cli.reports.comparison import Ablation, Comparison, Variant, at_the_end, over_training
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.run_data import RunGroup
from mtrl_cli.reports.wording import FEW_SEEDS, counted, few_seeds, some, titled
from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats.sharing import nearest_size

BASELINE, UNIFORM = "independent", "uniform"
MAX_ABLATIONS = 6
"""Ablations (such as one per learning rate) on a page; all runs are in its tables of scores."""
TITLE, WEIGHTS_TITLE = "Sharing compared with independent networks", "Task weights compared with uniform weights"
ADVICE = "mtrl study sharing env=… trains all structures and independent networks at one size"
INTERVALS = (
    "In brackets: 95% bootstrap intervals of differences. Runs are resampled whole within each configuration: the tasks of a run share one "
    "network, and runs of equal seeds are no pairs."
)
EFFICIENCY = "Times fewer steps: the baseline's steps to its own final score over the structure's steps to that score; 0: not reached."


def sections(groups: Sequence[RunGroup]) -> list[Section]:
    """Return a section on sharing structures for each ablation, and those on task weights."""
    if not any(group.runs for group in groups):
        return []
    found = comparison.ablations(groups, "network/sharing")
    compared = [each for each in found if len({variant.option for variant in each.variants}) > 1]
    if not compared:
        return [*_without_comparison(found), *_weights(groups)]
    made = [_sharing(each, number) for number, each in enumerate(compared[:MAX_ABLATIONS])]
    last = made.pop()
    made.append(Section(last.anchor, last.title, [*last.lines, *_not_shown(found, compared)], last.parts))
    return [*made, *_weights(groups)]


def summary(groups: Sequence[RunGroup]) -> list[str]:
    """Return a line for a report whose runs all have one sharing structure, so that it compares none."""
    options = {grouping.option("network/sharing", group.first) for group in groups}
    return [f"All runs have one sharing structure, {options.pop()}, so sharing is not compared: {ADVICE}."] if len(options) == 1 else []


def _not_shown(found: Sequence[Ablation], compared: Sequence[Ablation]) -> list[str]:
    lines = []
    if len(compared) > MAX_ABLATIONS:
        rest = [each.about for each in compared[MAX_ABLATIONS:]]
        lines.append(f"{len(rest)} more comparisons are not shown here: {some(rest, separator='; ')}.")
    alone = [f"{each.about or each.env} ({each.variants[0].option})" for each in found if each not in compared]
    if alone:
        lines.append(f"One structure only, so not compared: {some(alone, separator='; ')}.")
    return lines


def _without_comparison(found: Sequence[Ablation]) -> list[Section]:
    """Explain why structures are not compared, or show the diagnostics of the only one."""
    if len({variant.option for ablation in found for variant in ablation.variants}) > 1:
        line = f"Runs with different structures also differ in tasks, budget or other values, so sharing is not compared. {ADVICE}."
        return [Section("sharing", TITLE, [line])]
    parts = _diagnostics(found[0], [variant for variant in found[0].variants if variant.runs], "") if len(found) == 1 else []
    return [Section("diagnostics", "Gradients, features and routing", [], parts)] if parts else []


# -- sharing --------------------------------------------------------------------------------------------------------------------


def _sharing(ablation: Ablation, number: int) -> Section:
    variants = [variant for variant in ablation.variants if variant.runs]
    suffix = f"_{number + 1}" if number else ""
    lines = introduction(ablation)
    parts: list[Table | Picture] = [_results_table(ablation, variants, f"sharing{suffix}", "structure")]
    baselines = [variant for variant in variants if variant.option == BASELINE]
    if not baselines:
        lines.append(f"No completed run has network/sharing={BASELINE}, the baseline, so sharing is not compared: {ADVICE}.")
    for title, name, pairs, missing in _pairs(variants, baselines):
        if pairs:
            parts += _compared(ablation, [comparison.compare(ablation, *pair) for pair in pairs], title, f"{name}{suffix}")
        elif baselines:
            lines.append(missing)
        alone = [variant.name for variant in variants if variant.option != BASELINE and variant not in [ours for ours, _ in pairs]]
        if pairs and alone:
            lines.append(f"{title}: no baseline of that size for {some(alone)}.")
    parts += _diagnostics(ablation, variants, suffix)
    return Section(f"sharing{suffix}".replace("_", "-"), titled(TITLE, ablation.about), lines, parts)


def _pairs(variants: Sequence[Variant], baselines: Sequence[Variant]) -> list[tuple[str, str, list[tuple[Variant, Variant]], str]]:
    """Return each kind of comparison: title, file name, each structure with its baseline, and the line for where there is no baseline."""
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
    return [
        (
            "Compared with independent networks, same total parameters",
            "sharing_same_size",
            same,
            f"No run with network/sharing={BASELINE} has the parameter count of another structure (within 5%): "
            "network.parameters=N equalises them.",
        ),
        (
            "Compared with one full network per task",
            "sharing_full",
            full,
            f"No run with network/sharing={BASELINE} has a larger network, such as one full network per task (network.parameters=null).",
        ),
    ]


def introduction(ablation: Ablation) -> list[str]:
    """Describe an ablation: tasks, budget, runs, and everything that limits the comparison."""
    variants = [variant for variant in ablation.variants if variant.runs]
    seeds = {len(variant.runs) for variant in variants}
    runs = "no completed run" if not seeds else counted(min(seeds), "completed run")
    if len(seeds) > 1:
        runs = f"{min(seeds)} to {max(seeds)} completed runs"
    tasks = counted(len(ablation.tasks), "task")
    lines = [f"{ablation.env}, {tasks}, {ablation.steps:,} steps per task, {runs} of each configuration; all other values are equal."]
    if seeds and min(seeds) == 1:
        lines.append("With one seed a difference may be chance alone: there is no interval, and no task counts as gained or lost.")
    elif seeds and min(seeds) < FEW_SEEDS:
        lines.append(few_seeds(min(seeds)))
    unscored = [task for task in ablation.tasks if task not in ablation.scored_tasks]
    if unscored and variants:
        lines.append(f"Without reference scores, so compared by returns and in no mean over tasks: {some(unscored)}.")
    if not all(variant.is_tested for variant in variants):
        lines.append("Some runs have no test: their last validation is used.")
    configs = [run.config for variant in variants for run in variant.runs]
    machines = [key for key in (*grouping.MACHINES, *grouping.SETTLED) if len({str(config.get(key)) for config in configs}) > 1]
    if machines:
        lines.append(f"The runs differ in {', '.join(machines)}: their times are not comparable.")
    left_out = [f"{variant.name}: {', '.join(variant.left_out)}" for variant in ablation.variants if variant.left_out]
    return [*lines, *([f"Left out: {some(left_out, 20, '; ')}."] if left_out else [])]


def _results_table(ablation: Ablation, variants: Sequence[Variant], name: str, first: str) -> Table:
    header = [first, "runs", "score, mean", "score, IQM", "parameters", "shared", "own, each task", "ms per step", "budget, s"]
    scored = [k for k, is_scored in enumerate(ablation.scored) if is_scored]
    rows: list[list[Cell]] = []
    for variant in variants:
        aggregates = score_stats.aggregates(variant.scores_SK[:, scored]) if scored else {}
        scores = [aggregates.get("mean"), aggregates.get("iqm")]
        step, own = comparison.step_seconds(variant), None if variant.own is None else round(variant.own)
        costs = [None if step is None else 1000 * step, comparison.budget_seconds(variant)]
        rows.append([variant.name, len(variant.runs), *scores, variant.total, variant.shared, own, *costs])
    notes = ["Milliseconds per training step of one task's environment; seconds of the whole budget with evaluating and saving."]
    return Table(name, "Results and cost", header, rows, notes)


def _compared(ablation: Ablation, compared: Sequence[Comparison], title: str, name: str) -> list[Table | Picture]:
    """Return the differences from the baseline over tasks and per task."""
    header = ["", "baseline", "score, mean", "score, IQM", "times fewer steps", "time per step", "training cost", "gained", "lost"]
    rows: list[list[Cell]] = []
    for each in compared:
        gained, lost = (_changed(ablation, each, sign) for sign in (1, -1))
        rows.append([each.variant.name, each.baseline.name, each.mean, each.iqm, each.efficiency, each.time, each.cost, gained, lost])
    notes = [
        "Scores: differences from the baseline. Times and costs: ratios to the baseline's.",
        EFFICIENCY,
        INTERVALS,
        "Gained and lost: tasks whose whole interval lies above or below 0; without any effect this happens to 1 task in 20.",
    ]
    table = Table(name, title, header, rows, notes)
    by_task: list[list[Cell]] = [[each.variant.name, *each.tasks] for each in compared]
    units = [ablation.named(task) for task in ablation.tasks]
    tasks = Table(f"{name}_tasks", f"{title}: per task", ["", *units], by_task, ["Differences of final scores from the baseline."])
    changes = [f"{row[0]}: gained {row[-2] or 'none'}; lost {row[-1] or 'none'}" for row in rows]
    picture = Picture(
        f"{name}_transfer",
        f"{title}: tasks gained and lost",
        f"Differences from the baseline, a row for each variant and a column for each task. Significant: {'. '.join(changes)}.",
        lambda: sharing_plots.transfer(ablation, compared),
        ["Framed and bold: the interval excludes 0."],
    )
    return [table, picture, tasks]


def _changed(ablation: Ablation, compared: Comparison, sign: int) -> str:
    return ", ".join(task for task, own in zip(ablation.tasks, compared.tasks, strict=True) if own.sign == sign)


# -- diagnostics ----------------------------------------------------------------------------------------------------------------


def _diagnostics(ablation: Ablation, variants: Sequence[Variant], suffix: str) -> list[Table | Picture]:
    """Return gradient conflict, routing of tasks and similarity of features."""
    if len(ablation.tasks) == 1 or not variants:
        return []
    columns: dict[str, Callable[[Variant], float | None]] = {
        "conflicting pairs, over training": lambda variant: over_training(variant, GRAD_CONFLICT),
        "conflicting pairs, at the end": lambda variant: at_the_end(variant, GRAD_CONFLICT),
        "gradient cosine, at the end": lambda variant: at_the_end(variant, f"{GRAD_COSINE}/mean"),
        "feature similarity (CKA)": lambda variant: at_the_end(variant, "features/cka"),
        "feature rank": lambda variant: at_the_end(variant, "features/rank"),
        "dormant neurons": lambda variant: at_the_end(variant, "features/dormant"),
    }
    rows: list[list[Cell]] = [[variant.name, *(read(variant) for read in columns.values())] for variant in variants]
    if all(cell is None for row in rows for cell in row[1:]):
        return []
    notes = [
        "Means over runs. Conflicting pairs: pairs of tasks whose gradients of the shared parameters have a negative cosine; independent "
        "networks have none.",
        "CKA: similarity of two tasks' features for the same observations; 1: equal up to rotation and scale.",
    ]
    parts: list[Table | Picture] = [Table(f"sharing_inside{suffix}", "Gradients and features", ["", *columns], rows, notes)]
    conflicts = [variant for variant in variants if any(len(run.metrics.get(GRAD_CONFLICT, ())) > 1 for run in variant.runs)]
    if conflicts:
        text = "Share of task pairs with conflicting gradients over training, a line for each variant."
        draw = partial(sharing_plots.conflict, ablation, conflicts)
        parts.append(Picture(f"sharing_conflict{suffix}", "Gradient conflict over training", text, draw))
    for metric, name, title, text in (
        (GRAD_COSINE, "gradients", "Gradient cosines of task pairs at the end", "cosines of the tasks' gradients"),
        ("features/cka", "features", "Feature similarity of task pairs at the end", "CKA of the tasks' features"),
    ):
        tables = {each.name: table for each in variants if (table := comparison.between_tasks(ablation, each, metric)) is not None}
        if tables:
            draw = partial(sharing_plots.between_tasks, ablation, tables)
            parts.append(Picture(f"sharing_{name}{suffix}", title, f"A matrix of tasks by tasks for each variant: {text}.", draw))
    gates = {f"{each.name}: {name}": table for each in variants for name, table in comparison.routings(ablation, each).items()}
    if gates:
        text = "A matrix of tasks by choices for each gate: the share of a task's samples, or of its weight, that each choice gets."
        parts.append(Picture(f"sharing_routing{suffix}", "Routing at the end", text, partial(sharing_plots.routing, ablation, gates)))
    return parts


# -- task weights ---------------------------------------------------------------------------------------------------------------


def _weights(groups: Sequence[RunGroup]) -> list[Section]:
    """Compare task weights with uniform ones, in each ablation that has both."""
    found: list[Section] = []
    for ablation in comparison.ablations(groups, "task_weights"):
        variants = [variant for variant in ablation.variants if variant.runs]
        baseline = next((variant for variant in variants if variant.option == UNIFORM), None)
        others = [variant for variant in variants if variant.option != UNIFORM]
        if baseline is None or not others or len(found) == MAX_ABLATIONS:
            continue
        suffix = f"_{len(found) + 1}" if found else ""
        compared = [comparison.compare(ablation, variant, baseline) for variant in others]
        parts = [
            _results_table(ablation, variants, f"weights{suffix}", "task weights"),
            *_compared(ablation, compared, "Compared with uniform weights", f"weights_uniform{suffix}"),
        ]
        found.append(Section(f"weights{suffix}".replace("_", "-"), titled(WEIGHTS_TITLE, ablation.about), introduction(ablation), parts))
    return found
