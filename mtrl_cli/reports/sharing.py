"""What sharing was worth: each structure beside networks that share nothing, of the same size in all or a full one for each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mtrl_cli.metric_names import GRAD_CONFLICT, GRAD_COSINE
from mtrl_cli.reports import grouping, sharing_comparison, sharing_plots
from mtrl_cli.reports import scores as report_scores
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.run_data import Group
from mtrl_cli.reports.sharing_comparison import Comparison, Setting, Way, at_the_end, over_training
from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats.sharing import nearest_size

BASELINE, UNIFORM = "independent", "uniform"
MOST_SETTINGS = 6
"""So many settings (such as learning rates) are compared on a page; the others are in its files by their scores."""
ADVICE = "mtrl study sharing env=… trains every structure at the same size, and networks that share nothing beside them"
INTERVALS = (
    "In brackets 95% bootstrap intervals of differences, for which runs are drawn whole, within each side: the tasks of a run were learned "
    "by one network, and equal seeds make no pairs of networks of different shapes."
)
EFFICIENCY = "Times fewer steps: the baseline's steps to the score that it ends with over our steps to the same; 0: never in this budget."


def sections(groups: Sequence[Group]) -> list[Section]:
    """The part of a report on sharing, and one on task weights where these differ; a section for each setting that is alike in all else.

    Runs that are not completed count nowhere, and are named.
    """
    if not any(group.runs for group in groups):
        return []
    settings = sharing_comparison.settings(groups, "network/sharing", sizes=True)
    compared = [each for each in settings if len({way.option for way in each.ways}) > 1]
    if compared:
        found = [_of_sharing(each, number) for number, each in enumerate(compared[:MOST_SETTINGS])]
        found[-1] = _with_lines(found[-1], _not_shown(settings, compared))
    else:
        found = _of_no_comparison(settings)
    return [*found, *_of_weights(groups)]


def _with_lines(section: Section, lines: Sequence[str]) -> Section:
    return Section(section.anchor, section.title, [*section.lines, *lines], section.parts)


def _not_shown(settings: Sequence[Setting], compared: Sequence[Setting]) -> list[str]:
    lines = []
    if len(compared) > MOST_SETTINGS:
        lines.append(
            f"{len(compared) - MOST_SETTINGS} more settings are not shown here: {_some([each.about for each in compared[MOST_SETTINGS:]])}."
        )
    alone = [f"{each.about or each.env} ({each.ways[0].option})" for each in settings if each not in compared]
    if alone:
        lines.append(f"With one structure only, and so nothing to compare: {_some(alone)}.")
    return lines


def _some(words: Sequence[str], most: int = 8) -> str:
    return "; ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


# -- sharing --------------------------------------------------------------------------------------------------------------------


def _of_sharing(setting: Setting, number: int) -> Section:
    ways = [way for way in setting.ways if way.runs]
    suffix = f"_{number + 1}" if number else ""
    lines = [*_introduction(setting), *_left_out(setting)]
    parts: list[Table | Picture] = [_table_of_ways(setting, ways, f"sharing{suffix}")]
    baselines = [way for way in ways if way.option == BASELINE]
    if not baselines:
        lines.append(f"No completed run has network/sharing={BASELINE}, so what sharing was worth cannot be told: {ADVICE}.")
    for title, name, pairs, missing in _pairs(ways, baselines):
        if pairs:
            parts += _beside(setting, [sharing_comparison.compare(setting, *pair) for pair in pairs], title, f"{name}{suffix}")
        elif baselines:
            lines.append(missing)
        alone = [way.name for way in ways if way.option != BASELINE and way not in [ours for ours, _ in pairs]]
        if pairs and alone:
            lines.append(f"{title}: not {_some(alone)}, as no such network is there to be beside.")
    parts += _inside(setting, ways, suffix)
    about = f": {setting.about}" if setting.about else ""
    return Section(f"sharing{suffix}".replace("_", "-"), f"What sharing was worth{about}", lines, parts)


def _pairs(ways: Sequence[Way], baselines: Sequence[Way]) -> list[tuple[str, str, list[tuple[Way, Way]], str]]:
    """Each kind of comparison: its title, the name of its files, each structure with its baseline, and what is said where there is none."""
    sizes = [way.total or math.inf for way in baselines]
    same, full = [], []
    for way in ways:
        nearest = nearest_size(way.total, sizes) if way.total else None
        of_same = None if nearest is None else baselines[nearest]
        largest = max((each for each in baselines if each is not of_same), key=lambda each: each.total or 0, default=None)
        if of_same is not None and way.option != BASELINE:
            same.append((way, of_same))
        if largest is not None and largest is not way and (way.total is None or (largest.total or math.inf) > way.total):
            full.append((way, largest))
    return [
        (
            "Beside networks that share nothing, of the same size in all",
            "sharing_same_size",
            same,
            f"No run with network/sharing={BASELINE} has as many parameters as a structure that shares (within 5%): "
            "network.parameters=… makes them alike.",
        ),
        (
            "Beside a full network for each task",
            "sharing_full",
            full,
            f"No run with network/sharing={BASELINE} has a larger network, such as a full one for each task: network.parameters=null "
            "gives that.",
        ),
    ]


def _introduction(setting: Setting) -> list[str]:
    ways = setting.ways
    seeds = {len(way.runs) for way in ways if way.runs}
    counts = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}" if seeds else "no"
    tasks = f"{len(setting.tasks)} tasks" if len(setting.tasks) > 1 else "one task"
    lines = [
        f"{setting.env}, {tasks}, {setting.steps:,} steps per task, {counts} completed {'run' if seeds == {1} else 'runs'} of each; "
        "all else is the same."
    ]
    if seeds and min(seeds) == 1:
        lines.append("Where there is one seed only, a difference may be chance alone: there is no interval, and nothing is marked.")
    elif seeds and min(seeds) < report_scores.FEW_SEEDS:
        lines.append(report_scores.few_seeds(min(seeds)))
    unscored = [task for task, known in zip(setting.tasks, setting.scored, strict=True) if not known]
    if unscored and any(way.runs for way in ways):
        lines.append(f"Without a reference, and so in no mean over tasks: {_some(unscored)}; told by their returns.")
    if not all(way.is_tested for way in ways if way.runs):
        lines.append("Some runs have no test: their last validation stands for it.")
    runs = [run for way in ways for run in way.runs]
    settled = (*grouping.MACHINES, *grouping.SETTLED)
    machines = [key for key in settled if len({str(run.config.get(key)) for run in runs}) > 1]
    if machines:
        lines.append(f"The runs differ in {', '.join(machines)}: their times do not compare.")
    return lines


def _left_out(setting: Setting) -> list[str]:
    own = [f"{way.name}: {', '.join(way.left_out)}" for way in setting.ways if way.left_out]
    return [f"Left out: {_some(own, 20)}."] if own else []


def _table_of_ways(setting: Setting, ways: Sequence[Way], name: str) -> Table:
    """What each came to, and what it took."""
    first = "structure" if name.startswith("sharing") else "task weights"
    header = [first, "runs", "score, mean", "score, IQM", "parameters", "shared", "own, each task", "ms per step", "budget, s"]
    scored = [k for k, known in enumerate(setting.scored) if known]
    rows: list[list[Cell]] = []
    for way in ways:
        aggregates = score_stats.aggregates(way.scores_SK[:, scored]) if scored else {}
        step, own = sharing_comparison.step_seconds(way), None if way.own is None else round(way.own)
        cost = sharing_comparison.budget_seconds(way)
        rows.append(
            [
                way.name,
                len(way.runs),
                aggregates.get("mean"),
                aggregates.get("iqm"),
                way.total,
                way.shared,
                own,
                None if step is None else 1000 * step,
                cost,
            ]
        )
    notes = ["Milliseconds of a step in one task's environment while training; seconds of the whole budget with evaluating and saving."]
    return Table(name, "What each came to, and what it took", header, rows, notes)


def _beside(setting: Setting, compared: Sequence[Comparison], title: str, name: str) -> list[Table | Picture]:
    """Each way beside its baseline: over tasks, and task by task."""
    header = ["", "beside", "score, mean", "score, IQM", "times fewer steps", "time per step", "training cost", "gained", "lost"]
    rows: list[list[Cell]] = []
    for each in compared:
        gained, lost = (_named(setting, each, sign) for sign in (1, -1))
        over_tasks = [each.mean, each.iqm, each.efficiency]
        rows.append([each.way.name, each.baseline.name, *over_tasks, each.time, each.cost, gained, lost])
    notes = ["Scores: differences, ours less the baseline's. Times and costs: ours over the baseline's.", EFFICIENCY, INTERVALS]
    notes.append(
        "Gained and lost: the tasks whose whole interval lies above or below 0; of 20 that nothing has changed in, one does by chance."
    )
    table = Table(name, title, header, rows, notes)
    by_task: list[list[Cell]] = [[each.way.name, *each.tasks] for each in compared]
    units = [task if known else f"{task} (return)" for task, known in zip(setting.tasks, setting.scored, strict=True)]
    tasks = Table(
        f"{name}_tasks", f"{title}: task by task", ["", *units], by_task, ["Differences of final scores, ours less the baseline's."]
    )
    picture = Picture(
        f"{name}_transfer",
        f"{title}: which tasks gained, which lost",
        _in_words(setting, compared),
        lambda: sharing_plots.transfer(setting, compared),
        ["Framed and bold where the interval excludes 0."],
    )
    return [table, picture, tasks]


def _named(setting: Setting, compared: Comparison, sign: int) -> str:
    return ", ".join(task for task, own in zip(setting.tasks, compared.tasks, strict=True) if own.sign == sign)


def _in_words(setting: Setting, compared: Sequence[Comparison]) -> str:
    told = []
    for each in compared:
        gained, lost = (_named(setting, each, sign) or "none" for sign in (1, -1))
        told.append(f"{each.way.name}: gained {gained}; lost {lost}")
    return f"A table of differences, a row for each way and a column for each task. For certain: {'. '.join(told)}."


# -- what is inside -------------------------------------------------------------------------------------------------------------


def _inside(setting: Setting, ways: Sequence[Way], suffix: str) -> list[Table | Picture]:
    """How gradients agree, how tasks are routed, and how alike their features are."""
    if len(setting.tasks) == 1 or not ways:
        return []
    parts: list[Table | Picture] = []
    columns: dict[str, Callable[[Way], float | None]] = {
        "pairs in conflict, over training": lambda way: over_training(way, GRAD_CONFLICT),
        "at the end": lambda way: at_the_end(way, GRAD_CONFLICT),
        "cosine of gradients, at the end": lambda way: at_the_end(way, f"{GRAD_COSINE}/mean"),
        "similarity of features (CKA)": lambda way: at_the_end(way, "features/cka"),
        "rank of features": lambda way: at_the_end(way, "features/rank"),
        "dormant neurons": lambda way: at_the_end(way, "features/dormant"),
    }
    rows: list[list[Cell]] = [[way.name, *(read(way) for read in columns.values())] for way in ways]
    if all(cell is None for row in rows for cell in row[1:]):
        return []
    notes = [
        "Means over runs. In conflict: gradients of two tasks, over the parameters that they share, with a negative cosine; networks that "
        "share nothing have none.",
        "CKA: of the features that two tasks' paths make of the same observations, 1: the same but for rotation and scale.",
    ]
    parts.append(Table(f"sharing_inside{suffix}", "Inside the networks", ["", *columns], rows, notes))
    in_conflict = [way for way in ways if any(len(run.metrics.get(GRAD_CONFLICT, ())) > 1 for run in way.runs)]
    if in_conflict:
        text = "Lines of the share of pairs of tasks whose gradients are in conflict, over training, one for each way."
        parts.append(
            Picture(f"sharing_conflict{suffix}", "Conflict over training", text, lambda: sharing_plots.conflict(setting, in_conflict))
        )
    for metric, name, title, text in (
        (GRAD_COSINE, "gradients", "Agreement of the tasks' gradients at the end", "cosines of the tasks' gradients"),
        ("features/cka", "features", "Similarity of the tasks' features at the end", "CKA of the tasks' features"),
    ):
        tables = {way.name: table for way in ways if (table := sharing_comparison.between_tasks(setting, way, metric)) is not None}
        if tables:
            draw = _drawing(lambda own: sharing_plots.between_tasks(setting, own), tables)
            parts.append(Picture(f"sharing_{name}{suffix}", title, f"For each way a table of tasks by tasks with the {text}.", draw))
    return parts + _routing(setting, ways, suffix)


def _routing(setting: Setting, ways: Sequence[Way], suffix: str) -> list[Table | Picture]:
    gates = {f"{way.name}: {name}": table for way in ways for name, table in sharing_comparison.routings(setting, way).items()}
    if not gates:
        return []
    text = "For each gate a table of tasks by choices: the share of a task's samples, or of its weight, that goes to each."
    draw = _drawing(lambda own: sharing_plots.routing(setting, own), gates)
    return [Picture(f"sharing_routing{suffix}", "How tasks are routed at the end", text, draw)]


def _drawing(draw: Callable, tables: object) -> Callable:  # type: ignore[type-arg]
    return lambda: draw(tables)


def in_short(groups: Sequence[Group]) -> list[str]:
    """For the summary: that all runs share alike, so that a report has no part on what sharing was worth."""
    options = {grouping.option("network/sharing", group.first) for group in groups}
    return (
        [f"All have one sharing structure, {options.pop()}, so nothing tells what sharing was worth: {ADVICE}."]
        if len(options) == 1
        else []
    )


def _of_no_comparison(settings: Sequence[Setting]) -> list[Section]:
    """A report without two structures in one setting: that is said where there are several at all, and else what is inside the one."""
    if len({way.option for setting in settings for way in setting.ways}) > 1:
        line = f"Structures differ only where tasks, budgets or other values do, too: there is nothing to compare. {ADVICE}."
        return [Section("sharing", "What sharing was worth", [line])]
    parts = _inside(settings[0], [way for way in settings[0].ways if way.runs], "") if len(settings) == 1 else []
    return [Section("inside", "Inside the networks", [], parts)] if parts else []


# -- task weights ---------------------------------------------------------------------------------------------------------------


def _of_weights(groups: Sequence[Group]) -> list[Section]:
    """Task weights beside uniform ones, in each setting in which there are both."""
    found: list[Section] = []
    for setting in sharing_comparison.settings(groups, "task_weights", sizes=False):
        ways = [way for way in setting.ways if way.runs]
        baseline = next((way for way in ways if way.option == UNIFORM), None)
        others = [way for way in ways if way.option != UNIFORM]
        if baseline is None or not others or len(found) == MOST_SETTINGS:
            continue
        suffix = f"_{len(found) + 1}" if found else ""
        compared = [sharing_comparison.compare(setting, way, baseline) for way in others]
        parts = [
            _table_of_ways(setting, ways, f"weights{suffix}"),
            *_beside(setting, compared, "Beside uniform weights", f"weights_uniform{suffix}"),
        ]
        about = f": {setting.about}" if setting.about else ""
        anchor, title = f"weights{suffix}".replace("_", "-"), f"What task weights were worth{about}"
        found.append(Section(anchor, title, [*_introduction(setting), *_left_out(setting)], parts))
    return found
