"""Report sections on scores: over tasks and per task, with intervals, comparisons and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from mtrl_cli.reports import plots
from mtrl_cli.reports.comparison import FEW_SEEDS, NO_RESULTS, SUPERSEDED, Benchmark, Variant
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.plots import Curve
from mtrl_cli.reports.wording import counted, some
from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats.bootstrap import Estimate, Floats

Row = list[Cell]
POINTS = 30  # of a learning curve over wall time
HEADINGS = {"iqm": "IQM", "mean": "mean", "median": "median", "optimality_gap": "optimality gap"}
MAX_PANELS = 60
INTERVALS = "In brackets, and as bands: 95% stratified bootstrap intervals over seeds, which are resampled in each task independently."
ALL_IN_TABLES = "The best {most} of {count:,} configurations; the tables have all."
OTHERS_GREY = "The best {most} of {count:,} configurations are coloured; the others are grey."


def sections(benchmarks: Sequence[Benchmark]) -> list[Section]:
    """Return the sections on scores for each benchmark."""
    found: list[Section] = []
    for benchmark in benchmarks:
        if benchmark.ranked:
            found += [_over_tasks(benchmark), _per_task(benchmark)]
            if benchmark.scored and len(benchmark.ranked) > 1:
                found.append(_improvement(benchmark))
            if benchmark.scored:
                found.append(_profiles(benchmark))
            found.append(_curves(benchmark))
        else:
            lines = ["No run is completed yet, so there is nothing to compare. The last table shows the progress of each run."]
            found.append(Section(f"scores{benchmark.suffix}", benchmark.title("Scores"), [*lines, *_left_out(benchmark)]))
    return found


# -- over tasks, and per task ---------------------------------------------------------------------------------------------------


def _over_tasks(benchmark: Benchmark) -> Section:
    suffix, ranked = benchmark.suffix, benchmark.ranked
    summary = _summary(benchmark)
    lines = [summary, *benchmark.cautions(), *_left_out(benchmark), *_untested(benchmark)]
    anchor, heading = f"scores{suffix}", benchmark.title("Scores over tasks")
    if not benchmark.scored:
        return Section(anchor, heading, lines)
    without = [task for task in benchmark.tasks if task not in benchmark.scored]
    if without:
        lines.append(f"Only tasks with a reference score are aggregated. Other tasks are shown below by their returns: {some(without)}.")
    rows: list[Row] = [[each.name, len(each.runs), *(each.aggregates[name] for name in HEADINGS)] for each in ranked]
    values = {heading: {each.name: each.aggregates[name] for each in ranked} for name, heading in HEADINGS.items()}
    notes = [
        "Scores are normalised: 0 is random play, 1 the reference. IQM: the mean of the middle half of all scores, of every seed and task. "
        "Optimality gap: the mean distance of scores below 1; less is better.",
        *([INTERVALS] if any(len(each.runs) > 1 for each in ranked) else []),
    ]
    table = Table(f"scores_over_tasks{suffix}", "Aggregate scores", ["configuration", "seeds", *HEADINGS.values()], rows, notes)
    picture = Picture(
        f"scores_over_tasks_picture{suffix}",
        "IQM, mean, median and optimality gap",
        f"Dots with intervals, a row for each configuration, a panel for each aggregate. {summary}",
        partial(plots.dots, values, _colours(benchmark), None),
        _note_above(benchmark, plots.MOST_ROWS),
    )
    return Section(anchor, heading, lines, [picture, table])


def _summary(benchmark: Benchmark) -> str:
    if not benchmark.scored:
        return "No reference scores are known for these tasks: they are compared by returns, and not aggregated over tasks."
    best, count = benchmark.ranked[0], len(benchmark.ranked)
    tested = [run.test is not None for each in benchmark.ranked for run in each.runs]
    source = "test episodes" if all(tested) else "test episodes or the last validation" if any(tested) else "the last validation"
    over = f"{best.iqm:.3f} over {counted(len(benchmark.scored), 'task')}"
    if count == 1:
        return f"One configuration, {best.name}, has completed runs; its interquartile mean (IQM) in {source} is {over}."
    return f"Of {count:,} configurations {best.name} has the highest IQM in {source}, {over}.{_certainty(benchmark)}"


def _certainty(benchmark: Benchmark) -> str:
    """Return a caution about the order, where seeds are few or intervals overlap with the best one's."""
    best, *others = benchmark.ranked
    if any(len(each.runs) < FEW_SEEDS for each in benchmark.ranked):
        return f" The order is not certain: some have fewer than {FEW_SEEDS} seeds."
    low = best.aggregates["iqm"].low
    highs = {each.name: each.aggregates["iqm"].high for each in others}
    overlap = [name for name, high in highs.items() if low is not None and high is not None and high >= low]
    return f" The order is not certain: intervals overlap with {some(overlap)}." if overlap else ""


