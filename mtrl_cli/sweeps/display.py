"""What a user sees of a sweep: a live table of its trials on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mtrl_cli.runs.progress import LIVE_SECONDS, Guard, console, duration, fixed, is_live

PLAIN_SECONDS = 60.0
SUMMARY_LINES = 2
_WIDTHS = {"trial": 6, "state": 9, "score": 7, "done": 4, "time": 8, "note": 40}  # at most; overrides have the rest
ENDED = ("completed", "pruned", "failed")
WORKED_ON = ("running", "queued", "elsewhere")
_COLOURS = {"running": "green", "failed": "red", "pruned": "yellow", "queued": "cyan", "elsewhere": "cyan"}


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the table shows it.

    Attributes:
        number: from 0.
        overrides: the words in which it differs from others.
        state: waiting, queued (with the launcher), running, completed, pruned, failed, or elsewhere (another worker has it).
        score: the last evaluation's metric, if there was one.
        step, steps: per task, so far and in all.
        seconds: of work so far; None before there was any.
        note: such as why it failed, or that it was gone on with after its process died.
    """

    number: int
    overrides: tuple[str, ...]
    state: str
    score: float | None = None
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    note: str = ""


class SweepDisplay:
    """The progress of a sweep: a live table on a terminal, otherwise a line as a trial starts or ends, and a summary now and then.

    Plain under NO_COLOR or TERM=dumb, too. If whoever reads goes away (`| head`), it falls silent and the sweep goes on.

    Args:
        jobs: how many trials are worked on at a time here.
        out: where to write.
    """

    def __init__(self, jobs: int, out: TextIO | None = None):
        self.jobs = jobs
        self.out = sys.stdout if out is None else out
        self.is_live = is_live(self.out)
        self.console = console(self.out)
        self._guarded = Guard(self.out)
        self._rows: tuple[TrialRow, ...] = ()
        self._states: dict[int, str] = {}
        self._ended: list[int] = []  # in the order in which that was seen
        self._shown = -float("inf")
        self._summed = ""
        self._live: Live | None = None

    def __enter__(self) -> SweepDisplay:
        if self.is_live:
            self._live = Live(
                console=self.console, auto_refresh=False, transient=False, vertical_overflow="crop", get_renderable=self.table
            )
            self._guarded(self._live.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._guarded(self._live.refresh)
            self._guarded(self._live.stop)
            self._live = None
        elif self._rows and self.summary() != self._summed:
            self.message(self.summary())

    def update(self, rows: Sequence[TrialRow]) -> None:
        """Take how all trials stand, by number. What has changed is shown at once in plain lines, in the table when it is time."""
        is_first, now = not self._states, time.monotonic()
        self._rows = tuple(rows)
        for row in rows:
            before = self._states.get(row.number)
            self._states[row.number] = row.state
            if row.state == before:
                continue
            if row.state in ENDED:
                self._ended.append(row.number)
            if not self.is_live and not (is_first and row.state in (*ENDED, "waiting")):
                self._tell(row)
        if self._live is not None:
            if now - self._shown >= LIVE_SECONDS:
                self._shown = now
                self._guarded(self._live.refresh)
        elif is_first or now - self._shown >= PLAIN_SECONDS:
            self._shown, self._summed = now, self.summary()
            self.message(self._summed)

    def message(self, text: str) -> None:
        """Print lines that stay, above the table."""
        self._guarded(lambda: self.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _tell(self, row: TrialRow) -> None:
        """A line on a trial whose state has changed."""
        about = " ".join(row.overrides)
        if row.state in ENDED:
            metrics = [fixed(row.score)] if row.score is not None else []
            taken = [duration(row.seconds)] if row.seconds is not None else []
            about = ", ".join([about, *metrics, *taken])
        note = f" ({row.note})" if row.note else ""
        self.message(f"trial {row.number}: {row.state}: {about}{note}")

    # -- what is shown ------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The sweep in one line: how many trials are done, running, waiting, failed; the best so far; the time left."""
        count = Counter(row.state for row in self._rows)
        parts = [f"{count['completed']} of {len(self._rows)} completed"]
        parts += [f"{count[state]} {state}" for state in ("running", "queued", "elsewhere", "pruned", "failed", "waiting") if count[state]]
        best = max((row for row in self._rows if row.state == "completed" and row.score is not None), key=_score, default=None)
        if best is not None:
            parts.append(f"best {fixed(best.score)} (trial {best.number})")
        left = self.seconds_left()
        if left:
            parts.append(f"ETA {duration(left)}")
        return ", ".join(parts)

    def seconds_left(self) -> float | None:
        """Until all trials are done; None before a step was timed.

        Their remaining steps at the mean time of a step so far, `jobs` at a time (or as many as are seen to be worked on), and no less
        than the one that is furthest from its end.
        """
        timed = [row for row in self._rows if row.seconds and row.step]
        steps = sum(row.step for row in timed)
        if not steps:
            return None
        per_step = sum(row.seconds or 0.0 for row in timed) / steps
        left = [max(0, row.steps - row.step) for row in self._rows if row.state not in ENDED]
        at_a_time = max(self.jobs, sum(row.state in WORKED_ON for row in self._rows))
        return per_step * max(sum(left) / at_a_time, max(left, default=0))

    def table(self) -> RenderableType:
        """The live table, made to fit: those that run, then the last that ended, then the next; fewer columns where it is narrow."""
        width, height = self.console.size
        room = max(1, height - SUMMARY_LINES - 2)
        shown = self._chosen(room)
        columns = ["trial", "overrides", "state"]
        columns += ["score"] if width >= 34 else []
        columns += ["done"] if width >= 60 else []
        columns += ["time"] if width >= 70 else []
        columns += ["note"] if width >= 100 and any(row.note for row in shown) else []
        others = sum(_WIDTHS[title] + 1 for title in columns if title != "overrides")
        widths = {**_WIDTHS, "overrides": max(1, width - others - 1)}
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for title in columns:
            side: Literal["left", "right"] = "left" if title in ("overrides", "state", "note") else "right"
            table.add_column(title, justify=side, no_wrap=True, overflow="ellipsis", max_width=widths[title])
        for row in shown:
            cells: dict[str, str | Text] = {
                "trial": str(row.number),
                "overrides": " ".join(row.overrides) or "-",
                "state": Text(row.state, style=_COLOURS.get(row.state, "")),
                "score": fixed(row.score),
                "done": f"{row.step / row.steps:.0%}" if row.steps and row.step else "-",
                "time": "-" if row.seconds is None else duration(row.seconds),
                "note": row.note,
            }
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in (cells[title] for title in columns)))
        hidden = len(self._rows) - len(shown)
        lines = [Text(f"and {hidden} more", style="dim")] if hidden else []
        lines.append(Text(self.summary()))
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(table, *lines)

    def _chosen(self, room: int) -> list[TrialRow]:
        """The rows to show where there is room for so many, in order of their numbers within each kind."""
        running = [row for row in self._rows if row.state in WORKED_ON]
        order = {number: at for at, number in enumerate(self._ended)}
        ended = sorted((row for row in self._rows if row.state in ENDED), key=lambda row: (order.get(row.number, -1), row.number))
        waiting = [row for row in self._rows if row.state == "waiting"]
        running = running[:room]
        room -= len(running)
        some_waiting = waiting[: min(len(waiting), max(room - len(ended), room // 3))]
        room -= len(some_waiting)
        return [*(ended[-room:] if room else []), *running, *some_waiting]


def _score(row: TrialRow) -> float:
    return row.score if row.score is not None else -float("inf")
