"""Report sections on transfer: runs that start from a trained network, compared with runs from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mtrl_cli.reports import comparison, plots, sharing
from mtrl_cli.reports.comparison import Ablation, Variant
from mtrl_cli.reports.elements import Cell, Picture, Section, Table
from mtrl_cli.reports.grouping import FROM_SCRATCH
from mtrl_cli.reports.plots import Curve
from mtrl_cli.reports.run_data import RunData, RunGroup
from mtrl_cli.reports.wording import some, titled
from mtrl_cli.stats import bootstrap
from mtrl_cli.stats import transfer as transfer_stats
from mtrl_cli.stats.bootstrap import Estimate, Floats, Indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        curves: validation from scratch and fine-tuned, as steps `[P]` and results `[S, P]`.
        finals_S: final test results from scratch and fine-tuned.
    """

    name: str
    unit: str
    curves: tuple[tuple[Floats, Floats], tuple[Floats, Floats]]
    finals_S: tuple[Floats, Floats]

    def metrics(self) -> dict[str, Estimate]:
        """Compute the metrics of `stats.transfer`."""
        (steps_P, scratch_SP), (_, tuned_SP) = self.curves
        # Without reference scores an untrained network's result stands for random play.
        random = 0.0 if self.unit == "score" else float(scratch_SP[:, 0].mean())
        return transfer_stats.compare(steps_P, tuned_SP, scratch_SP, self.finals_S[1], self.finals_S[0], random)


def sections(groups: Sequence[RunGroup]) -> list[Section]:
    """Return a section for each ablation that has runs from scratch and fine-tuned ones."""
    found: list[Section] = []
    for ablation in comparison.ablations(groups, "init_from"):
        variants = [variant for variant in ablation.variants if variant.runs]
        scratch = next((variant for variant in variants if variant.option == FROM_SCRATCH), None)
        tuned = [variant for variant in variants if variant.option != FROM_SCRATCH]
        if scratch is not None and tuned and len(found) < sharing.MAX_ABLATIONS:
            found.append(_section(ablation, scratch, tuned, f"_{len(found) + 1}" if found else ""))
    return found


def _section(ablation: Ablation, scratch: Variant, variants: Sequence[Variant], suffix: str) -> Section:
    lines = sharing.introduction(ablation)
    lines += [f"{variant.name}: {variant.runs[0].config['init_from']}" for variant in variants]
    parts: list[Table | Picture] = []
    for number, variant in enumerate(variants):
        pairs = _pairs(scratch, variant)
        rows = _lines(ablation, pairs)
        if not rows:
            lines.append(f"{variant.name}: no completed run has a seed and evaluations in common with one from scratch.")
            continue
        name = f"transfer{suffix}" + (f"_{number + 1}" if number else "")
        title = titled("Fine-tuned compared with from scratch", variant.name if len(variants) > 1 else "")
        parts += [_picture(rows, variant.name, name, title), _table(ablation, rows, pairs, name, title)]
    return Section(f"transfer{suffix}".replace("_", "-"), titled("Transfer", ablation.about), lines, parts)


def _pairs(scratch: Variant, variant: Variant) -> list[tuple[RunData, RunData]]:
    """Return the runs from scratch and the fine-tuned runs of the same seeds."""
    tuned = {run.seed: run for run in variant.runs}
    return [(run, tuned[run.seed]) for run in scratch.runs if run.seed in tuned]


def _lines(ablation: Ablation, pairs: Sequence[tuple[RunData, RunData]]) -> list[Line]:
    """Return the rows of the table: each task, and the mean over those with scores."""
    scored = ablation.scored_tasks
    rows = [_line(task, [task], pairs, is_scored=task in scored) for task in ablation.tasks]
    if len(scored) > 1 or (scored and len(ablation.tasks) > 1):
        rows.append(_line(OVER_TASKS, scored, pairs, is_scored=True))
    return [row for row in rows if row is not None]


def _line(name: str, tasks: Sequence[str], pairs: Sequence[tuple[RunData, RunData]], *, is_scored: bool) -> Line | None:
    found = comparison.curves([run for pair in pairs for run in pair], tasks, is_scored=is_scored)
    if found is None or len(found[0]) < 2:
        return None
    steps_P, curves = found
    finals = np.array([[[(run.final_scores if is_scored else run.final_returns)[t] for t in tasks] for run in pair] for pair in pairs])
    scratch, tuned = ((steps_P, curves[side::2]) for side in (0, 1))
    return Line(name, "score" if is_scored else "return", (scratch, tuned), tuple(finals.mean(axis=2).T))  # type: ignore[arg-type]


# -- the table and the picture --------------------------------------------------------------------------------------------------


def _table(ablation: Ablation, rows: Sequence[Line], pairs: Sequence[tuple[RunData, RunData]], name: str, title: str) -> Table:
    cells: list[list[Cell]] = []
    starts = all(line.curves[0][0][0] == 0 for line in rows)
    for line in rows:
        metrics = line.metrics()
        own = [None if math.isnan(metrics[key].value) or (key in AT_START and not starts) else metrics[key] for key in HEADINGS]
        cells.append([line.name if line.name == OVER_TASKS else ablation.named(line.name), *own])
    header = ["task", *HEADINGS.values()]
    return Table(name, title, header, cells, _notes(rows, cells, pairs, starts=starts))


def _notes(rows: Sequence[Line], cells: Sequence[Sequence[Cell]], pairs: Sequence[tuple[RunData, RunData]], *, starts: bool) -> list[str]:
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
    cut = sum(run.cut_episodes for pair in pairs for run in pair)
    if cut:
        notes.append(f"{cut:,} test episodes were cut at eval.max_steps; their results up to there count.")
    column = 1 + list(HEADINGS).index("area_ratio")
    missing = [line.name for line, row in zip(rows, cells, strict=True) if row[column] is None]
    if missing:
        notes.append(f"No area ratio where training from scratch is no better than random play on average: {some(missing)}.")
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
    labels = (FROM_SCRATCH, variant)
    panels = {
        line.name: {
            label: _curve(*curve, float(final_S.mean())) for label, curve, final_S in zip(labels, line.curves, line.finals_S, strict=True)
        }
        for line in sorted(rows, key=lambda line: line.name != OVER_TASKS)
    }
    return plots.lines(panels, plots.colours(labels[::-1]), "steps per task", {line.name: line.unit for line in rows})


def _curve(steps_P: Floats, results_SP: Floats, final: float) -> Curve:
    """Return the mean over seeds, with its interval where there are several."""

    def mean(rows_BS: Indices) -> Floats:
        return results_SP[rows_BS].mean(axis=1)

    seeds = len(results_SP)
    low_P, high_P = bootstrap.interval(mean, bootstrap.draw((seeds,))) if seeds > 1 else (None, None)
    return Curve(steps_P, results_SP.mean(axis=0), low_P, high_P, final)
