"""A report's files: one page that loads nothing from anywhere, and each table as CSV and Markdown, each picture as SVG and PNG.

What runs and strangers have written (names, errors, commands) is escaped, and no script is on the page.
"""

from __future__ import annotations

import csv
import html
import importlib.util
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from mtrl_cli.errors import UserError
from mtrl_cli.reports.elements import Cell, GivenNumber, Picture, Section, Table
from mtrl_cli.stats.bootstrap import Estimate

MOST_ROWS = 1000
"""Of a table on the page; its CSV has all."""
DPI = 120  # of PNG files
INK = "#0b0c0d"
"""What text and axes are drawn with; on the page it becomes the colour of the text around them."""
STYLE: Any = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mtrl",
    "text.parse_math": False,
    "font.size": 10,
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
CSS = """
:root { color-scheme: light dark; --ink: #1c1f23; --quiet: #59616b; --paper: #ffffff; --line: #d9dde2; --soft: #f4f6f8; --link: #0b5fc0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --quiet: #a3acb8; --paper: #14171b; --line: #343a42; --soft: #1d2127; --link: #7db7ff; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 FONT; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0.5rem 0 0.75rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 2rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
a { color: var(--link); }
nav ul { list-style: none; margin: 1rem 0 0; padding: 0.75rem 1rem; background: var(--soft); border-radius: 0.5rem; columns: 2 18rem; }
nav li { padding: 0.15rem 0; break-inside: avoid; }
.scroll { overflow-x: auto; margin: 0.5rem 0; border: 1px solid var(--line); border-radius: 0.5rem; }
.tall { max-height: 36rem; overflow-y: auto; }
table { border-collapse: collapse; min-width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
thead th { background: var(--soft); position: sticky; top: 0; vertical-align: bottom; }
thead th:first-child { left: 0; z-index: 1; }
th { overflow-wrap: normal; }
tbody th { font-weight: 600; min-width: 6rem; max-width: 22rem; position: sticky; left: 0; background: var(--paper); }
td.number, th.number { text-align: right; white-space: nowrap; }
td.text { max-width: 34rem; min-width: 4rem; }
td.long { min-width: 15rem; }
td code { font: 0.85em ui-monospace, 'DejaVu Sans Mono', monospace; overflow-wrap: anywhere; display: inline-block; min-width: 16rem; }
.interval { color: var(--quiet); }
.quiet { color: var(--quiet); font-size: 0.9rem; }
figure { margin: 0.5rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.picture { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 40rem) { body { padding: 1rem 1rem 3rem; } h1 { font-size: 1.45rem; } .picture svg { min-width: var(--least); }
  tbody th { max-width: none; } }
@media print { .scroll, .tall { overflow: visible; max-height: none; } nav { display: none; } }
""".replace("FONT", FONT)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mtrl report">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{lead}
</header>
<nav aria-label="Contents"><ul>
{contents}
</ul></nav>
<main>
{main}
</main>
</body>
</html>
"""


def require() -> None:
    """Raise UserError unless pictures can be drawn: for before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("mtrl report draws its pictures with matplotlib: pip install 'mtrl_cli[plots]'")


def render(title: str, lead: Sequence[str], sections: Sequence[Section]) -> dict[str, bytes]:
    """All files of a report by name: index.html, and beside it those of each table and picture.

    Raises ValueError where two parts have the same name, or two sections the same anchor.
    """
    names = [part.name for section in sections for part in section.parts]
    anchors = [section.anchor for section in sections]
    for same in (names, anchors):
        if len(set(same)) < len(same):
            raise ValueError(f"two parts of a report have the same name: {sorted(same)}")
    made: dict[str, bytes] = {}
    main = "\n".join(_section(section, made) for section in sections)
    contents = "\n".join(f'<li><a href="#{section.anchor}">{_text(section.title)}</a></li>' for section in sections)
    page = PAGE.format(title=_text(title), css=CSS, lead=_paragraphs(lead), contents=contents, main=main)
    return made | {"index.html": _encoded(page)}


def _section(section: Section, made: dict[str, bytes]) -> str:
    parts = [_table(part, made) if isinstance(part, Table) else _picture(part, made) for part in section.parts]
    inner = "\n".join([_paragraphs(section.lines), *parts])
    return f'<section aria-labelledby="{section.anchor}">\n<h2 id="{section.anchor}">{_text(section.title)}</h2>\n{inner}\n</section>'


def _paragraphs(lines: Sequence[str], kind: str = "") -> str:
    return "\n".join(f"<p{kind}>{_text(line)}</p>" for line in lines)


def _text(value: str) -> str:
    return html.escape(value)


def _encoded(text: str) -> bytes:
    """A file's text; halves of letters, such as of a folder's name that is not UTF-8, become question marks."""
    return text.encode(errors="replace")


# -- tables ---------------------------------------------------------------------------------------------------------------------


