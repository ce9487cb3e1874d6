"""A report's first part: what each configuration scores, per task and over tasks, how sure that is, and how fast it was learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mtrl_cli.reports import grouping, plots
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.plots import Curve
from mtrl_cli.reports.run_data import Group, Run
from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats.bootstrap import Estimate

Title = Callable[[str], str]
Row = list[Cell]
POINTS = 30  # of a learning curve over wall time
HEADINGS = {"iqm": "IQM", "mean": "mean", "median": "median", "optimality_gap": "optimality gap"}
MOST_PANELS = 60
FEW_SEEDS = 5
INTERVALS = "In brackets, and as bands: 95% stratified bootstrap intervals over seeds, which are drawn anew in each task."


@dataclass(frozen=True)
class Entry:
    """A group's completed runs, a seed each: R runs.

    Attributes:
        scores: of the tasks with a reference, [R, K].
        returns: of all tasks, [R, K].
    """

    label: str
    runs: tuple[Run, ...]
    scores: Any
    returns: Any

    @cached_property
    def aggregates(self) -> dict[str, Estimate]:
        """Aggregates over all runs and tasks with a reference, by name: `stats.scores.AGGREGATES`."""
        return score_stats.aggregates(self.scores)


@dataclass(frozen=True)
class Arena:
    """What may be compared: groups of the same tasks and the same budget, the best first.

    Attributes:
        scored: the tasks that have a reference.
        notes: what was left out, and why.
        suffix: of names, where a report has several.
    """

    env: str
    tasks: tuple[str, ...]
    steps_per_task: int
    scored: tuple[str, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    suffix: str
    colours: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In words: `minatar_pack (5 tasks), 100,000 steps per task`."""
        tasks = f"{len(self.tasks)} tasks" if len(self.tasks) != 1 else "1 task"
        return f"{self.env} ({tasks}), {self.steps_per_task:,} steps per task"


def arenas(groups: Sequence[Group]) -> list[Arena]:
    """The groups that may be compared with each other, in the order of their first; they may have no completed run."""
    found: dict[Any, list[Group]] = {}
    for group in groups:
        first = group.first
        found.setdefault((first.env, first.tasks, first.steps_per_task), []).append(group)
    several = len(found) > 1
    return [_arena(*of, groups=own, suffix=f"_{number}" if several else "") for number, (of, own) in enumerate(found.items(), 1)]


def _arena(env: str, tasks: tuple[str, ...], steps_per_task: int, *, groups: Sequence[Group], suffix: str) -> Arena:
    notes: list[str] = []
    chosen = {group.label: _chosen(group, tasks, notes) for group in groups}
    runs = [run for own in chosen.values() for run in own]
    scored = tuple(task for task in tasks if runs and all(task in run.final_scores for run in runs))
    entries = [
        Entry(
            label,
            own,
            np.array([[run.final_scores[task] for task in scored] for run in own], float).reshape(len(own), len(scored)),
            np.array([[run.final_returns[task] for task in tasks] for run in own], float).reshape(len(own), len(tasks)),
        )
        for label, own in chosen.items()
        if own
    ]
    untested = [run for run in runs if not run.is_tested]
    if untested and len(untested) < len(runs):
        notes.append(f"{len(untested)} of {len(runs)} runs were not tested at the end: theirs are the scores of their last validation.")
    elif untested:
        notes.append("No run was tested at its end: scores are those of the last validation.")
    entries.sort(key=lambda entry: -entry.aggregates["iqm"].value if scored else 0.0)
    colours = plots.colours([entry.label for entry in entries])
    return Arena(env, tasks, steps_per_task, scored, tuple(entries), tuple(notes), suffix, colours)


def _chosen(group: Group, tasks: Sequence[str], notes: list[str]) -> tuple[Run, ...]:
    """The runs of a group that count; `notes` take why others do not."""
    chosen = grouping.chosen(group, tasks)
    if chosen.untold:
        notes.append(f"{group.label}: {len(chosen.untold)} completed runs have no results of all their tasks, and are left out.")
    if chosen.again:
        notes.append(f"{group.label}: seeds that were run more than once count once.")
    return chosen.runs


