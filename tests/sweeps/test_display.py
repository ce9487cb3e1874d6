"""What a user sees of a sweep: a table that fits the terminal, plain lines elsewhere, the time left."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from mtrl_cli.runs import terminal
from mtrl_cli.sweeps.display import SweepDisplay, TrialRow


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(terminal.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def row(number: int, state: str, **changes: object) -> TrialRow:
    done = {"completed": {"score": number / 100, "step": 1000, "seconds": 60.0}, "running": {"step": 500, "seconds": 30.0}}.get(state, {})
    return replace(TrialRow(number, ("network/sharing=film", f"seed={number}"), state, steps=1000), **{**done, **changes})  # type: ignore[arg-type]


def sweep(*states: str) -> list[TrialRow]:
    return [row(number, state) for number, state in enumerate(states)]


def test_plain_lines_tell_what_changes_and_a_summary_now_and_then(clock: Clock) -> None:
    out = io.StringIO()
    with SweepDisplay(jobs=1, out=out) as shown:
        shown.update(sweep("completed", "running", "waiting"))
        for _ in range(20):
            clock.now += 1
            shown.update(sweep("completed", "running", "waiting"))
        shown.update(sweep("completed", "completed", "running"))
        shown.message("trial 2: its process died, gone on with")
        shown.update([*sweep("completed", "completed"), row(2, "failed", note="not enough memory", seconds=3.0)])
    lines = out.getvalue().splitlines()
    assert lines == [
        "trial 1: running: network/sharing=film seed=1",
        "1 of 3 completed, 1 running, 1 waiting, best 0.000 (trial 0), ETA 1:30",
        "trial 1: completed: network/sharing=film seed=1, 0.010, 1:00",
        "trial 2: running: network/sharing=film seed=2",
        "trial 2: its process died, gone on with",
        "trial 2: failed: network/sharing=film seed=2, 0:03 (not enough memory)",
        "2 of 3 completed, 1 failed, best 0.010 (trial 1)",
    ]


def test_a_summary_comes_each_minute(clock: Clock) -> None:
    out = io.StringIO()
    with SweepDisplay(jobs=1, out=out) as shown:
        for second in range(150):
            clock.now += 1
            shown.update([row(0, "running", step=second)])
    assert len(re.findall("0 of 1 completed", out.getvalue())) == 4, "at the start, after one and two minutes, and at the end"


def test_the_time_left_is_that_of_the_steps_left_at_the_mean_speed() -> None:
    shown = SweepDisplay(jobs=2, out=io.StringIO())
    shown.update(sweep("waiting", "waiting"))
    assert shown.seconds_left() is None, "nothing was timed yet"
    # 2 x 1,000 steps in 60 s each and 500 in 30 s: 0.06 s a step; 500 + 3,000 are left, two at a time.
    shown.update(sweep("completed", "completed", "running", "waiting", "waiting", "waiting"))
    assert shown.seconds_left() == pytest.approx(0.06 * 3500 / 2)
    # Pruned and failed ones are over; of a single trial there is no half.
    shown.update([row(0, "completed"), row(1, "pruned", step=200, seconds=12.0), row(2, "failed"), row(3, "running")])
    assert shown.seconds_left() == pytest.approx(0.06 * 500)
    # Others work, too.
    shown.update(sweep("completed", "running", "elsewhere", "elsewhere", "elsewhere", *["waiting"] * 8))
    assert shown.seconds_left() == pytest.approx(0.06 * (500 + 11_000) / 4)


def rendered(rows: list[TrialRow], width: int, height: int) -> str:
    shown = SweepDisplay(jobs=2, out=io.StringIO())
    shown.console = Console(file=io.StringIO(), width=width, height=height)
    shown.update(rows)
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(shown.table())
    return out.getvalue()


@pytest.mark.parametrize("count", [1, 10, 1000])
@pytest.mark.parametrize(("width", "height"), [(200, 50), (120, 24), (80, 24), (40, 15), (24, 8)])
def test_the_table_fits_the_terminal_and_shows_what_runs(count: int, width: int, height: int) -> None:
    states = ["completed"] * (count // 2) + ["running"] * min(2, count) + ["waiting"] * count
    rows = sweep(*states[:count])
    lines = rendered(rows, width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    running = [each.number for each in rows if each.state == "running"]
    shown = [int(line.split()[0]) for line in lines if line.split()[:1] and line.split()[0].isdecimal() and "of" not in line.split()[:2]]
    assert set(running) <= set(shown)
    hidden = next((int(line.split()[1]) for line in lines if line.startswith("and ")), 0)
    assert len(shown) + hidden == count


def test_the_table_tells_of_each_trial() -> None:
    text = rendered([*sweep("completed", "running"), row(2, "failed", note="[red] no memory")], 120, 24)
    cells = {line.split()[0]: line.split() for line in text.splitlines()[:-1]}
    assert cells["0"] == ["0", "network/sharing=film", "seed=0", "completed", "0.000", "100%", "1:00"]
    assert cells["1"] == ["1", "network/sharing=film", "seed=1", "running", "-", "50%", "0:30"]
    assert cells["2"] == ["2", "network/sharing=film", "seed=2", "failed", "-", "-", "-", "[red]", "no", "memory"], "nothing is markup"


def test_the_last_that_ended_are_shown() -> None:
    shown = SweepDisplay(jobs=1, out=io.StringIO())
    shown.console = Console(file=io.StringIO(), width=80, height=9)
    rows = sweep(*["running"] * 9)
    shown.update(rows)
    for number in (8, 3, 5, 0, 1, 2, 4, 6, 7):
        rows[number] = row(number, "completed")
        shown.update(rows)
    out = io.StringIO()
    Console(file=out, width=80, height=9).print(shown.table())
    assert [line.split()[0] for line in out.getvalue().splitlines()[1:6]] == ["1", "2", "4", "6", "7"]


ON_A_TERMINAL = """
from mtrl_cli.sweeps.display import SweepDisplay, TrialRow
with SweepDisplay(jobs=1) as shown:
    for step in range(1000):
        shown.update([TrialRow(0, ("seed=0",), "running", step=step, steps=999, seconds=1.0)])
        if step == 500:
            shown.message("trial 0: its process died [again]")
print("the end")
"""


def test_on_a_terminal_the_table_is_drawn_a_few_times_only_and_the_cursor_comes_back() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    data = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            piece = os.read(ours, 2**16)
        except OSError:  # the terminal's other end was closed
            break
        if not piece:
            break
        data += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = data.decode()
    assert "trial 0: its process died [again]" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert 2 <= text.count("seed=0") <= 10, "of 1,000 updates"
    assert "100%" in text, "the last state stays"
    assert text.rstrip().endswith("the end")


def test_a_reader_that_goes_away_does_not_end_the_sweep() -> None:
    program = """
import sys
from mtrl_cli.sweeps.display import SweepDisplay, TrialRow
with SweepDisplay(jobs=1) as shown:
    for step in range(3000):
        shown.update([TrialRow(0, ("seed=0",), "running" if step % 2 else "queued")])
print("finished", file=sys.stderr)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "finished\n"
    assert process.wait(timeout=60) == 0
    process.stderr.close()
