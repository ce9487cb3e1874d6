"""Progress of a sweep, as a live table of its trials or as plain lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Group, RenderableType
from rich.text import Text

from mtrl_cli.runs import terminal
from mtrl_cli.runs.terminal import LiveDisplay, duration, fixed
from mtrl_cli.sweeps.search_space import overrides_of

SUMMARY_LINES = 2
_COLUMNS = {"trial": (0, 6), "overrides": (0, 0), "state": (0, 9), "score": (34, 7), "done": (60, 4), "time": (70, 8), "note": (100, 40)}
"""The smallest width of a terminal with the column, and the column's largest width. The overrides have the remaining width."""
ENDED = ("completed", "pruned", "failed")
ACTIVE = ("running", "queued", "elsewhere")
_COLOURS = {"running": "green", "failed": "red", "pruned": "yellow", "queued": "cyan", "elsewhere": "cyan"}


@dataclass(frozen=True)
class TrialRow:
    """The state and progress of one trial.

    Attributes:
        number: from 0.
        values: the values of the keys that differ between trials, as text; empty before a sampler has chosen them.
        state: waiting, queued (by the launcher), running, completed, pruned, failed, or elsewhere (run by another process).
        score: the metric at the last evaluation, if there was one.
        step, steps: per task, so far and in total.
        seconds: the training time so far; None before the first evaluation.
        note: a remark, such as the reason of a failure.
        is_here: whether the trial's run is in this process's sweep folder, or not started. False for a trial of another machine that shares
            only the database.
    """

    number: int
    values: Mapping[str, str]
    state: str
    score: float | None = None
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    note: str = ""
    is_here: bool = True

    @property
    def overrides(self) -> str:
        """The overrides that set the trial's values, separated by spaces."""
        return " ".join(overrides_of(self.values))


class SweepDisplay(LiveDisplay):
    """The progress of a sweep. Plain output has a line for each start and end of a trial, and a summary every minute.

    Args:
        jobs: the number of trials that this process runs at a time.
        out: where to write; None: standard output.
    """

    plain_seconds = 60.0

    def __init__(self, jobs: int, out: TextIO | None = None):
        super().__init__(out)
        self.jobs = jobs
        self._rows: tuple[TrialRow, ...] = ()
        self._states: dict[int, str] = {}
        self._ended: list[int] = []  # in the order in which they ended

    def update(self, rows: Sequence[TrialRow]) -> None:
        """Show the state of all trials, ordered by number. Plain output prints changes immediately."""
        is_first = not self._states
        self._rows = tuple(rows)
        for row in rows:
            before = self._states.get(row.number)
            self._states[row.number] = row.state
            if row.state == before:
                continue
            if row.state in ENDED:
                self._ended.append(row.number)
            if not self.is_live and not (is_first and row.state in (*ENDED, "waiting")):
                self._print_change(row)
        self.refresh()

    def _print_change(self, row: TrialRow) -> None:
        parts = [row.overrides]
        if row.state in ENDED:
            parts += [fixed(row.score)] if row.score is not None else []
            parts += [duration(row.seconds)] if row.seconds is not None else []
        note = f" ({row.note})" if row.note else ""
        self.message(f"trial {row.number}: {row.state}: {', '.join(parts)}{note}")

    def line(self) -> str:
        """Summarize the sweep: the number of trials by state, the best score, the time left."""
        count = Counter(row.state for row in self._rows)
        parts = [f"{count['completed']} of {len(self._rows)} completed"]
        parts += [f"{count[state]} {state}" for state in ("running", "queued", "elsewhere", "pruned", "failed", "waiting") if count[state]]
        scores = [(row.score, -row.number) for row in self._rows if row.state == "completed" and row.score is not None]
        if scores:
            score, number = max(scores)
            parts.append(f"best {fixed(score)} (trial {-number})")
        left = seconds_left(self._rows, self.jobs)
        if left:
            parts.append(f"ETA {duration(left)}")
        return ", ".join(parts)

    def table(self) -> RenderableType:
        """Render the table to fit the terminal: the last trials that ended, the active trials and the next trials."""
        width, height = self.console.size
        shown = self._select(max(1, height - SUMMARY_LINES - 2))
        has_notes = any(row.note for row in shown)
        columns = [title for title, (least, _) in _COLUMNS.items() if width >= least and (has_notes or title != "note")]
        widths = {title: _COLUMNS[title][1] for title in columns}
        widths["overrides"] = max(1, width - sum(widths.values()) - len(columns))
        cells = [[cell(row, title) for title in columns] for row in shown]
        table = terminal.table(cells, columns, right=["trial", "score", "done", "time"], max_widths=widths, gap=1)
        hidden = len(self._rows) - len(shown)
        more = [Text(f"and {hidden} more", style="dim")] if hidden else []
        return Group(table, *more, Text(self.line(), no_wrap=True, overflow="ellipsis"))

    def _select(self, room: int) -> list[TrialRow]:
        """Return the rows to show, at most `room`: ended trials in the order of their ends, then active and waiting trials by number."""
        running = [row for row in self._rows if row.state in ACTIVE]
        order = {number: at for at, number in enumerate(self._ended)}
        ended = sorted((row for row in self._rows if row.state in ENDED), key=lambda row: (order.get(row.number, -1), row.number))
        waiting = [row for row in self._rows if row.state == "waiting"]
        running = running[:room]
        room -= len(running)
        some_waiting = waiting[: max(room - len(ended), room // 3)]
        room -= len(some_waiting)
        return [*(ended[-room:] if room else []), *running, *some_waiting]


def seconds_left(rows: Sequence[TrialRow], jobs: int) -> float | None:
    """Estimate the time until all trials have ended; None before the first timed step.

    The remaining steps take the mean time of the steps so far. `jobs` trials run at a time, or all active trials if their number is
    larger. The sweep takes at least as long as the trial with the most remaining steps.
    """
    timed = [row for row in rows if row.seconds and row.step]
    steps = sum(row.step for row in timed)
    if not steps:
        return None
    per_step = sum(row.seconds or 0.0 for row in timed) / steps
    left = [max(0, row.steps - row.step) for row in rows if row.state not in ENDED]
    at_a_time = max(jobs, sum(row.state in ACTIVE for row in rows))
    return per_step * max(sum(left) / at_a_time, max(left, default=0))


def cell(row: TrialRow, title: str, without_overrides: str = "-") -> str | Text:
    """Format a cell of a table of trials.

    Args:
        row: the trial.
        title: the column's title, one of `_COLUMNS`.
        without_overrides: the text in place of overrides that are not chosen yet.
    """
    if title == "state":
        return Text(row.state, style=_COLOURS.get(row.state, ""))
    return {
        "trial": str(row.number),
        "overrides": row.overrides or without_overrides,
        "score": fixed(row.score),
        "done": f"{row.step / row.steps:.0%}" if row.steps and row.step else "-",
        "time": duration(row.seconds),
        "note": row.note,
    }[title]