def sections(groups: Sequence[Group]) -> list[Section]:
    """The sections of scores, for each set of groups that may be compared."""
    found: list[Section] = []
    for arena in arenas(groups):
        title = (lambda of, arena=arena: f"{of}: {arena.name}") if arena.suffix else (lambda of: of)
        if not arena.entries:
            lines = ("No run is completed yet: there is nothing to compare. The runs below tell how far each is.", *arena.notes)
            found.append(Section(f"scores{arena.suffix}", title("Scores"), lines))
            continue
        found += [_over_tasks(arena, title), _per_task(arena, title), *_comparisons(arena, title), *_curves(arena, title)]
    return found


# -- over tasks, and per task ---------------------------------------------------------------------------------------------------


def _over_tasks(arena: Arena, title: Title) -> Section:
    lines = [_best_in_words(arena), *_about_seeds(arena), *arena.notes]
    anchor = f"scores{arena.suffix}"
    if not arena.scored:
        return Section(anchor, title("Scores over tasks"), lines)
    without = [task for task in arena.tasks if task not in arena.scored]
    if without:
        lines.append(f"Only tasks with a reference count here; none is known for {', '.join(without)}, whose returns are below.")
    rows: list[Row] = []
    values: dict[str, dict[str, Estimate]] = {heading: {} for heading in HEADINGS.values()}
    for entry in arena.entries:
        rows.append([entry.label, len(entry.runs), *(entry.aggregates[name] for name in HEADINGS)])
        for name, heading in HEADINGS.items():
            values[heading][entry.label] = entry.aggregates[name]
    notes = [
        "Scores are normalised: 0 is random play, 1 the reference. IQM: the mean of the middle half of all scores, of every seed and task. "
        "Optimality gap: how far scores are below 1 on average; less is better.",
        *([INTERVALS] if any(len(entry.runs) > 1 for entry in arena.entries) else []),
    ]
    table = Table(f"scores_over_tasks{arena.suffix}", "Over tasks, in numbers", ["configuration", "seeds", *HEADINGS.values()], rows, notes)
    picture = Picture(
        f"scores_over_tasks_picture{arena.suffix}",
        "IQM, mean, median and optimality gap",
        f"Dots with intervals, a row for each configuration, a panel for each aggregate. {_best_in_words(arena)}",
        lambda: plots.dots(values, arena.colours, None),
        _left_out(arena, plots.MOST_ROWS),
    )
    return Section(anchor, title("Scores over tasks"), lines, [picture, table])


def _best_in_words(arena: Arena) -> str:
    count = len(arena.entries)
    if not arena.scored:
        return "No reference is known for these tasks, so there are returns, and nothing is said over tasks."
    best = arena.entries[0]
    tested = [run.is_tested for entry in arena.entries for run in entry.runs]
    games = "test games" if all(tested) else "test games or, of runs without, the last validation" if any(tested) else "the last validation"
    over = f"of {best.aggregates['iqm'].value:.3f} over {_tasks(len(arena.scored))}"
    if count == 1:
        return f"Of the one configuration, {best.label}, runs are completed, with an interquartile mean (IQM) in {games} {over}."
    return f"Of {count:,} configurations {best.label} has the highest IQM in {games}, {over}.{_how_certain(arena)}"


def _how_certain(arena: Arena) -> str:
    """What is to be said of the order: intervals of few seeds say little, and some overlap that of the first."""
    best, *others = arena.entries
    if any(len(entry.runs) < FEW_SEEDS for entry in arena.entries):
        return f" With fewer than {FEW_SEEDS} seeds of some the order is not certain."
    low = best.aggregates["iqm"].low
    highs = {entry.label: entry.aggregates["iqm"].high for entry in others}
    overlap = [label for label, high in highs.items() if low is not None and high is not None and high >= low]
    return f" The order is not certain: intervals overlap with {_some(overlap)}." if overlap else ""


def _tasks(count: int) -> str:
    return f"{count} tasks" if count != 1 else "one task"


def _about_seeds(arena: Arena) -> list[str]:
    single = [entry.label for entry in arena.entries if len(entry.runs) == 1]
    if single and len(single) == len(arena.entries):
        return ["One seed of each configuration: there are no intervals, and a difference may be chance. Run more seeds (seed=range(5))."]
    lines = [f"One seed, so no interval: {_some(single)}."] if single else []
    if any(1 < len(entry.runs) < FEW_SEEDS for entry in arena.entries):
        lines.append(few_seeds(min(len(entry.runs) for entry in arena.entries if len(entry.runs) > 1)))
    return lines