def _table(table: Table, made: dict[str, bytes]) -> str:
    made[f"{table.name}.csv"] = _encoded(as_csv(table))
    made[f"{table.name}.md"] = _encoded(as_markdown(table))
    shown = table.rows[:MOST_ROWS]
    numeric = [all(not isinstance(row[column], str) for row in shown) and column > 0 for column in range(len(table.header))]
    codes = [name == "command" for name in table.header]
    head = "".join(f'<th scope="col"{_kind(number)}>{_text(name)}</th>' for name, number in zip(table.header, numeric, strict=True))
    body = "\n".join(
        "<tr>" + "".join(_cell(cell, index, numeric[index], codes[index]) for index, cell in enumerate(row)) + "</tr>" for row in shown
    )
    left_out = [f"The first {MOST_ROWS:,} of {len(table.rows):,} rows; {table.name}.csv has all."] if len(table.rows) > MOST_ROWS else []
    tall = " tall" if len(shown) > 20 else ""
    return (
        f"<h3>{_text(table.title)}</h3>\n"
        f'<div class="scroll{tall}" role="region" tabindex="0" aria-label="{_text(table.title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
        + _paragraphs([*table.notes, *left_out], ' class="quiet"')
        + _files(table.name, {"csv": "CSV", "md": "Markdown"}, table.title)
    )


def _kind(number: bool) -> str:
    return ' class="number"' if number else ""


def _cell(cell: Cell, column: int, number: bool, code: bool) -> str:
    if column == 0:
        return f'<th scope="row">{_text(_words(cell))}</th>'
    if isinstance(cell, Estimate):
        ends = "" if cell.low is None else f' <span class="interval">({_ends(cell)})</span>'
        return f'<td class="number">{_words(cell.value)}{ends}</td>'
    text = _text(_words(cell))
    kind = "number" if number else "text long" if len(text) > 30 else "text"
    return f'<td class="{kind}">{f"<code>{text}</code>" if code and text else text}</td>'


def _words(cell: Cell) -> str:
    """A cell for people: numbers rounded, with the interval in brackets."""
    if isinstance(cell, Estimate):
        return _words(cell.value) + ("" if cell.low is None else f" ({_ends(cell)})")
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


def _ends(cell: Estimate) -> str:
    return f"{_words(cell.low)} to {_words(cell.high)}"


def as_csv(table: Table) -> str:
    """A table with its numbers in full; a column that holds an interval is three: the value, `… low`, `… high`."""
    wide = [any(isinstance(row[column], Estimate) for row in table.rows) for column in range(len(table.header))]
    header = [
        name for own, is_wide in zip(table.header, wide, strict=True) for name in ([own, f"{own} low", f"{own} high"] if is_wide else [own])
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_harmless, header))
    for row in table.rows:
        cells: list[Cell] = []
        for cell, is_wide in zip(row, wide, strict=True):
            if isinstance(cell, Estimate):
                cells += [cell.value, cell.low, cell.high]
            else:
                cells += [_harmless(cell), None, None] if is_wide else [_harmless(cell)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def _harmless(cell: Cell) -> Cell:
    """A word that no spreadsheet takes for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") and len(cell) > 1 else cell


def as_markdown(table: Table) -> str:
    """A table as it stands on the page."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([|\\`*_\[\]<>])", r"\\\1", " ".join(cell.split())) for cell in cells) + " |"

    lines = [f"# {' '.join(table.title.split())}", "", row(table.header), "|" + " --- |" * len(table.header)]
    lines += [row([_words(cell) for cell in cells]) for cells in table.rows]
    return "\n".join([*lines, *(part for note in table.notes for part in ("", note))]) + "\n"


def _files(name: str, kinds: dict[str, str], title: str) -> str:
    links = " · ".join(f'<a href="{name}.{end}" aria-label="{_text(title)} as {kind}">{kind}</a>' for end, kind in kinds.items())
    return f'<p class="quiet">{links}</p>'


# -- pictures -------------------------------------------------------------------------------------------------------------------


def _picture(picture: Picture, made: dict[str, bytes]) -> str:
    drawn, width, made[f"{picture.name}.png"] = _draw(picture)
    opening, inner = re.match(r"(<svg[^>]*>)(.*)</svg>", drawn, re.DOTALL).groups()  # type: ignore[union-attr]
    made[f"{picture.name}.svg"] = _encoded(f'{opening}<rect width="100%" height="100%" fill="#ffffff"/>{inner}</svg>\n')
    view = re.search(r'viewBox="([\d. ]+)"', opening)
    assert view is not None
    # On a page, ids are the page's, and so are the rules of a style element.
    inner = re.sub(r"<(metadata|style)\b.*?</\1>", "", inner, flags=re.DOTALL).replace(INK, "currentColor")
    inner = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{picture.name}-", inner)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" viewBox="{view[1]}" '
        f'aria-label="{_text(picture.text)}" style="max-width: {width:.0f}px; --least: {width:.0f}px">{inner}</svg>'
    )
    return (
        f"<h3>{_text(picture.title)}</h3>\n"
        f'<figure><div class="picture" role="region" tabindex="0" aria-label="{_text(picture.title)}">{svg}</div></figure>\n'
        + _paragraphs(picture.notes, ' class="quiet"')
        + _files(picture.name, {"svg": "SVG", "png": "PNG"}, picture.title)
    )


def _draw(picture: Picture) -> tuple[str, float, bytes]:
    """A picture as SVG from its first tag on, its width in pixels, and as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the PNG's font does not have
        figure = picture.draw()
        png, drawn = io.BytesIO(), io.StringIO()
        figure.set_dpi(DPI)
        figure.set_facecolor("white")
        FigureCanvasAgg(figure).print_png(png)
        figure.set_layout_engine("none")  # it is laid out once, and each file drawn once: print_figure would do all of it twice
        figure.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None})
    text = drawn.getvalue()
    text = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, text)
    return text[text.index("<svg") :].rstrip(), figure.get_size_inches()[0] * 96, png.getvalue()
