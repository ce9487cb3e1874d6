"""Report sections on scores: over tasks and per task, with intervals, comparisons and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from mtrl_cli.reports import grouping, plots
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.plots import Curve
from mtrl_cli.reports.run_data import Evaluation, RunData, RunGroup
from mtrl_cli.reports.wording import FEW_SEEDS, counted, few_seeds, some, titled
from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats.bootstrap import Estimate, Floats

Row = list[Cell]
POINTS = 30  # of a learning curve over wall time
HEADINGS = {"iqm": "IQM", "mean": "mean", "median": "median", "optimality_gap": "optimality gap"}
MAX_PANELS = 60
INTERVALS = "In brackets, and as bands: 95% stratified bootstrap intervals over seeds, which are resampled in each task independently."


@dataclass(frozen=True)
class Entry:
    """The completed runs of a group, one per seed: R runs.

    Attributes:
        scores: of the tasks with a reference, [R, K].
        returns: of all tasks, [R, K].
    """

    label: str
    runs: tuple[RunData, ...]
    scores: Floats
    returns: Floats

    @cached_property
    def aggregates(self) -> dict[str, Estimate]:
        """Aggregates over all runs and tasks with a reference, by name: `stats.scores.AGGREGATES`."""
        return score_stats.aggregates(self.scores)

    @property
    def iqm(self) -> float:
        """The interquartile mean."""
        return self.aggregates["iqm"].value


@dataclass(frozen=True)
class Benchmark:
    """Groups with the same tasks and budget, which can be compared, the best first.

    Attributes:
        scored: the tasks that have a reference.
        notes: on runs that were left out.
        suffix: of the names of tables and pictures, where a report has several benchmarks.
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
        """A name such as `minatar_pack (5 tasks), 100,000 steps per task`."""
        return f"{self.env} ({counted(len(self.tasks), 'task')}), {self.steps_per_task:,} steps per task"

    def title(self, text: str) -> str:
        """Add the benchmark's name to a section's title, where a report has several benchmarks."""
        return titled(text, self.name if self.suffix else "")


def benchmarks(groups: Sequence[RunGroup]) -> list[Benchmark]:
    """Put groups with the same tasks and budget together, in the order of their first; they may have no completed run."""
    found: dict[Any, list[RunGroup]] = {}
    for group in groups:
        first = group.first
        found.setdefault((first.env, first.tasks, first.steps_per_task), []).append(group)
    several = len(found) > 1
    return [_benchmark(*of, groups=own, suffix=f"_{number}" if several else "") for number, (of, own) in enumerate(found.items(), 1)]


def _benchmark(env: str, tasks: tuple[str, ...], steps_per_task: int, *, groups: Sequence[RunGroup], suffix: str) -> Benchmark:
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
        notes.append(f"{len(untested)} of {len(runs)} runs have no test: the scores of their last validation are used.")
    elif untested:
        notes.append("No run has a test: scores are those of the last validation.")
    entries.sort(key=lambda entry: -entry.iqm if scored else 0.0)
    colours = plots.colours([entry.label for entry in entries])
    return Benchmark(env, tasks, steps_per_task, scored, tuple(entries), tuple(notes), suffix, colours)


def _chosen(group: RunGroup, tasks: Sequence[str], notes: list[str]) -> tuple[RunData, ...]:
    """Return the runs of a group that are compared; `notes` takes why others are not."""
    chosen = grouping.chosen(group, tasks)
    if chosen.incomplete:
        notes.append(f"{group.label}: {counted(len(chosen.incomplete), 'completed run')} without results of all tasks left out.")
    if chosen.superseded:
        notes.append(f"{group.label}: of several runs of one seed, the last is used.")
    return chosen.runs


def sections(groups: Sequence[RunGroup]) -> list[Section]:
    """Return the sections on scores for each benchmark."""
    found: list[Section] = []
    for benchmark in benchmarks(groups):
        if benchmark.entries:
            found += [_over_tasks(benchmark), _per_task(benchmark), *_comparisons(benchmark), *_curves(benchmark)]
        else:
            lines = ("No run is completed yet, so there is nothing to compare. The last table shows how far each run is.", *benchmark.notes)
            found.append(Section(f"scores{benchmark.suffix}", benchmark.title("Scores"), lines))
    return found


