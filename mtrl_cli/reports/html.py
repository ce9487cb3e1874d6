"""Report files: one self-contained HTML page, each table as CSV and Markdown, each picture as SVG and PNG.

`page.html.jinja` is the page. It escapes all text, because names, errors and commands come from run folders.
"""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from mtrl_cli.machine import extras
from mtrl_cli.reports.elements import Cell, GivenNumber, Picture, Section, Table
from mtrl_cli.stats.bootstrap import Estimate

MAX_ROWS = 1000
"""Rows of a table on the page; its CSV file has all rows."""
DPI = 120  # of PNG files
INK = "#0b0c0d"
"""Colour of text and axes in drawings; on the page it is replaced by the colour of the surrounding text."""
STYLE: Any = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "axes.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "mtrl",
    "font.size": 10,
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def require() -> None:
    """Raise UserError unless matplotlib is installed."""
    extras.require("mtrl report", "matplotlib", "plots")


def render(title: str, lead: Sequence[str], sections: Sequence[Section]) -> dict[str, bytes]:
    """Render all files of a report, by name: index.html and the files of each table and picture.

    Raises:
        ValueError: two tables or two pictures have the same name, or two sections the same anchor.
    """
    parts = [part for section in sections for part in section.parts]
    tables, pictures = ([part.name for part in parts if isinstance(part, kind)] for kind in (Table, Picture))
    for names in (tables, pictures, [section.anchor for section in sections]):
        if len(set(names)) < len(names):
            raise ValueError(f"two parts of a report have the same name: {sorted(names)}")
    files: dict[str, bytes] = {}
    drawings: dict[str, Drawing] = {}
    for part in parts:
        if isinstance(part, Table):
            files |= {f"{part.name}.csv": _encode(as_csv(part)), f"{part.name}.md": _encode(as_markdown(part))}
        else:
            drawings[part.name], files[f"{part.name}.svg"], files[f"{part.name}.png"] = _draw(part)
    page = _template().render(title=title, lead=lead, sections=sections, drawings=drawings, font=FONT, max_rows=MAX_ROWS)
    return files | {"index.html": _encode(page)}


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("mtrl_cli", "reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell_text": cell_text, "number_columns": _number_columns}
    environment.tests |= {"interval": lambda cell: isinstance(cell, Estimate), "picture": lambda part: isinstance(part, Picture)}
    return environment.get_template("page.html.jinja")


def _encode(text: str) -> bytes:
    """Encode as UTF-8. Lone surrogates, as in folder names that are not UTF-8, become question marks."""
    return text.encode(errors="replace")


# -- tables ---------------------------------------------------------------------------------------------------------------------


def _number_columns(table: Table) -> list[bool]:
    """Return, for each column, whether the page aligns it as numbers."""
    return [index > 0 and not any(isinstance(row[index], str) for row in table.rows[:MAX_ROWS]) for index in range(len(table.header))]


def cell_text(cell: Cell) -> str:
    """Format a cell for the page: numbers rounded, intervals in parentheses."""
    if isinstance(cell, Estimate):
        return cell_text(cell.value) + ("" if cell.low is None else f" ({cell_text(cell.low)} to {cell_text(cell.high)})")
    if cell is None or isinstance(cell, str):
        return cell or ""
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, GivenNumber):
        return f"{cell:.4g}"
    if math.isinf(cell):
        return "never"
    digits = 0 if abs(cell) >= 1000 else 1 if abs(cell) >= 100 else 2 if abs(cell) >= 10 else 3
    text = f"{cell:,.{digits}f}"
    return text if text.strip("-0.") else text.lstrip("-")


def as_csv(table: Table) -> str:
    """Format a table as CSV with unrounded numbers. A column with intervals becomes three columns: value, low, high."""
    widths = [3 if any(isinstance(row[column], Estimate) for row in table.rows) else 1 for column in range(len(table.header))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in [[(name, f"{name} low", f"{name} high") for name in table.header], *(map(_values, row) for row in table.rows)]:
        writer.writerow([_escape_formula(value) for values, width in zip(row, widths, strict=True) for value in values[:width]])
    return out.getvalue()


def _values(cell: Cell) -> tuple[Cell, Cell, Cell]:
    return (cell.value, cell.low, cell.high) if isinstance(cell, Estimate) else (cell, None, None)


def _escape_formula(cell: Cell) -> Cell:
    """Prefix text that a spreadsheet would read as a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") and len(cell) > 1 else cell


def as_markdown(table: Table) -> str:
    """Format a table as Markdown with the numbers of the page."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([|\\`*_\[\]<>])", r"\\\1", " ".join(cell.split())) for cell in cells) + " |"

    lines = [f"# {' '.join(table.title.split())}", "", row(table.header), "|" + " --- |" * len(table.header)]
    lines += [row([cell_text(cell) for cell in cells]) for cells in table.rows]
    return "\n".join([*lines, *(part for note in table.notes for part in ("", note))]) + "\n"


# -- pictures -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A picture for the page: content of the SVG element, its viewBox and its width in pixels."""

    content: str
    view_box: str
    width: int


def _draw(picture: Picture) -> tuple[Drawing, bytes, bytes]:
    """Draw a picture for the page, as an SVG file and as a PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that is missing in the font of the PNG file
        figure = picture.draw()
        png, drawn = io.BytesIO(), io.StringIO()
        figure.set_dpi(DPI)
        figure.set_facecolor("white")
        FigureCanvasAgg(figure).print_png(png)
        figure.set_layout_engine("none")  # the layout is computed once; print_figure would compute it for each file
        figure.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None})
    text = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, drawn.getvalue())
    opening, inner = re.search(r"(<svg[^>]*>)(.*)</svg>", text, re.DOTALL).groups()  # type: ignore[union-attr]
    svg = f'{opening}<rect width="100%" height="100%" fill="#ffffff"/>{inner}</svg>\n'
    # The page has one namespace of ids and of style rules, so ids get a prefix and <style> is removed.
    content = re.sub(r"<(metadata|style)\b.*?</\1>", "", inner, flags=re.DOTALL).replace(INK, "currentColor")
    content = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{picture.name}-", content)
    view_box = re.search(r'viewBox="([\d. ]+)"', opening)
    assert view_box is not None
    return Drawing(content, view_box[1], round(figure.get_size_inches()[0] * 96)), _encode(svg), png.getvalue()
