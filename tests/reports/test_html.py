"""Report files: escaping, rounding and file formats."""

from __future__ import annotations

import csv
import math
import xml.etree.ElementTree as ET

import pytest

from mtrl_cli.reports import html
from mtrl_cli.reports.elements import Picture, Section, Table
from mtrl_cli.stats.bootstrap import Estimate

ROWS = [["=1+1|<b>", Estimate(0.12345, 0.1, math.inf), 1234], ["-", None, None]]
TABLE = Table("t", "A | title", ["name", "score", "=count"], ROWS)
HOSTILE = """<script>alert(1)</script>"'&{{ 7 * 7 }}"""


def _page(*parts: Table | Picture, title: str = "Title", lead: tuple[str, ...] = (), lines: tuple[str, ...] = ()) -> str:
    return html.render(title, lead, [Section("one", title, lines, parts)])["index.html"].decode()


def _picture(name: str = "p", text: str = "a line") -> Picture:
    from matplotlib.figure import Figure

    def draw() -> Figure:
        figure = Figure()
        figure.subplots().set_title(text)
        return figure

    return Picture(name, text, text, draw, [text])


def test_csv_holds_unrounded_numbers_and_no_formula() -> None:
    assert list(csv.reader(html.as_csv(TABLE).splitlines())) == [
        ["name", "score", "score low", "score high", "'=count"],
        ["'=1+1|<b>", "0.12345", "0.1", "inf", "1234"],
        ["-", "", "", "", ""],
    ]


def test_markdown_and_page_round_numbers_and_escape_text() -> None:
    assert html.as_markdown(TABLE).splitlines()[4] == r"| =1+1\|\<b\> | 0.123 (0.100 to never) | 1,234 |"
    page = _page(TABLE, title="<title>", lead=("a & b",))
    assert "=1+1|&lt;b&gt;" in page
    assert "<title>&lt;title&gt;</title>" in page
    assert "<p>a &amp; b</p>" in page
    assert '<td class="number">0.123 <span class="interval">(0.100 to never)</span></td>' in page


def test_every_text_on_the_page_is_escaped() -> None:
    pytest.importorskip("matplotlib")
    table = Table("t", HOSTILE, [HOSTILE, "command", HOSTILE], [[HOSTILE, HOSTILE, Estimate(1.0)]], [HOSTILE])
    page = _page(table, _picture(text=HOSTILE), title=HOSTILE, lead=(HOSTILE,), lines=(HOSTILE,))
    assert "<script" not in page
    assert "49" not in page.partition("<body>")[2].partition("<svg")[0]
    tree = ET.fromstring(page.partition("<body>")[2].partition("</body>")[0].join(["<body>", "</body>"]))
    texts = [each.text for each in tree.iter() if each.text and "script" in each.text]
    assert len(texts) == 14
    assert {text.strip() for text in texts} == {HOSTILE}
    assert tree.find(".//figure//*[@role='img']").attrib["aria-label"] == HOSTILE  # type: ignore[union-attr]
    assert all(not name.startswith("on") for each in tree.iter() for name in each.attrib)


def test_long_table_is_cut_on_the_page_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MAX_ROWS", 2)
    made = html.render("", [], [Section("one", "One", [], [Table("t", "T", ["n"], [[str(row)] for row in range(3)])])])
    assert made["index.html"].decode().count('<th scope="row">') == 2
    assert "The first 2 of 3 rows; t.csv has all." in made["index.html"].decode()
    assert len(made["t.csv"].splitlines()) == 4


def test_ids_of_two_pictures_do_not_collide() -> None:
    pytest.importorskip("matplotlib")
    page = _page(_picture("first"), _picture("second"))
    ids = [
        each.attrib["id"]
        for each in ET.fromstring(page[page.index("<main>") : page.index("</main>")] + "</main>").iter()
        if "id" in each.attrib
    ]
    assert len(ids) == len(set(ids)) > 10


def test_two_parts_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        html.render("", [], [Section("one", "One", [], [TABLE, TABLE])])