# -- over tasks, and per task ---------------------------------------------------------------------------------------------------


def _over_tasks(benchmark: Benchmark) -> Section:
    suffix = benchmark.suffix
    lines = [_summary(benchmark), *_about_seeds(benchmark), *benchmark.notes]
    anchor, heading = f"scores{suffix}", benchmark.title("Scores over tasks")
    if not benchmark.scored:
        return Section(anchor, heading, lines)
    without = [task for task in benchmark.tasks if task not in benchmark.scored]
    if without:
        lines.append(f"Only tasks with a reference are aggregated; without one, shown below by their returns: {some(without)}.")
    rows: list[Row] = [[entry.label, len(entry.runs), *(entry.aggregates[name] for name in HEADINGS)] for entry in benchmark.entries]
    values = {heading: {entry.label: entry.aggregates[name] for entry in benchmark.entries} for name, heading in HEADINGS.items()}
    notes = [
        "Scores are normalised: 0 is random play, 1 the reference. IQM: the mean of the middle half of all scores, of every seed and task. "
        "Optimality gap: the mean distance of scores below 1; less is better.",
        *([INTERVALS] if any(len(entry.runs) > 1 for entry in benchmark.entries) else []),
    ]
    table = Table(f"scores_over_tasks{suffix}", "Aggregate scores", ["configuration", "seeds", *HEADINGS.values()], rows, notes)
    picture = Picture(
        f"scores_over_tasks_picture{suffix}",
        "IQM, mean, median and optimality gap",
        f"Dots with intervals, a row for each configuration, a panel for each aggregate. {_summary(benchmark)}",
        partial(plots.dots, values, benchmark.colours, None),
        _shown_of(benchmark, plots.MOST_ROWS),
    )
    return Section(anchor, heading, lines, [picture, table])


def _summary(benchmark: Benchmark) -> str:
    if not benchmark.scored:
        return "No reference is known for these tasks: they are compared by returns, and not aggregated over tasks."
    best, count = benchmark.entries[0], len(benchmark.entries)
    tested = [run.is_tested for entry in benchmark.entries for run in entry.runs]
    source = "test episodes" if all(tested) else "test episodes or the last validation" if any(tested) else "the last validation"
    over = f"{best.iqm:.3f} over {counted(len(benchmark.scored), 'task')}"
    if count == 1:
        return f"One configuration, {best.label}, has completed runs; its interquartile mean (IQM) in {source} is {over}."
    return f"Of {count:,} configurations {best.label} has the highest IQM in {source}, {over}.{_certainty(benchmark)}"


def _certainty(benchmark: Benchmark) -> str:
    """Return a caution about the order, where seeds are few or intervals overlap with the best one's."""
    best, *others = benchmark.entries
    if any(len(entry.runs) < FEW_SEEDS for entry in benchmark.entries):
        return f" The order is not certain: some have fewer than {FEW_SEEDS} seeds."
    low = best.aggregates["iqm"].low
    highs = {entry.label: entry.aggregates["iqm"].high for entry in others}
    overlap = [label for label, high in highs.items() if low is not None and high is not None and high >= low]
    return f" The order is not certain: intervals overlap with {some(overlap)}." if overlap else ""


def _about_seeds(benchmark: Benchmark) -> list[str]:
    single = [entry.label for entry in benchmark.entries if len(entry.runs) == 1]
    if single and len(single) == len(benchmark.entries):
        return ["One seed of each configuration: there are no intervals, and a difference may be chance. Run more seeds (seed=range(5))."]
    lines = [f"One seed, so no interval: {some(single)}."] if single else []
    several = [len(entry.runs) for entry in benchmark.entries if len(entry.runs) > 1]
    return [*lines, *([few_seeds(min(several))] if several and min(several) < FEW_SEEDS else [])]


def _shown_of(
    benchmark: Benchmark, most: int, what: str = "The best {most} of {count:,} configurations; the tables have all."
) -> list[str]:
    count = len(benchmark.entries)
    return [what.format(most=most, count=count)] if count > most else []