def _left_out(benchmark: Benchmark) -> list[str]:
    lines = []
    for variant in benchmark.variants:
        reasons = [reason for _, reason in variant.left_out]
        if NO_RESULTS in reasons:
            runs = counted(reasons.count(NO_RESULTS), "completed run")
            lines.append(f"{variant.name}: {runs} without results of all tasks left out.")
        if SUPERSEDED in reasons:
            lines.append(f"{variant.name}: of several runs of one seed, the last is used.")
    return lines


def _untested(benchmark: Benchmark) -> list[str]:
    runs = [run for variant in benchmark.ranked for run in variant.runs]
    untested = sum(run.test is None for run in runs)
    if untested == len(runs):
        return ["No run has a test: scores are those of the last validation."]
    return [f"{untested} of {len(runs)} runs have no test: the scores of their last validation are used."] if untested else []


def _colours(benchmark: Benchmark) -> dict[str, str]:
    return plots.colours([each.name for each in benchmark.ranked])


def _note_above(benchmark: Benchmark, most: int, note: str = ALL_IN_TABLES) -> list[str]:
    """Return a note for a plot of more than `most` configurations."""
    count = len(benchmark.ranked)
    return [note.format(most=most, count=count)] if count > most else []


def _per_task(benchmark: Benchmark) -> Section:
    ranked, start = benchmark.ranked, ["configuration", "seeds"]
    parts = []
    if benchmark.scored:
        rows: list[Row] = [[each.name, len(each.runs), *score_stats.task_means(each.scores_RK)] for each in ranked]
        parts.append(Table(f"scores_per_task{benchmark.suffix}", "Scores per task", [*start, *benchmark.scored], rows))
    rows = [[each.name, len(each.runs), *score_stats.task_means(_returns(each, benchmark.tasks))] for each in ranked]
    notes = ["Means over seeds of the mean over episodes, in the environment's own units."]
    parts.append(Table(f"returns_per_task{benchmark.suffix}", "Returns per task", [*start, *benchmark.tasks], rows, notes))
    return Section(f"per_task{benchmark.suffix}", benchmark.title(parts[0].title), [], parts)


def _returns(variant: Variant, tasks: Sequence[str]) -> Floats:
    return np.array([[run.final_returns[task] for task in tasks] for run in variant.runs], float)


# -- comparisons ----------------------------------------------------------------------------------------------------------------


def _improvement(benchmark: Benchmark) -> Section:
    best, *others = benchmark.ranked
    found = {each.name: score_stats.probability_of_improvement(best.scores_RK, each.scores_RK) for each in others}
    text = f"Probability that a run of {best.name} scores higher than one of another configuration, on average over tasks."
    name, title = f"probability_of_improvement{benchmark.suffix}", "Probability of improvement"
    rows: list[Row] = [[other, probability] for other, probability in found.items()]
    table = Table(name, title, ["over", f"of {best.name}"], rows, ["0.5: neither is better (Mann-Whitney, ties count half)."])
    panels = {f"P({plots.short(best.name, 24)} is better)": found}
    colours = _colours(benchmark)
    picture = Picture(
        f"{name}_picture",
        f"{title} of {best.name}",
        f"{text} Dots with intervals, a row for each other configuration; a dashed line at 0.5.",
        partial(plots.dots, panels, {other: colours[other] for other in found}, 0.5),
        _note_above(benchmark, plots.MOST_ROWS),
    )
    return Section(f"improvement{benchmark.suffix}", benchmark.title(title), [text], [picture, table])


def _profiles(benchmark: Benchmark) -> Section:
    scores = np.concatenate([each.scores_RK.ravel() for each in benchmark.ranked[: plots.MOST_LINES]])
    taus_T = np.linspace(min(0.0, float(scores.min())), max(1.0, float(scores.max())), 101)
    drawn = {}
    for index, each in enumerate(benchmark.ranked):
        band = score_stats.profile_band(each.scores_RK, taus_T) if index < plots.MOST_LINES else None
        drawn[each.name] = Curve(taus_T, score_stats.profile(each.scores_RK, taus_T), *(band or ()))
    name = f"performance_profiles{benchmark.suffix}"
    rows: list[Row] = [[configuration, *curve.y[::10].tolist()] for configuration, curve in drawn.items()]
    header = ["share of scores above", *(f"{tau:.3g}" for tau in taus_T[::10])]
    picture = Picture(
        f"{name}_picture",
        "Share of scores above a threshold",
        "A falling line for each configuration: the share of the scores of all runs and tasks above the threshold on the x-axis. "
        "A line above another everywhere is better.",
        partial(plots.lines, {"": drawn}, _colours(benchmark), "normalised score τ", "share of scores above τ"),
        _note_above(benchmark, plots.MOST_LINES, OTHERS_GREY),
    )
    line = "The share of scores, of every seed and task, above each threshold: higher is better. Where lines cross, neither is better."
    table = Table(name, "Performance profiles", header, rows)
    return Section(f"profiles{benchmark.suffix}", benchmark.title("Performance profiles"), [line], [picture, table])


# -- learning curves ------------------------------------------------------------------------------------------------------------


