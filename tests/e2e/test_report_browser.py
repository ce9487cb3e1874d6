"""Report page in headless Chromium: rendering, no network access, links, and readability on a phone and in dark mode."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.reports import command as report_command
from tests.helpers.fake_runs import make_run, make_sweep
from tests.helpers.required import skip_or_fail
from tests.helpers.shared import Shared

HOSTILE = "<script>document.title='owned'</script>\"'&<img src=http://localhost:9/x onerror=alert(1)>"
READABLE = 9.0  # px
CASES = ("sweep", "empty", "one_seed", "hostile", "packs")

COLOURS = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const texts = [...document.querySelectorAll('h1, h2, h3, p, th, td, li a, .interval, code')]
    .map(each => [contrast(rgb(getComputedStyle(each).color), paper(each)), each.textContent.slice(0, 40)]);
  const drawn = ['curves_over_steps', 'scores_over_tasks_picture']
    .flatMap(name => [...document.querySelectorAll(`[id^="${name}"][id*="text_"] text`)])
    .map(each => [contrast(rgb(getComputedStyle(each).fill), paper(each)), each.textContent]);
  return {texts, drawn, paper: light(paper(document.body))};
}"""
"""Contrast ratios (WCAG 2) of the text of the page and of the score plots."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("matplotlib")
    chromium = shutil.which("chromium")
    if chromium is None:
        skip_or_fail("browser", "chromium is not installed: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        skip_or_fail("browser", "playwright is not installed (make test installs it)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"], timeout=60_000
        )
        yield started
        started.close()


@pytest.fixture
def pages(shared: Shared) -> dict[str, Path]:
    """The report page of each case."""
    pytest.importorskip("matplotlib")
    root = shared.folder("reports", make_pages)
    return {case: root / case / "report" / "index.html" for case in (*CASES, "long_words")}


def make_pages(root: Path) -> None:
    """Write the runs, sweeps and pages of all cases."""
    axes = {"network/sharing": ["independent", "hard", "film"], "optimizer.lr": ["1e-3", "1e-4", "3e-4", "1e-5"], "seed": [0, 1]}
    states = {1: "failed", 3: "pruned", 5: "running", 7: "waiting"}
    make_sweep(root / "sweep", axes, states=states, whys={1: "CUDA out of memory"}, evaluations=3, rows=9)
    make_sweep(root / "empty", {"network/sharing": ["hard", "film"], "seed": [0]}, states={0: "waiting", 1: "uncomposed"})
    make_run(root / "one_seed" / "only")
    _make_hostile(root / "hostile")
    make_run(root / "packs" / "a", ["env=classic_pack"], evaluations=3)
    make_run(root / "packs" / "b", ["env=minatar_pack"], evaluations=3, status="failed", error="it broke")
    make_run(root / "packs" / "c", ["env=minatar_pack", "network/sharing=film"], evaluations=3, scored=False)
    make_sweep(root / "long_words", {"agent.target_period": [1000, 10_000], "seed": [0]}, evaluations=2, rows=6)
    for case in (*CASES, "long_words"):
        report_command.run([root / case], None, ["mtrl", "report", str(root / case)])


def _make_hostile(folder: Path) -> None:
    """Create runs whose names, errors and folders try to inject markup or break a plot."""
    for seed in (0, 1):
        run = make_run(folder / f"<script>alert({seed})<" / "img onerror=alert(1)", seed=seed, evaluations=2)
        for name in ("config.yaml", "metrics.jsonl", "eval/test.json"):
            text = (run / name).read_text()
            word = json.dumps(HOSTILE)[1:-1] if name != "config.yaml" else ""
            (run / name).write_text(text.replace("asterix", word) if word else text.replace("- asterix", f"- {json.dumps(HOSTILE)}"))
    make_run(folder / "$\\frac{_", status="failed", error=HOSTILE + "\n\x1b[31m\u202e")
    broken = make_run(folder / "javascript:alert(1)")
    (broken / "run.json").write_text(json.dumps({"status": HOSTILE}))


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page of a case. Fails at the end if the page used the network, the console or a dialog."""
    case, width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda sent: troubles.append(f"request: {sent.url}") if not sent.url.startswith(("file:", "data:")) else None)
    page.goto(pages[case].as_uri())
    yield page
    page.close()
    assert troubles == []


def every(width: int = 1280, scheme: str = "light", cases: tuple[str, ...] = CASES) -> Any:
    return pytest.mark.parametrize("opened", [(case, width, scheme) for case in cases], ids=cases, indirect=True)


