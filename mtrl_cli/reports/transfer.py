"""Report sections on transfer: runs that start from a trained network, compared with runs from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mtrl_cli.reports import comparison, plots, sharing
from mtrl_cli.reports.comparison import Benchmark, Variant
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.grouping import FROM_SCRATCH
from mtrl_cli.reports.plots import Curve
from mtrl_cli.reports.run_data import RunData, RunGroup
from mtrl_cli.reports.wording import some, titled
from mtrl_cli.stats import bootstrap
from mtrl_cli.stats import transfer as transfer_stats
from mtrl_cli.stats.bootstrap import Estimate, Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[RunData, RunData]
"""The run from scratch and the fine-tuned run of a seed."""
HEADINGS = {
    "zero_shot": "zero-shot",
    "jump_start": "jump-start",
    "steps_to_scratch": "steps to scratch's final",
    "area_ratio": "area ratio",
    "final_fine_tuned": "final, fine-tuned",
    "final_scratch": "final, from scratch",
    "final_difference": "difference",
}
"""The columns of the table, by metric of `stats.transfer`."""
AT_START = ("zero_shot", "jump_start")
OVER_TASKS = "mean over tasks"
NOTES = (
    "Zero-shot: the source's network before any training. Jump-start: zero-shot minus an untrained network's result.",
    "Steps to scratch's final: until validation of the fine-tuned run reaches the final validation from scratch.",
    "Area ratio: ratio of the areas under the validation curves, above random play; 1: no difference (Taylor and Stone 2009 subtract 1).",
    "Final: the last network in test episodes.",
)


@dataclass(frozen=True)
class Line:
    """One row of the table: a task, or the mean over tasks.

    Attributes:
        unit: score or return.
        steps_P: steps of the evaluations.
        scratch_SP, tuned_SP: validation from scratch and fine-tuned.
        scratch_S, tuned_S: final test results from scratch and fine-tuned.
    """

    name: str
    unit: str
    steps_P: Floats
    scratch_SP: Floats
    tuned_SP: Floats
    scratch_S: Floats
    tuned_S: Floats

    def metrics(self) -> dict[str, Estimate]:
        """Compute the metrics of `stats.transfer`."""
        # Without reference scores an untrained network's result replaces that of random play.
        random = 0.0 if self.unit == "score" else float(self.scratch_SP[:, 0].mean())
        return transfer_stats.compare(self.steps_P, self.tuned_SP, self.scratch_SP, self.tuned_S, self.scratch_S, random)


def sections(groups: Sequence[RunGroup]) -> list[Section]:
    """Return a section for each ablation that has runs from scratch and fine-tuned ones."""
    found = [ablation for ablation in comparison.ablations(groups, "init_from") if all(ablation.split(FROM_SCRATCH))]
    return [_section(ablation) for ablation in comparison.numbered(found)]


def _section(ablation: Benchmark) -> Section:
    (scratch, *_), variants = ablation.split(FROM_SCRATCH)
    lines = sharing.introduction(ablation)
    lines += [f"{variant.name}: {variant.runs[0].config['init_from']}" for variant in variants]
    parts: list[Table | Picture] = []
    for number, variant in enumerate(variants):
        pairs = _pairs(scratch, variant)
        rows = _lines(ablation, pairs)
        if not rows:
            lines.append(f"{variant.name}: no completed run has a seed and evaluations in common with one from scratch.")
            continue
        name = f"transfer{ablation.suffix}" + (f"_{number + 1}" if number else "")
        title = titled("Fine-tuned compared with from scratch", variant.name if len(variants) > 1 else "")
        parts += [_picture(rows, variant.name, name, title), _table(ablation, rows, pairs, name, title)]
    return Section(f"transfer{ablation.anchor}", ablation.title("Transfer"), lines, parts)


def _pairs(scratch: Variant, variant: Variant) -> list[Pair]:
    """Return the runs from scratch and the fine-tuned runs of the same seeds."""
    tuned = {run.seed: run for run in variant.runs}
    return [(run, tuned[run.seed]) for run in scratch.runs if run.seed in tuned]


def _lines(ablation: Benchmark, pairs: Sequence[Pair]) -> list[Line]:
    """Return the rows of the table: each task, and the mean over those with scores."""
    scored = ablation.scored
    rows = [_line(task, [task], pairs, is_scored=task in scored) for task in ablation.tasks]
    if scored and len(ablation.tasks) > 1:
        rows.append(_line(OVER_TASKS, scored, pairs, is_scored=True))
    return [row for row in rows if row is not None]


def _line(name: str, tasks: Sequence[str], pairs: Sequence[Pair], *, is_scored: bool) -> Line | None:
    found = comparison.curves([run for pair in pairs for run in pair], tasks, is_scored=is_scored)
    if found is None or len(found[0]) < 2:
        return None
    steps_P, curves = found
    results = [[[(run.final_scores if is_scored else run.final_returns)[task] for task in tasks] for run in pair] for pair in pairs]
    scratch_S, tuned_S = np.array(results, float).mean(axis=2).T
    return Line(name, "score" if is_scored else "return", steps_P, curves[::2], curves[1::2], scratch_S, tuned_S)


# -- the table and the picture --------------------------------------------------------------------------------------------------


def _table(ablation: Benchmark, rows: Sequence[Line], pairs: Sequence[Pair], name: str, title: str) -> Table:
    cells: list[list[Cell]] = []
    starts = all(line.steps_P[0] == 0 for line in rows)
    for line in rows:
        metrics = line.metrics()
        own = [None if math.isnan(metrics[key].value) or (key in AT_START and not starts) else metrics[key] for key in HEADINGS]
        cells.append([line.name if line.name == OVER_TASKS else ablation.named(line.name), *own])
    column = 1 + list(HEADINGS).index("area_ratio")
    no_ratio = [line.name for line, row in zip(rows, cells, strict=True) if row[column] is None]
    return Table(name, title, ["task", *HEADINGS.values()], cells, _notes(rows, pairs, no_ratio, starts=starts))


def _notes(rows: Sequence[Line], pairs: Sequence[Pair], no_ratio: Sequence[str], *, starts: bool) -> list[str]:
    """Return the explanations below the table."""
    config = pairs[0][0].config
    episodes = config.get("eval.episodes"), config.get("eval.test_episodes") or config.get("eval.episodes")
    notes = [f"{episodes[0]} validation episodes per task and evaluation, {episodes[1]} test episodes."]
    if any(line.unit == "score" for line in rows):
        notes.append("Scores are normalised: 0 is random play, 1 the reference.")
    unscored = [line.name for line in rows if line.unit == "return"]
    if unscored:
        notes.append(f"No reference scores for {some(unscored)}: returns, and areas above an untrained network's return.")
    notes += NOTES
    if not starts:
        notes.append("Zero-shot and jump-start need an evaluation before the first step (eval.at_start=true).")
    tests = [run.test for pair in pairs for run in pair if run.test is not None]
    cut = sum(result.cut for test in tests for result in test.tasks.values())
    if cut:
        notes.append(f"{cut:,} test episodes were cut at eval.max_steps; their results up to this limit count.")
    if no_ratio:
        notes.append(f"No area ratio where training from scratch is no better than random play on average: {some(no_ratio)}.")
    if len(pairs) > 1:
        notes.append("In brackets: 95% bootstrap intervals over seeds; the two runs of a seed are resampled as a pair.")
    return notes


def _picture(rows: Sequence[Line], variant: str, name: str, title: str) -> Picture:
    return Picture(
        name,
        f"{title}: learning curves",
        f"Validation over steps per task, a panel for each task, with lines {variant} and {FROM_SCRATCH}; stars are test results.",
        partial(_draw, rows, variant),
        ["Bands: 95% bootstrap intervals over seeds. Stars: the last network in test episodes."],
    )


def _draw(rows: Sequence[Line], variant: str) -> Figure:
    panels = {
        line.name: {
            FROM_SCRATCH: _curve(line.steps_P, line.scratch_SP, line.scratch_S),
            variant: _curve(line.steps_P, line.tuned_SP, line.tuned_S),
        }
        for line in sorted(rows, key=lambda line: line.name != OVER_TASKS)
    }
    return plots.lines(panels, plots.colours([variant, FROM_SCRATCH]), "steps per task", {line.name: line.unit for line in rows})


def _curve(steps_P: Floats, results_SP: Floats, final_S: Floats) -> Curve:
    """Return the mean over seeds, with its interval where there are several."""
    seeds = len(results_SP)
    draws = bootstrap.draw((seeds,))
    low_P, high_P = bootstrap.interval(lambda rows_BS: results_SP[rows_BS].mean(axis=1), draws) if seeds > 1 else (None, None)
    return Curve(steps_P, results_SP.mean(axis=0), low_P, high_P, float(final_S.mean()))
