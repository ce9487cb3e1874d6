"""Progress display of a run: a table that fits the terminal, plain lines otherwise, and the table of an evaluation."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys

import pytest

from mtrl_cli.runs import terminal
from mtrl_cli.runs.progress import Display, evaluation_table
from tests.helpers.displays import Clock, rendered, set_size

TASKS = ["pong", "breakout", "qbert"]
METRICS = {
    "train/return/pong": -20.5,
    "train/return/breakout": 1234.0,
    "eval/score/pong": 0.25,
    "epsilon/pong": 0.05,
    "perf/steps_per_second": 250.0,
    "perf/updates_per_second": 12.5,
    "perf/memory": 3 * 2**30,
}


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def table_of(tasks: list[str], width: int, height: int, metrics: dict[str, float]) -> str:
    shown = Display(tasks, 10_000, 4, out=io.StringIO())
    set_size(shown, width, height)
    shown.update(500, metrics, seconds=3700)
    return rendered(shown)


def test_plain_output_has_a_line_every_five_seconds(clock):
    out = io.StringIO()
    with Display(TASKS, 10_000, 4, out=out) as shown:
        for step in range(0, 1000, 10):
            clock.now += 0.1
            shown.update(step, METRICS, seconds=clock.now)
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 4, "10 seconds, and the last metrics at the end"
    assert "\x1b" not in out.getvalue()
    assert lines[-1].startswith("step 990/10,000  pong -20.5  breakout 1,234  250 steps/s  1,000 frames/s  12.5 updates/s")
    assert "memory 3.0 GiB" in lines[-1]


def test_quiet_display_prints_nothing(clock):
    out = io.StringIO()
    with Display(TASKS, 10_000, 4, out=out, quiet=True) as shown:
        shown.update(500, METRICS)
        shown.message("evaluating")
        shown.print("a table")
    assert out.getvalue() == ""


def test_remaining_time_is_estimated_from_the_steps_since_the_start_of_the_process(clock):
    out = io.StringIO()
    shown = Display(TASKS, 10_000, 4, out=out)
    shown.update(4000, {}, seconds=0)  # the first update of a resumed run
    clock.now += 60
    shown.update(5000, {}, seconds=60)
    assert "ETA 5:00" in out.getvalue().splitlines()[-1]


def test_remaining_time_does_not_jump_with_bursts_of_updates(clock):
    """Each rollout has 10 ticks of 1 s and a burst of 20 s. The expected end of 100 rollouts stays at 3,000 s after the start."""
    shown = Display(TASKS, 1000, 4, out=io.StringIO())
    shown.update(0, {}, seconds=0)
    start, ends = clock.now, []
    for step in range(1, 201):
        is_burst = step % 10 == 0
        clock.now += 21 if is_burst else 1
        shown.update(step, {}, seconds=clock.now, is_measured=is_burst)
        if step >= 10:
            eta = next(part for part in shown.line().split("  ") if part.startswith("ETA"))
            seconds = sum(60**place * int(part) for place, part in enumerate(reversed(eta.split()[1].split(":"))))
            ends.append(clock.now - start + seconds)
    assert min(ends) == max(ends) == 3000


def test_line_for_many_tasks_has_their_mean_score(clock):
    tasks = [f"task_{index}" for index in range(57)]
    shown = Display(tasks, 100, 4, out=io.StringIO())
    shown.update(1, {f"eval/score/{task}": 0.5 for task in tasks[:40]})
    assert "mean score 0.50 of 40 tasks" in shown.line()
    assert len(shown.line()) < 120


def test_table_has_a_row_per_task_with_a_dash_for_missing_metrics(clock):
    text = table_of(TASKS, 80, 24, METRICS)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["pong"] == ["-20.5", "0.250", "0.050"]
    assert rows["breakout"] == ["1,234", "-", "-"]
    assert rows["qbert"] == ["-", "-", "-"]
    assert "step 500/10,000" in text


def test_table_prefers_the_training_score_to_the_last_evaluation(clock):
    text = table_of(["pong"], 80, 24, {"eval/score/pong": 0.25, "train/score/pong": 0.75})
    assert "0.750" in text
    assert "0.250" not in text


@pytest.mark.parametrize("count", [1, 8, 26, 57])
@pytest.mark.parametrize(("width", "height"), [(200, 50), (120, 24), (80, 24), (40, 15), (24, 8)])
def test_table_fits_the_terminal(clock, count, width, height):
    tasks = [f"task_number_{index}" for index in range(count)]
    text = table_of(tasks, width, height, METRICS | {f"train/return/{task}": 1.0 for task in tasks})
    lines = text.splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    shown = len(set(re.findall(r"task_number_\d+", text)))
    hidden = re.search(r"and (\d+) more tasks", text)
    assert shown + (int(hidden[1]) if hidden else 0) == count
    if (width, height) >= (120, 24):
        assert shown == count


def test_table_is_drawn_only_on_a_capable_terminal_without_no_color(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.is_live(Terminal())
    assert not terminal.is_live(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.is_live(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.is_live(Terminal())


ON_A_TERMINAL = """
import sys, time
from mtrl_cli.runs.progress import Display
with Display(["pong", "breakout"], 1000, 4) as shown:
    for step in range(0, 1000, 1):
        shown.update(step, {"train/return/pong": float(step)}, seconds=step)
        if step == 500:
            shown.message("checkpoint saved [at] 500")
            time.sleep(0.5)
