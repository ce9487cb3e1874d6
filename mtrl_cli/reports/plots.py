"""Plots of reports: dot plots and line plots, in colours that are distinguishable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtrl_cli.reports.wording import clipped
from mtrl_cli.stats.bootstrap import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82c4", "#d97a1a", "#2a9d6f", "#9d6cc9", "#d1495b", "#a0784f", "#1899ad", "#cf62a2")
OTHERS = "#8d949d"
"""Colour of the groups beyond COLOURS."""
MOST_LINES = len(COLOURS)
MOST_ROWS = 30
COLUMNS = 3  # of panels
WIDTH = 10.9  # inches, of a whole page
LONGEST_LABEL = 44


@dataclass(frozen=True)
class Curve:
    """One line with its band: all [P]; no band for a single seed. `final`: a test result, drawn as a star at the end."""

    x: Any
    y: Any
    low: Any = None
    high: Any = None
    final: float | None = None


def short(label: str, most: int = LONGEST_LABEL) -> str:
    """Shorten a label. A leading `_` gets a space, because matplotlib omits such labels from legends."""
    label = clipped(label, most)
    return f" {label}" if label.startswith("_") else label


def colours(labels: Sequence[str]) -> dict[str, str]:
    """Return the colour of each group, the same in all plots."""
    return {label: COLOURS[index] if index < MOST_LINES else OTHERS for index, label in enumerate(labels)}


def grid(count: int, most_columns: int, **options: Any) -> tuple[Figure, Any]:
    """Create a figure with `count` panels in rows, and return it with the array of its axes; `options` are those of `subplots`."""
    from matplotlib.figure import Figure

    columns = min(most_columns, count)
    figure = Figure(layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, **options)
    for panel in axes.flat[count:]:
        panel.set_visible(False)
    return figure, axes


def dots(panels: Mapping[str, Mapping[str, Estimate]], of: Mapping[str, str], line_at: float | None) -> Figure:
    """Draw one panel per metric with one row per group: the value and its interval.

    Args:
        panels: by title, the estimate of each group.
        of: colours of the groups, in the order of the rows.
        line_at: position of a reference line on an axis of probabilities.
    """
    labels = list(of)[:MOST_ROWS]
    figure, axes = grid(len(panels), len(panels), sharey=True)
    figure.set_size_inches(WIDTH if len(panels) > 1 else 0.7 * WIDTH, 0.9 + 0.27 * len(labels))
    for panel, (title, values) in zip(axes.flat, panels.items(), strict=True):
        for row, label in enumerate(labels):
            own = values[label]
            if own.low is not None and own.high is not None:
                panel.plot([own.low, own.high], [row, row], color=of[label], linewidth=5, alpha=0.4, solid_capstyle="butt")
            panel.plot([own.value], [row], "o", color=of[label], markersize=5)
        if line_at is not None:
            panel.axvline(line_at, color=OTHERS, linewidth=1, linestyle="--")
            panel.set_xlim(-0.02, 1.02)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(range(len(labels)), [short(label) for label in labels])
        panel.set_ylim(len(labels) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.locator_params(axis="x", nbins=4)
        panel.grid(axis="x")
        panel.spines["left"].set_visible(False)
    return figure


def lines(panels: Mapping[str, Mapping[str, Curve]], of: Mapping[str, str], x: str, y: str | Mapping[str, str]) -> Figure:
    """Draw one panel per title with a line and a band per group.

    Args:
        panels: by title, the curve of each group.
        of: colours of the groups; groups beyond `MOST_LINES` are drawn thin, below the others.
        x, y: labels of the axes; y may be given per panel.
    """
    one = len(panels) == 1
    shown = [label for label in of if any(label in own for own in panels.values())]
    named = shown[:MOST_LINES]
    figure, axes = grid(len(panels), COLUMNS)
    figure.set_size_inches(*((0.85 * WIDTH, 4.2) if one else (WIDTH, 2.5 * len(axes) + 0.3 * (1 + len(named) // 4))))
    for panel, (title, own) in zip(axes.flat, panels.items(), strict=False):
        for label in reversed([label for label in shown if label in own]):
            _line(panel, own[label], of[label], is_named=label in named)
        panel.set_title("" if one else short(title), fontsize=10)
        panel.set_xlabel(x)
        panel.set_ylabel(y if isinstance(y, str) else y[title])
        panel.grid()
        panel.margins(x=0.01)
        _few_ticks(panel)
    _legend(figure, named, of, len(shown) - len(named), one)
    return figure


def _line(panel: Axes, curve: Curve, colour: str, is_named: bool) -> None:
    panel.plot(curve.x, curve.y, color=colour, linewidth=1.8 if is_named else 0.7, alpha=1 if is_named else 0.5)
    if is_named and curve.low is not None:
        panel.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    if curve.final is not None:
        panel.plot(curve.x[-1:], [curve.final], "*", color=colour, markersize=9, clip_on=False)


def _legend(figure: Figure, named: Sequence[str], of: Mapping[str, str], others: int, one: bool) -> None:
    """Add a legend with the groups in order: beside a single panel, else above the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=of[label], linewidth=2.5) for label in named]
    labels = [short(label, 30) for label in named]
    if others:
        handles.append(Line2D([], [], color=OTHERS, linewidth=0.9))
        labels.append(f"{others:,} more")
    longest = max(map(len, labels), default=0)
    columns = 1 if one and longest <= 20 else max(1, min(len(labels), 125 // (longest + 8)))
    figure.legend(
        handles, labels, loc="outside right upper" if one and longest <= 20 else "outside upper left", ncols=columns, fontsize=9.5
    )


def _few_ticks(panel: Axes) -> None:
    """Put few ticks on the x-axis, in thousands or millions where numbers are large."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(5))
    if panel.get_xlim()[1] >= 1000:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
