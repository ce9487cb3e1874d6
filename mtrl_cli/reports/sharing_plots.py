"""Plots of sharing sections: differences per task, gradient conflict, matrices of tasks, routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtrl_cli.metric_names import GRAD_CONFLICT
from mtrl_cli.reports import plots
from mtrl_cli.reports.comparison import Benchmark, Variant
from mtrl_cli.stats.bootstrap import Estimate, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

COLUMNS = 4  # of several panels
COLOURS = "RdBu"  # distinguishable with red-green colour blindness
NAMED_TASKS = 20
"""For more tasks there is no space for names, or for numbers in the cells."""


def differences(benchmark: Benchmark, by_task: Mapping[str, Sequence[Estimate]]) -> Figure:
    """Draw each task's difference in each variant: blue for gains, red for losses, framed where the interval excludes 0."""
    values_RK = np.array([[each.value for each in tasks] for tasks in by_task.values()])
    signs_RK = np.array([[each.sign for each in tasks] for tasks in by_task.values()])
    rows, columns = values_RK.shape
    figure, ((axes,),) = plots.grid(1, 1)
    figure.set_size_inches(max(4.5, 2.6 + 0.85 * min(columns, NAMED_TASKS)), 1.8 + 0.42 * rows)
    shades_RK = values_RK / _scales(benchmark, values_RK)
    image = _cells(axes, shades_RK, COLOURS, -1.0)
    _name_cells(axes, list(by_task), benchmark.tasks)
    for row, column in np.argwhere(signs_RK != 0):
        _frame(axes, row, column)
    if columns <= NAMED_TASKS:
        for (row, column), value in np.ndenumerate(values_RK):
            weight = "bold" if signs_RK[row, column] else "normal"
            colour = "white" if abs(shades_RK[row, column]) > 0.6 else "black"
            axes.text(column, row, _signed(value), ha="center", va="center", fontsize=8, fontweight=weight, color=colour)
    bar = figure.colorbar(image, ax=axes, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["lost", "0", "gained"])
    return figure


def _scales(benchmark: Benchmark, values_RK: Floats) -> Floats:
    """Return the divisors of differences for their colours, `[K]`: one for all scores, one for each task with returns."""
    largest_K = np.abs(values_RK).max(axis=0)
    is_scored_K = np.array([task in benchmark.scored for task in benchmark.tasks])
    largest_K[is_scored_K] = largest_K[is_scored_K].max(initial=0)
    return np.where(largest_K > 0, largest_K, 1)


def _frame(axes: Axes, row: int, column: int) -> None:
    """Frame a cell along the inside of its edges: the outer half of the line is clipped, so it cannot belong to a neighbour."""
    from matplotlib.patches import Rectangle

    frame = axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=3.6))
    frame.set_clip_path(frame)


def _signed(value: float) -> str:
    text = f"{value:+.2f}" if abs(value) < 10 else f"{value:+,.0f}"
    return text if float(text.replace(",", "")) else text[1:]


def matrices(tables: Mapping[str, Floats], tasks: Sequence[str], *, of_choices: bool = False) -> Figure:
    """Draw a panel for each name: a matrix of tasks by tasks with values from -1 to 1, or of tasks by choices with shares from 0 to 1."""
    figure, axes = plots.grid(len(tables), COLUMNS)
    rows, columns = axes.shape
    figure.set_size_inches(3.0 * columns + 0.8, 2.9 * rows)
    for place, (panel, (name, table)) in enumerate(zip(axes.flat, tables.items(), strict=False)):
        image = _cells(panel, table, "Blues" if of_choices else COLOURS, 0.0 if of_choices else -1.0)
        panel.set_title(name, fontsize=9)
        is_left, is_last = place % columns == 0, place + columns >= len(tables)
        choices = [str(choice) for choice in range(table.shape[1])]
        _name_cells(panel, tasks if is_left else [], choices if of_choices else tasks if is_last else [], fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _cells(axes: Axes, table: Floats, colours: str, lowest: float) -> QuadMesh:
    """Draw values as colours from `lowest` to 1, the first row at the top; cells have no edges, so that no seams appear."""
    no_edges: dict[str, Any] = {"edgecolors": "none", "antialiased": False, "linewidth": 0, "snap": True}
    x, y = (np.arange(size + 1) - 0.5 for size in table.shape[::-1])
    image = axes.pcolormesh(x, y, table, cmap=colours, vmin=lowest, vmax=1, **no_edges)
    axes.invert_yaxis()
    return image


def _name_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str], fontsize: int = 8) -> None:
    shown = columns if len(columns) <= NAMED_TASKS else []
    axes.set_yticks(range(len(rows)), rows, fontsize=fontsize)
    axes.set_xticks(range(len(shown)), shown, fontsize=fontsize, rotation=35, ha="right")
    axes.tick_params(length=0)


def conflict(variants: Sequence[Variant]) -> Figure:
    """Draw the share of task pairs with conflicting gradients over training: the mean over runs."""
    curves = {each.name: plots.Curve(*conflict_over_training(each)) for each in variants}
    figure = plots.lines({"": curves}, plots.colours(list(curves)), "steps per task", "conflicting pairs")
    figure.axes[0].set_ylim(0, 1)
    return figure


def conflict_over_training(variant: Variant) -> tuple[Floats, Floats]:
    """Return steps `[P]` and the share of conflicting pairs at these steps, as a mean over runs `[P]`.

    Diagnostics of runs may be at different steps: each run is interpolated linearly, within the range that all runs cover.
    """
    series = [np.array(run.metrics[GRAD_CONFLICT], float) for run in variant.runs if run.metrics.get(GRAD_CONFLICT)]
    first, last = max(own[0, 0] for own in series), min(own[-1, 0] for own in series)
    steps = np.unique(np.concatenate([own[:, 0] for own in series]))
    steps_P = steps[(steps >= first) & (steps <= last)]
    return steps_P, np.mean([np.interp(steps_P, own[:, 0], own[:, 1]) for own in series], axis=0)