def few_seeds(seeds: int) -> str:
    """What is said of intervals over fewer than `FEW_SEEDS` seeds."""
    return f"Intervals over {seeds} seeds say little, as they are too narrow: take them as a hint, and run {FEW_SEEDS} or more."


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _left_out(arena: Arena, most: int) -> list[str]:
    count = len(arena.entries)
    return [f"The best {most} of {count:,} configurations; the tables have all."] if count > most else []


def _grey(arena: Arena) -> list[str]:
    count = len(arena.entries)
    most = plots.MOST_LINES
    return [f"The best {most} of {count:,} configurations have a colour of their own."] if count > most else []


def _per_task(arena: Arena, title: Title) -> Section:
    parts = []
    for what, tasks in (("scores", arena.scored), ("returns", arena.tasks)):
        if not tasks:
            continue
        rows: list[Row] = [[entry.label, len(entry.runs), *score_stats.task_means(getattr(entry, what))] for entry in arena.entries]
        notes = ["Mean over seeds of the mean over games, in the environment's own units."] if what == "returns" else []
        parts.append(
            Table(f"{what}_per_task{arena.suffix}", f"{what.capitalize()}, task by task", ["configuration", "seeds", *tasks], rows, notes)
        )
    return Section(f"per_task{arena.suffix}", title("Scores per task" if arena.scored else "Returns per task"), [], parts)


# -- one against the other ------------------------------------------------------------------------------------------------------


def _comparisons(arena: Arena, title: Title) -> list[Section]:
    if not arena.scored:
        return []
    return [*([_improvement(arena, title)] if len(arena.entries) > 1 else []), _profiles(arena, title)]


def _improvement(arena: Arena, title: Title) -> Section:
    best, *others = arena.entries
    found = {entry.label: score_stats.probability_of_improvement(best.scores, entry.scores) for entry in others}
    text = f"How likely a run of {best.label} scores higher than one of another configuration, on average over tasks."
    name = f"probability_of_improvement{arena.suffix}"
    rows: list[Row] = [[label, probability] for label, probability in found.items()]
    table = Table(
        name, "Probability of improvement", ["over", f"of {best.label}"], rows, ["0.5: neither is better (Mann-Whitney, ties count half)."]
    )
    colours = {label: arena.colours[label] for label in found}
    picture = Picture(
        f"{name}_picture",
        f"How likely {best.label} is better",
        f"{text} Dots with intervals, a row for each other configuration; a dashed line at 0.5.",
        lambda: plots.dots({f"P({plots.short(best.label, 24)} is better)": found}, colours, 0.5),
        _left_out(arena, plots.MOST_ROWS),
    )
    return Section(f"improvement{arena.suffix}", title("Probability of improvement"), [text], [picture, table])


def _profiles(arena: Arena, title: Title) -> Section:
    scores = np.concatenate([entry.scores.ravel() for entry in arena.entries[: plots.MOST_LINES]])
    taus_T = np.linspace(min(0.0, float(scores.min())), max(1.0, float(scores.max())), 101)
    drawn = {}
    for index, entry in enumerate(arena.entries):
        band = (score_stats.profile_band(entry.scores, taus_T) if index < plots.MOST_LINES else None) or (None, None)
        drawn[entry.label] = Curve(taus_T, score_stats.profile(entry.scores, taus_T), *band)
    name = f"performance_profiles{arena.suffix}"
    taus = range(0, len(taus_T), 10)
    rows: list[Row] = [[label, *(float(curve.y[index]) for index in taus)] for label, curve in drawn.items()]
    table = Table(name, "Profiles in numbers", ["share of scores above", *(f"{taus_T[index]:.3g}" for index in taus)], rows)
    picture = Picture(
        f"{name}_picture",
        "Share of scores above a threshold",
        "For each configuration a falling line: which share of all runs and tasks scores more than what stands below. "
        "A line that is everywhere above another is better.",
        lambda: plots.lines({"": drawn}, arena.colours, "normalised score τ", "share of scores above τ"),
        _grey(arena),
    )
    line = "Which share of the scores, of every seed and task, is above each threshold: higher is better, and lines that cross say where."
    return Section(f"profiles{arena.suffix}", title("Performance profiles"), [line], [picture, table])


