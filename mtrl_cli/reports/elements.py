"""Elements of a report, independent of file formats: sections with tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtrl_cli.stats.bootstrap import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Cell = str | float | int | Estimate | None
"""A table's cell; None is an empty one. Numbers are written in full into CSV and rounded on the page, which shows infinity as `never`.

An estimate has the form `0.83 (0.79 to 0.86)` on the page, and three columns in CSV.
"""


class GivenNumber(float):
    """A configuration value, such as a learning rate: four significant digits on the page, however small it is."""


@dataclass(frozen=True)
class Table:
    """A table: `name` is the name of its files (letters, digits, `_`), `notes` are lines below it."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A drawing: `name` is the name of its files, `text` its description for screen readers, `draw` makes it with matplotlib."""

    name: str
    title: str
    text: str
    draw: Callable[[], Drawing]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page: a heading, paragraphs, then tables and pictures in order. `anchor` is the target of links."""

    anchor: str
    title: str
    lines: Sequence[str] = ()
    parts: Sequence[Table | Picture] = field(default=())