def _curves(benchmark: Benchmark) -> Section:
    variants = [each for each in benchmark.ranked if all(len(run.evaluations) > 1 for run in each.runs)]
    anchor, heading = f"curves{benchmark.suffix}", benchmark.title("Learning curves")
    if not variants:
        return Section(anchor, heading, ["The runs were evaluated only at their end (eval.every), so there are no curves."])
    parts: list[Picture | Table] = []
    scored = benchmark.scored
    if scored:
        over_steps, over_time = (
            {each.name: _learning_curve(each, scored, kind, index < plots.MOST_LINES) for index, each in enumerate(variants)}
            for kind in ("step", "seconds")
        )
        unit, over_units = _in_units(over_time)
        parts.append(_curve_picture(benchmark, over_steps, "steps", "steps per task", "steps per task"))
        parts.append(_curve_picture(benchmark, over_units, "time", "wall time", f"wall time, {unit}"))
    if len(benchmark.tasks) > 1 or not scored:
        parts.append(_curves_per_task(benchmark, variants[: plots.MOST_LINES]))
    if scored:
        parts.append(_curve_table(benchmark, over_steps))
    lines = ["Validation during training. Wall time is that of each run's machine, with evaluating and saving."]
    if any(len(each.runs) > 1 for each in variants):
        lines.append("Bands: pointwise 95% bootstrap intervals over seeds.")
    return Section(anchor, heading, lines, parts)


def _curve_picture(benchmark: Benchmark, curves: Mapping[str, Curve], name: str, over: str, x: str) -> Picture:
    return Picture(
        f"curves_over_{name}{benchmark.suffix}",
        f"Interquartile mean of validation scores over {over}",
        f"A line for each configuration over {over}; bands are 95% intervals over seeds.",
        partial(plots.lines, {"": curves}, _colours(benchmark), x, "score (IQM)"),
        _note_above(benchmark, plots.MOST_LINES, OTHERS_GREY),
    )


def _curves_per_task(benchmark: Benchmark, variants: Sequence[Variant]) -> Picture:
    tasks = benchmark.tasks[:MAX_PANELS]
    units = {task: "score" if task in benchmark.scored else "return" for task in tasks}
    panels = {task: {each.name: _learning_curve(each, (task,), "step", True) for each in variants} for task in tasks}
    notes = _note_above(benchmark, plots.MOST_LINES)
    return Picture(
        f"curves_per_task{benchmark.suffix}",
        "Learning curves per task",
        f"A panel for each task, with a line for each configuration over steps per task: {', '.join(tasks)}.",
        partial(plots.lines, panels, _colours(benchmark), "steps per task", units),
        [*notes, f"The first {MAX_PANELS} tasks."] if len(benchmark.tasks) > MAX_PANELS else notes,
    )


def _learning_curve(variant: Variant, tasks: Sequence[str], kind: str, has_band: bool) -> Curve:
    """Return a learning curve: interquartile mean over runs and tasks (the mean for few runs of one task) against `step` or `seconds`."""
    results = "scores" if all(task in run.final_scores for run in variant.runs for task in tasks) else "returns"
    xs = [np.array([getattr(each, kind) for each in run.evaluations], float) for run in variant.runs]
    x_P = xs[0] if kind == "step" and all(np.array_equal(x, xs[0]) for x in xs) else _grid(xs)
    values_RKP = np.array(
        [
            [np.interp(x_P, x, [getattr(each, results).get(task, np.nan) for each in run.evaluations]) for task in tasks]
            for run, x in zip(variant.runs, xs, strict=True)
        ]
    )
    band = score_stats.curve_band(values_RKP) if has_band else None
    return Curve(x_P, score_stats.curve(values_RKP), *(band or ()))


def _grid(xs: Sequence[Floats]) -> Floats:
    """Return points inside the range of every run."""
    first, last = max(float(x[0]) for x in xs), min(float(x[-1]) for x in xs)
    return np.linspace(first, max(first, last), POINTS)


def _in_units(curves: Mapping[str, Curve]) -> tuple[str, dict[str, Curve]]:
    """Convert curves over seconds to curves over the largest unit of which there are two or more, and return the unit."""
    longest = max(float(curve.x[-1]) for curve in curves.values())
    unit, size = next(((unit, size) for unit, size in (("hours", 3600.0), ("minutes", 60.0)) if longest >= 2 * size), ("seconds", 1.0))
    return unit, {name: replace(curve, x=curve.x / size) for name, curve in curves.items()}


def _curve_table(benchmark: Benchmark, curves: Mapping[str, Curve]) -> Table:
    rows: list[Row] = []
    for name, curve in curves.items():
        for index, step in enumerate(curve.x):
            ends = () if curve.low is None else (float(curve.low[index]), float(curve.high[index]))
            rows.append([name, int(step), Estimate(float(curve.y[index]), *ends)])
    header = ["configuration", "step per task", "score (IQM)"]
    return Table(f"learning_curves{benchmark.suffix}", "Learning curves in numbers", header, rows)