@every()
def test_page_has_ordered_headings_and_working_links(opened: Any) -> None:
    assert opened.title().startswith("Report: ")
    assert opened.locator("script").count() == 0
    levels = opened.eval_on_selector_all("h1, h2, h3", "all => all.map(each => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    here = Path(opened.url.removeprefix("file://")).parent
    links = opened.eval_on_selector_all("a", "all => all.map(each => each.getAttribute('href'))")
    assert links
    ids = set(opened.eval_on_selector_all("[id]", "all => all.map(each => each.id)"))
    for link in links:
        assert link.removeprefix("#") in ids if link.startswith("#") else (here / link).is_file(), link
    assert len(ids) == opened.locator("[id]").count()
    drawn_from = opened.eval_on_selector_all("use", "all => all.map(each => each.getAttribute('xlink:href').slice(1))")
    assert set(drawn_from) <= ids


@every(cases=("sweep",))
def test_table_of_contents_links_scroll_to_their_sections(opened: Any) -> None:
    for link in opened.locator("nav a").all():
        link.click()
        anchor = link.get_attribute("href")
        top = opened.evaluate("anchor => document.querySelector(anchor).getBoundingClientRect().top", anchor)
        at_the_end = opened.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
        assert 0 <= top < 100 or at_the_end, anchor


@every(cases=("sweep", "one_seed", "packs", "hostile"))
def test_plots_are_visible_and_have_text_descriptions(opened: Any) -> None:
    pictures = opened.locator("figure svg").all()
    assert pictures
    for picture in pictures:
        box = picture.bounding_box()
        assert box["width"] > 300, picture.get_attribute("aria-label")
        assert box["height"] > 60
        assert picture.get_attribute("role") == "img"
        assert len(picture.get_attribute("aria-label")) > 20
    lines = opened.eval_on_selector_all("figure svg path", "all => all.filter(each => each.getBoundingClientRect().width > 20).length")
    assert lines > len(pictures)


@every(width=390)
def test_page_on_a_phone_does_not_scroll_sideways_and_text_is_readable(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = opened.eval_on_selector_all(
        "p, th, td, li, figure svg text",
        "all => all.filter(each => each.textContent.trim()).map(each => {"
        " const svg = each.closest('svg');"
        " const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;"
        " return [parseFloat(getComputedStyle(each).fontSize) * scale, each.textContent.slice(0, 40)]; })",
    )
    small = [(size, text) for size, text in sizes if size < READABLE]
    assert small == []


@every(width=390, cases=("long_words",))
def test_words_in_first_table_columns_are_not_broken_on_a_phone(opened: Any) -> None:
    broken = opened.eval_on_selector_all(
        "tbody th",
        "all => all.flatMap(each => [...each.textContent.matchAll(/[^\\s]+/g)].filter(word => {"
        " const range = document.createRange();"
        " range.setStart(each.firstChild, word.index); range.setEnd(each.firstChild, word.index + word[0].length);"
        " const tops = [...range.getClientRects()].map(box => box.top);"
        " return Math.max(...tops) > Math.min(...tops); }).map(word => word[0]))",
    )
    assert broken == []


@pytest.mark.parametrize("opened", [("sweep", 1280, scheme) for scheme in ("light", "dark")], ids=("light", "dark"), indirect=True)
def test_text_has_sufficient_contrast_in_light_and_dark_mode(opened: Any) -> None:
    found = opened.evaluate(COLOURS)
    assert (found["paper"] < 0.1) == opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert len(found["drawn"]) > 10
    assert [text for contrast, text in found["texts"] + found["drawn"] if contrast < 4.5] == []


@every(cases=("empty",))
def test_page_without_a_completed_run_states_it(opened: Any) -> None:
    assert "No run is completed yet, so nothing is compared." in opened.inner_text("body")
    assert opened.locator("figure").count() == 0


@every(cases=("one_seed",))
def test_page_with_one_seed_states_that_there_are_no_intervals(opened: Any) -> None:
    assert "One seed of each configuration: there are no intervals" in opened.inner_text("main")


@every(cases=("packs",))
def test_page_with_different_packs_states_that_they_cannot_be_compared(opened: Any) -> None:
    text = opened.inner_text("body")
    assert "Runs with different packs, tasks or budgets cannot be compared" in text
    assert "it broke" in text


@every(cases=("hostile",))
def test_hostile_text_is_shown_escaped(opened: Any) -> None:
    assert opened.title() != "owned"
    text = opened.inner_text("main")
    assert "<script>document.title='owned'</script>" in text
    assert opened.locator("img").count() == 0
    assert "status must be one of" in text


@every(cases=("sweep",))
def test_runs_outside_the_comparison_are_listed(opened: Any) -> None:
    text = opened.inner_text("section[aria-labelledby=runs]")
    for word in ("failed", "CUDA out of memory", "pruned", "running", "waiting", "mtrl train env=minatar_pack network/sharing=film"):
        assert word in text
