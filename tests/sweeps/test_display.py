"""Progress display of a sweep: a table that fits the terminal, plain lines otherwise, and the remaining time."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from mtrl_cli.sweeps.display import SweepDisplay, TrialRow, seconds_left
from tests.helpers.displays import Clock, rendered, set_size


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def row(number: int, state: str, **changes: object) -> TrialRow:
    done = {"completed": {"score": number / 100, "step": 1000, "seconds": 60.0}, "running": {"step": 500, "seconds": 30.0}}.get(state, {})
    return replace(TrialRow(number, {"network/sharing": "film", "seed": str(number)}, state, steps=1000), **{**done, **changes})  # type: ignore[arg-type]


def sweep(*states: str) -> list[TrialRow]:
    return [row(number, state) for number, state in enumerate(states)]


def test_plain_output_has_a_line_per_change_and_periodic_summaries(clock: Clock) -> None:
    out = io.StringIO()
    with SweepDisplay(jobs=1, out=out) as shown:
        shown.update(sweep("completed", "running", "waiting"))
        for _ in range(20):
            clock.now += 1
            shown.update(sweep("completed", "running", "waiting"))
        shown.update(sweep("completed", "completed", "running"))
        shown.message("trial 2: its process died; resuming it")
        shown.update([*sweep("completed", "completed"), row(2, "failed", note="not enough memory", seconds=3.0)])
    lines = out.getvalue().splitlines()
    assert lines == [
        "trial 1: running: network/sharing=film seed=1",
        "1 of 3 completed, 1 running, 1 waiting, best 0.000 (trial 0), ETA 1:30",
        "trial 1: completed: network/sharing=film seed=1, 0.010, 1:00",
        "trial 2: running: network/sharing=film seed=2",
        "trial 2: its process died; resuming it",
        "trial 2: failed: network/sharing=film seed=2, 0:03 (not enough memory)",
        "2 of 3 completed, 1 failed, best 0.010 (trial 1)",
    ]


def test_summary_is_printed_every_minute(clock: Clock) -> None:
    out = io.StringIO()
    with SweepDisplay(jobs=1, out=out) as shown:
        for second in range(150):
            clock.now += 1
            shown.update([row(0, "running", step=second)])
    assert len(re.findall("0 of 1 completed", out.getvalue())) == 4, "at the start, after one and two minutes, and at the end"


def test_remaining_time_is_remaining_steps_at_the_mean_speed() -> None:
    assert seconds_left(sweep("waiting", "waiting"), jobs=2) is None, "no trial has been timed yet"
    # 2 x 1,000 steps in 60 s each and 500 in 30 s: 0.06 s per step; 500 + 3,000 are left, two trials at a time.
    rows = sweep("completed", "completed", "running", "waiting", "waiting", "waiting")
    assert seconds_left(rows, jobs=2) == pytest.approx(0.06 * 3500 / 2)
    # Pruned and failed trials are over; a single trial cannot be split between two jobs.
    rows = [row(0, "completed"), row(1, "pruned", step=200, seconds=12.0), row(2, "failed"), row(3, "running")]
    assert seconds_left(rows, jobs=2) == pytest.approx(0.06 * 500)
    # Other processes run trials, too.
    rows = sweep("completed", "running", "elsewhere", "elsewhere", "elsewhere", *["waiting"] * 8)
    assert seconds_left(rows, jobs=2) == pytest.approx(0.06 * (500 + 11_000) / 4)


def table(rows: list[TrialRow], width: int, height: int) -> str:
    shown = SweepDisplay(jobs=2, out=io.StringIO())
    set_size(shown, width, height)
    shown.update(rows)
    return rendered(shown)


@pytest.mark.parametrize("count", [1, 10, 1000])
@pytest.mark.parametrize(("width", "height"), [(200, 50), (120, 24), (80, 24), (40, 15), (24, 8)])
def test_table_fits_the_terminal_and_shows_all_running_trials(count: int, width: int, height: int) -> None:
    states = ["completed"] * (count // 2) + ["running"] * min(2, count) + ["waiting"] * count
    rows = sweep(*states[:count])
    lines = table(rows, width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    running = [each.number for each in rows if each.state == "running"]
    shown = [int(line.split()[0]) for line in lines if line.split()[:1] and line.split()[0].isdecimal() and "of" not in line.split()[:2]]
    assert set(running) <= set(shown)
    hidden = next((int(line.split()[1]) for line in lines if line.startswith("and ")), 0)
    assert len(shown) + hidden == count


def test_table_has_a_row_per_trial() -> None:
    text = table([*sweep("completed", "running"), row(2, "failed", note="[red] no memory")], 120, 24)
    cells = {line.split()[0]: line.split() for line in text.splitlines()[:-1]}
    assert cells["0"] == ["0", "network/sharing=film", "seed=0", "completed", "0.000", "100%", "1:00"]
    assert cells["1"] == ["1", "network/sharing=film", "seed=1", "running", "-", "50%", "0:30"]
    assert cells["2"] == ["2", "network/sharing=film", "seed=2", "failed", "-", "-", "-", "[red]", "no", "memory"], (
        "text is not interpreted as markup"
    )


def test_most_recently_ended_trials_are_shown() -> None:
    shown = SweepDisplay(jobs=1, out=io.StringIO())
    set_size(shown, 80, 9)
    rows = sweep(*["running"] * 9)
    shown.update(rows)
    for number in (8, 3, 5, 0, 1, 2, 4, 6, 7):
        rows[number] = row(number, "completed")
        shown.update(rows)
    assert [line.split()[0] for line in rendered(shown).splitlines()[1:6]] == ["1", "2", "4", "6", "7"]