def _coloured_of(benchmark: Benchmark) -> list[str]:
    return _shown_of(benchmark, plots.MOST_LINES, "The best {most} of {count:,} configurations have a colour of their own.")


def _per_task(benchmark: Benchmark) -> Section:
    parts = []
    for what, tasks in (("scores", benchmark.scored), ("returns", benchmark.tasks)):
        if tasks:
            rows: list[Row] = [[each.label, len(each.runs), *score_stats.task_means(getattr(each, what))] for each in benchmark.entries]
            notes = ["Means over seeds of the mean over episodes, in the environment's own units."] if what == "returns" else []
            header = ["configuration", "seeds", *tasks]
            parts.append(Table(f"{what}_per_task{benchmark.suffix}", f"{what.capitalize()} per task", header, rows, notes))
    title = "Scores per task" if benchmark.scored else "Returns per task"
    return Section(f"per_task{benchmark.suffix}", benchmark.title(title), [], parts)


# -- comparisons ----------------------------------------------------------------------------------------------------------------


def _comparisons(benchmark: Benchmark) -> list[Section]:
    if not benchmark.scored:
        return []
    return [*([_improvement(benchmark)] if len(benchmark.entries) > 1 else []), _profiles(benchmark)]


def _improvement(benchmark: Benchmark) -> Section:
    best, *others = benchmark.entries
    found = {entry.label: score_stats.probability_of_improvement(best.scores, entry.scores) for entry in others}
    text = f"Probability that a run of {best.label} scores higher than one of another configuration, on average over tasks."
    name, title = f"probability_of_improvement{benchmark.suffix}", "Probability of improvement"
    rows: list[Row] = [[label, probability] for label, probability in found.items()]
    table = Table(name, title, ["over", f"of {best.label}"], rows, ["0.5: neither is better (Mann-Whitney, ties count half)."])
    panels = {f"P({plots.short(best.label, 24)} is better)": found}
    picture = Picture(
        f"{name}_picture",
        f"{title} of {best.label}",
        f"{text} Dots with intervals, a row for each other configuration; a dashed line at 0.5.",
        partial(plots.dots, panels, {label: benchmark.colours[label] for label in found}, 0.5),
        _shown_of(benchmark, plots.MOST_ROWS),
    )
    return Section(f"improvement{benchmark.suffix}", benchmark.title(title), [text], [picture, table])


def _profiles(benchmark: Benchmark) -> Section:
    scores = np.concatenate([entry.scores.ravel() for entry in benchmark.entries[: plots.MOST_LINES]])
    taus_T = np.linspace(min(0.0, float(scores.min())), max(1.0, float(scores.max())), 101)
    drawn = {}
    for index, entry in enumerate(benchmark.entries):
        band = (score_stats.profile_band(entry.scores, taus_T) if index < plots.MOST_LINES else None) or (None, None)
        drawn[entry.label] = Curve(taus_T, score_stats.profile(entry.scores, taus_T), *band)
    name = f"performance_profiles{benchmark.suffix}"
    taus = range(0, len(taus_T), 10)
    rows: list[Row] = [[label, *(float(curve.y[index]) for index in taus)] for label, curve in drawn.items()]
    header = ["share of scores above", *(f"{taus_T[index]:.3g}" for index in taus)]
    picture = Picture(
        f"{name}_picture",
        "Share of scores above a threshold",
        "A falling line for each configuration: the share of the scores of all runs and tasks above the threshold on the x-axis. "
        "A line above another everywhere is better.",
        partial(plots.lines, {"": drawn}, benchmark.colours, "normalised score τ", "share of scores above τ"),
        _coloured_of(benchmark),
    )
    line = "The share of scores, of every seed and task, above each threshold: higher is better; where lines cross, neither is."
    table = Table(name, "Performance profiles", header, rows)
    return Section(f"profiles{benchmark.suffix}", benchmark.title("Performance profiles"), [line], [picture, table])


# -- learning curves ------------------------------------------------------------------------------------------------------------


