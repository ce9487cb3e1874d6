"""Pictures of sharing sections: gains per task, gradient conflict, matrices of tasks, routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtrl_cli.metric_names import GRAD_CONFLICT
from mtrl_cli.reports.comparison import Ablation, Comparison, Variant
from mtrl_cli.stats.bootstrap import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

COLUMNS = 4  # of several panels
COLOURS = "RdBu"  # red and blue stay apart for eyes that cannot tell red from green
NAMED_TASKS = 20
"""More tasks than these have no room for their names, nor for numbers in the cells."""


def transfer(ablation: Ablation, compared: Sequence[Comparison]) -> Figure:
    """Draw each task's difference in each variant: blue for gains, red for losses, framed where the interval excludes 0."""
    from matplotlib.figure import Figure

    values_RK = np.array([[task.value for task in each.tasks] for each in compared])
    signs_RK = np.array([[task.sign for task in each.tasks] for each in compared])
    rows, columns = values_RK.shape
    figure = Figure(figsize=(max(4.5, 2.6 + 0.85 * min(columns, NAMED_TASKS)), 1.8 + 0.42 * rows), layout="constrained")
    axes = figure.subplots()
    shades_RK = values_RK / _scales(ablation, values_RK)
    image = _cells(axes, shades_RK, COLOURS, -1.0)
    _name_cells(axes, [each.variant.name for each in compared], ablation.tasks)
    for row, column in np.argwhere(signs_RK != 0):
        _frame(axes, row, column)
    if columns <= NAMED_TASKS:
        for (row, column), value in np.ndenumerate(values_RK):
            sure = signs_RK[row, column] != 0
            axes.text(
                column,
                row,
                _signed(value),
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold" if sure else "normal",
                color="white" if abs(shades_RK[row, column]) > 0.6 else "black",
            )
    bar = figure.colorbar(image, ax=axes, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["lost", "0", "gained"])
    return figure


def _scales(ablation: Ablation, values_RK: Floats) -> Floats:
    """Return the divisors of differences for their colours, `[K]`: one for all scores, one for each task with returns."""
    largest_K = np.abs(values_RK).max(axis=0)
    scored = np.array(ablation.scored, bool)
    largest_K[scored] = largest_K[scored].max(initial=0)
    return np.where(largest_K > 0, largest_K, 1)


def _frame(axes: Axes, row: int, column: int) -> None:
    """Frame a cell along the inside of its edges: the outer half of the line is clipped, so it cannot belong to a neighbour."""
    from matplotlib.patches import Rectangle

    frame = axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=3.6))
    frame.set_clip_path(frame)


def _signed(value: float) -> str:
    text = f"{value:+.2f}" if abs(value) < 10 else f"{value:+,.0f}"
    return text if float(text.replace(",", "")) else text[1:]


def between_tasks(ablation: Ablation, tables: Mapping[str, Floats]) -> Figure:
    """Draw a matrix of tasks by tasks for each variant, with values from -1 to 1."""
    return _panels({name: (table, ablation.tasks, ablation.tasks) for name, table in tables.items()}, COLOURS, -1.0)


def routing(ablation: Ablation, tables: Mapping[str, Floats]) -> Figure:
    """Draw a matrix of tasks by choices for each gate, with shares from 0 to 1."""
    panels = {name: (table, ablation.tasks, [str(choice) for choice in range(table.shape[1])]) for name, table in tables.items()}
    return _panels(panels, "Blues", 0.0)


def _panels(panels: Mapping[str, tuple[Floats, Sequence[str], Sequence[str]]], colours: str, lowest: float) -> Figure:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.0 * columns + 0.8, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, (panel, (name, (table, of_rows, of_columns))) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        image = _cells(panel, table, colours, lowest)
        panel.set_title(name, fontsize=9)
        is_left, is_last = place % columns == 0, place + columns >= len(panels)
        _name_cells(panel, of_rows if is_left else [], of_columns if is_last or len(of_columns) != len(of_rows) else [], fontsize=7)
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _cells(axes: Axes, table: Floats, colours: str, lowest: float) -> QuadMesh:
    """Draw values as colours from `lowest` to 1, the first row on top; cells have no edges, so that no seams appear."""
    image = axes.pcolormesh(
        np.arange(table.shape[1] + 1) - 0.5,
        np.arange(table.shape[0] + 1) - 0.5,
        table,
        cmap=colours,
        vmin=lowest,
        vmax=1,
        edgecolors="none",
        antialiased=False,
        linewidth=0,
        snap=True,
    )
    axes.invert_yaxis()
    return image


def _name_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str], fontsize: int = 8) -> None:
    shown = columns if len(columns) <= NAMED_TASKS else []
    axes.set_yticks(range(len(rows)), rows, fontsize=fontsize)
    axes.set_xticks(range(len(shown)), shown, fontsize=fontsize, rotation=35, ha="right")
    axes.tick_params(length=0)


def conflict(ablation: Ablation, variants: Sequence[Variant]) -> Figure:
    """Draw the share of task pairs with conflicting gradients over training: the mean over runs."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20" if len(variants) > 10 else "tab10"]
    for number, variant in enumerate(variants):
        steps_P, shares_P = conflict_over_training(variant)
        axes.plot(steps_P, shares_P, label=variant.name, color=colours(number % 20), linewidth=1.6)
    axes.set_xlabel("steps per task")
    axes.set_ylabel("conflicting pairs")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def conflict_over_training(variant: Variant) -> tuple[Floats, Floats]:
    """Return steps `[P]` and the share of conflicting pairs there, as a mean over runs `[P]`.

    Diagnostics of runs may be at different steps: each run is interpolated linearly, within the range that all runs cover.
    """
    series = [np.array(run.metrics[GRAD_CONFLICT], float) for run in variant.runs if run.metrics.get(GRAD_CONFLICT)]
    first, last = max(own[0, 0] for own in series), min(own[-1, 0] for own in series)
    steps = np.unique(np.concatenate([own[:, 0] for own in series]))
    steps_P = steps[(steps >= first) & (steps <= last)]
    return steps_P, np.mean([np.interp(steps_P, own[:, 0], own[:, 1]) for own in series], axis=0)