# -- learning curves ------------------------------------------------------------------------------------------------------------


def _curves(arena: Arena, title: Title) -> list[Section]:
    entries = [entry for entry in arena.entries if all(len(run.evaluations) > 1 for run in entry.runs)]
    anchor, heading = f"curves{arena.suffix}", title("Learning curves")
    if not entries:
        return [Section(anchor, heading, ["The runs were evaluated once, at their end (eval.every): there are no curves."])]
    parts: list[Picture | Table] = []
    if arena.scored:
        over = {
            kind: {entry.label: _over(entry, arena.scored, kind, index < plots.MOST_LINES) for index, entry in enumerate(entries)}
            for kind in ("step", "seconds")
        }
        parts += [_curve_picture(arena, over["step"], "steps per task"), _curve_picture(arena, over["seconds"], "wall time", time=True)]
    tasks = arena.tasks[:MOST_PANELS]
    units = {task: "score" if task in arena.scored else "return" for task in tasks}
    drawn = entries[: plots.MOST_LINES]
    panels = {task: {entry.label: _over(entry, (task,), "step", True) for entry in drawn} for task in tasks}
    if len(tasks) > 1 or not arena.scored:
        parts.append(
            Picture(
                f"curves_per_task{arena.suffix}",
                "Each task",
                f"A panel for each task, with a line for each configuration over steps per task: {', '.join(tasks)}.",
                lambda: plots.lines(panels, arena.colours, "steps per task", units),
                [*_left_out(arena, plots.MOST_LINES), *([f"The first {MOST_PANELS} tasks."] if len(arena.tasks) > MOST_PANELS else [])],
            )
        )
    if arena.scored:
        parts.append(_curve_table(arena, over["step"]))
    lines = ["Validation during training. Wall time is that of each run's machine, with what evaluating and saving took."]
    if any(len(entry.runs) > 1 for entry in entries):
        lines.append("Bands: 95% bootstrap intervals over seeds, at each point for itself.")
    return [Section(anchor, heading, lines, parts)]


def _curve_picture(arena: Arena, over: Mapping[str, Curve], x: str, time: bool = False) -> Picture:
    return Picture(
        f"curves_over_{'time' if time else 'steps'}{arena.suffix}",
        f"Interquartile mean of validation scores over {x}",
        f"A line for each configuration, from left to right over {x}; bands are 95% intervals over seeds.",
        lambda: plots.lines({"": over}, arena.colours, x, "score (IQM)", time=time),
        _grey(arena),
    )


def _over(entry: Entry, tasks: Sequence[str], kind: str, has_band: bool) -> Curve:
    """The interquartile mean over an entry's runs and some tasks, over steps or seconds; of few runs and one task, the mean."""
    is_scored = all(task in run.final_scores for run in entry.runs for task in tasks)
    xs = [np.array([getattr(each, kind) for each in run.evaluations], float) for run in entry.runs]
    x_P = xs[0] if kind == "step" and all(np.array_equal(x, xs[0]) for x in xs) else _grid(xs)
    values = [
        [np.interp(x_P, x, [_value(each, task, is_scored) for each in run.evaluations]) for task in tasks]
        for run, x in zip(entry.runs, xs, strict=True)
    ]
    values_RKP = np.array(values)
    return Curve(x_P, score_stats.curve(values_RKP), *((score_stats.curve_band(values_RKP) if has_band else None) or (None, None)))


def _grid(xs: Sequence[Any]) -> Any:
    """Points that lie within all runs."""
    first, last = max(float(x[0]) for x in xs), min(float(x[-1]) for x in xs)
    return np.linspace(first, max(first, last), POINTS)


def _value(each: Any, task: str, is_scored: bool) -> float:
    return (each.scores if is_scored else each.returns).get(task, float("nan"))


def _curve_table(arena: Arena, over: Mapping[str, Curve]) -> Table:
    rows: list[Row] = [
        [
            label,
            int(step),
            Estimate(float(curve.y[index]), *(() if curve.low is None else (float(curve.low[index]), float(curve.high[index])))),
        ]
        for label, curve in over.items()
        for index, step in enumerate(curve.x)
    ]
    return Table(f"learning_curves{arena.suffix}", "Learning curves in numbers", ["configuration", "step per task", "score (IQM)"], rows)