def _curves(benchmark: Benchmark) -> list[Section]:
    entries = [entry for entry in benchmark.entries if all(len(run.evaluations) > 1 for run in entry.runs)]
    anchor, heading = f"curves{benchmark.suffix}", benchmark.title("Learning curves")
    if not entries:
        return [Section(anchor, heading, ["The runs were evaluated only at their end (eval.every), so there are no curves."])]
    parts: list[Picture | Table] = []
    scored, suffix = benchmark.scored, benchmark.suffix
    over_steps = {entry.label: _over(entry, scored, "step", index < plots.MOST_LINES) for index, entry in enumerate(entries) if scored}
    if scored:
        over_time = {entry.label: _over(entry, scored, "seconds", index < plots.MOST_LINES) for index, entry in enumerate(entries)}
        parts += [
            _curve_picture(benchmark, over_steps, "steps", "steps per task"),
            _curve_picture(benchmark, over_time, "time", "wall time", time=True),
        ]
    tasks = benchmark.tasks[:MAX_PANELS]
    if len(tasks) > 1 or not scored:
        units = {task: "score" if task in scored else "return" for task in tasks}
        panels = {task: {entry.label: _over(entry, (task,), "step", True) for entry in entries[: plots.MOST_LINES]} for task in tasks}
        parts.append(
            Picture(
                f"curves_per_task{suffix}",
                "Learning curves per task",
                f"A panel for each task, with a line for each configuration over steps per task: {', '.join(tasks)}.",
                partial(plots.lines, panels, benchmark.colours, "steps per task", units),
                [
                    *_shown_of(benchmark, plots.MOST_LINES),
                    *([f"The first {MAX_PANELS} tasks."] if len(benchmark.tasks) > MAX_PANELS else []),
                ],
            )
        )
    if scored:
        parts.append(_curve_table(benchmark, over_steps))
    lines = ["Validation during training. Wall time is that of each run's machine, with evaluating and saving."]
    if any(len(entry.runs) > 1 for entry in entries):
        lines.append("Bands: pointwise 95% bootstrap intervals over seeds.")
    return [Section(anchor, heading, lines, parts)]


def _curve_picture(benchmark: Benchmark, curves: Mapping[str, Curve], name: str, x: str, *, time: bool = False) -> Picture:
    return Picture(
        f"curves_over_{name}{benchmark.suffix}",
        f"Interquartile mean of validation scores over {x}",
        f"A line for each configuration over {x}; bands are 95% intervals over seeds.",
        partial(plots.lines, {"": curves}, benchmark.colours, x, "score (IQM)", time=time),
        _coloured_of(benchmark),
    )


def _over(entry: Entry, tasks: Sequence[str], kind: str, has_band: bool) -> Curve:
    """Return the interquartile mean over an entry's runs and some tasks, over steps or seconds; the mean for few runs and one task."""
    is_scored = all(task in run.final_scores for run in entry.runs for task in tasks)
    xs = [np.array([getattr(each, kind) for each in run.evaluations], float) for run in entry.runs]
    x_P = xs[0] if kind == "step" and all(np.array_equal(x, xs[0]) for x in xs) else _grid(xs)
    values = [
        [np.interp(x_P, x, [_value(each, task, is_scored) for each in run.evaluations]) for task in tasks]
        for run, x in zip(entry.runs, xs, strict=True)
    ]
    values_RKP = np.array(values)
    return Curve(x_P, score_stats.curve(values_RKP), *((score_stats.curve_band(values_RKP) if has_band else None) or (None, None)))


def _grid(xs: Sequence[Floats]) -> Floats:
    """Return points inside the range of every run."""
    first, last = max(float(x[0]) for x in xs), min(float(x[-1]) for x in xs)
    return np.linspace(first, max(first, last), POINTS)


def _value(evaluation: Evaluation, task: str, is_scored: bool) -> float:
    return (evaluation.scores if is_scored else evaluation.returns).get(task, float("nan"))


def _curve_table(benchmark: Benchmark, curves: Mapping[str, Curve]) -> Table:
    rows: list[Row] = []
    for label, curve in curves.items():
        for index, step in enumerate(curve.x):
            ends = () if curve.low is None else (float(curve.low[index]), float(curve.high[index]))
            rows.append([label, int(step), Estimate(float(curve.y[index]), *ends)])
    header = ["configuration", "step per task", "score (IQM)"]
    return Table(f"learning_curves{benchmark.suffix}", "Learning curves in numbers", header, rows)