print("the end")
"""


def test_table_on_a_terminal_is_drawn_at_a_limited_rate_and_the_cursor_is_restored():
    parent_end, child_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stdout=child_end, stderr=child_end, env=environment)
    os.close(child_end)
    data = b""
    while select.select([parent_end], [], [], 60)[0]:
        try:
            piece = os.read(parent_end, 2**16)
        except OSError:  # the other end of the terminal was closed
            break
        if not piece:
            break
        data += piece
    os.close(parent_end)
    assert process.wait() == 0
    text = data.decode()
    assert "checkpoint saved [at] 500" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert 2 <= text.count("breakout") <= 10, "of 1,000 updates"
    assert text.rstrip().endswith("the end")
    assert "999" in text, "the final table with the last metrics stays"


def test_closed_output_does_not_end_the_run():
    program = """
import sys
from mtrl_cli.runs import progress
progress.Display.plain_seconds = 0
with progress.Display(["pong"], 1000) as shown:
    for step in range(5000):
        shown.update(step, {})
print("finished", file=sys.stderr)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "finished\n"
    assert process.wait() == 0
    process.stderr.close()


RESULT = {
    "step": 10_000,
    "tasks": {
        "pong": {"mean": -20.25, "std": 1.2, "returns": [-21.0, -20.0, -20.0, -20.0], "score": 0.012, "ci": [-21.0, -19.5]},
        "breakout": {"mean": 1234.5, "std": 0.0, "returns": [1234.5], "score": 40.0, "ci": [1234.5, 1234.5], "cut": 1},
        "MyEnv-v0": {"mean": 0.5, "std": 0.1, "returns": [0.4, 0.6], "score": None, "ci": [0.4, 0.6]},
    },
    "over_tasks": {"mean": 20.0, "median": 20.0, "iqm": 0.5, "min": 0.012, "ci": {"mean": [19.0, 21.0], "iqm": [0.25, 0.75]}},
}


def _printed(result: dict) -> str:
    out = io.StringIO()
    terminal.console(out).print(evaluation_table(result, 27_000))
    return out.getvalue()


def test_evaluation_table_has_intervals_scores_and_a_footnote_for_cut_episodes():
    text = _printed(RESULT)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert rows["pong"] == ["pong", "-20.2", "1.20", "0.012", "-21", "to", "-19.5", "4"]
    assert rows["breakout"] == ["breakout", "*", "1,234", "0", "40.000", "-", "1"], "a single episode has no interval"
    assert rows["MyEnv-v0"][3] == "-", "a task without a reference has no score"
    assert "no score, since no reference is known: MyEnv-v0\n" in text
    assert "* 1 episodes cut by eval.max_steps (27,000 steps)" in text
    assert "iqm 0.500 [0.250, 0.750]" in text.replace("\n", " ")


def test_evaluation_table_without_cut_episodes_or_scores_has_no_footnote_and_no_aggregate():
    text = _printed({"step": 1, "tasks": {"MyEnv-v0": RESULT["tasks"]["MyEnv-v0"]}, "over_tasks": {}})
    assert "*" not in text
    assert "over tasks" not in text
