"""What a user sees: a live table of a run on a terminal, plain lines anywhere else, and the table of an evaluation."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mtrl_cli.parallel import torchrun

LIVE_SECONDS = 0.3
PLAIN_SECONDS = 5.0
PLAIN_TASKS = 10  # more would make a line that nobody reads: then only their number and mean
SUMMARY_LINES = 4
NAME_WIDTH = 22


class NullDisplay:
    """Shows nothing: for the ranks after the first."""

    def __enter__(self) -> NullDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def update(self, step: int, metrics: Mapping[str, float], *, seconds: float | None = None, is_measured: bool = True) -> None:
        """Take the newest metrics."""

    def message(self, text: str) -> None:
        """Print lines that stay."""

    def print(self, renderable: RenderableType) -> None:
        """Print what stays."""


class Guard:
    """Does what writes to a stream, as long as somebody reads it: `guard(action)`.

    A pipe whose reader has gone, a terminal that was closed, a full disk: none is a reason to end work of days.
    """

    def __init__(self, out: TextIO):
        self._out = out
        self._broken = False

    def __call__(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except (OSError, UnicodeEncodeError, ValueError) as error:
            if not isinstance(error, OSError | UnicodeEncodeError) and not self._out.closed:
                raise
            self._broken = True
            _silence(self._out)


class Display(NullDisplay):
    """The progress of a run: a live table on a terminal, otherwise a line now and then.

    It is plain too under NO_COLOR or TERM=dumb. If whoever reads goes away (`| head`), it falls silent and the run goes on.

    Args:
        tasks: names, in order.
        total_steps: of the run, per task.
        frames_per_step: emulator frames of a step.
        out: where to write.
    """

    def __init__(self, tasks: Sequence[str], total_steps: int, frames_per_step: int = 1, out: TextIO | None = None):
        self.tasks = list(tasks)
        self.total_steps = total_steps
        self.frames_per_step = frames_per_step
        self.out = sys.stdout if out is None else out
        self.is_live = is_live(self.out)
        self.console = console(self.out)
        self._metrics: dict[str, float] = {}
        self._step = 0
        self._seconds: float | None = None
        self._began: tuple[float, int] | None = None  # time and step of the first update
        self._measured = (0.0, 0)  # time and step of the last update that the speed is measured to
        self._shown = -float("inf")
        self._shown_step = -1
        self._guarded = Guard(self.out)
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.is_live:
            self._live = Live(
                console=self.console, auto_refresh=False, transient=False, vertical_overflow="crop", get_renderable=self.table
            )
            self._guarded(self._live.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._guarded(self._live.stop)
            self._live = None
        elif self._began is not None and self._shown_step != self._step:
            self._show()

    def update(self, step: int, metrics: Mapping[str, float], *, seconds: float | None = None, is_measured: bool = True) -> None:
        """Take the newest metrics, by their names in metrics.jsonl; those not given keep their last value. Shown when it is time.

        `seconds` is the run's time so far over all resumes. `train/score/<task>`, the normalised return of training, is shown in
        preference to the last evaluation's `eval/score/<task>`. The estimated time of arrival (ETA) uses steps with `is_measured` only,
        so that bursts of updates do not affect it.
        """
        now = time.monotonic()
        self._step = step
        self._seconds = seconds
        self._metrics.update(metrics)
        if self._began is None:
            self._began = (now, step)
        if is_measured:
            self._measured = (now, step)
        if now - self._shown >= (LIVE_SECONDS if self.is_live else PLAIN_SECONDS):
            self._shown = now
            self._show()

    def message(self, text: str) -> None:
        """Print lines that stay, above the table."""
        self._guarded(lambda: self.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def print(self, renderable: RenderableType) -> None:
        """Print what stays, such as `evaluation_table`."""
        self._guarded(lambda: self.console.print(renderable))

    def _show(self) -> None:
        self._shown_step = self._step
        if self._live is not None:
            self._guarded(self._live.refresh)
        elif not self.is_live:
            self._guarded(lambda: self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True))

    # -- what is shown ------------------------------------------------------------------------------------------------------

    def line(self) -> str:
        """The run in one line: what is printed where there is no terminal."""
        returns = [(task, self._metrics[f"train/return/{task}"]) for task in self.tasks if f"train/return/{task}" in self._metrics]
        if len(self.tasks) > PLAIN_TASKS:
            scores = [score for task in self.tasks if (score := self._score(task)) is not None]
            what = f"mean score {number(sum(scores) / len(scores))} of {len(scores)} tasks" if scores else f"{len(self.tasks)} tasks"
        else:
            what = "  ".join(f"{task} {number(value)}" for task, value in returns)
        return "  ".join(part for part in (f"step {self._step:,}/{self.total_steps:,}", what, *self._speeds(), *self._times()) if part)

    def table(self) -> RenderableType:
        """The live table, made to fit: tasks side by side where they are many, fewer columns where it is narrow."""
        width, height = self.console.size
        columns = [("task", self._name), ("return", self._return), ("score", self._score_text), ("epsilon", self._epsilon)]
        longest = min(NAME_WIDTH, max(len(task) for task in self.tasks))
        room = max(1, height - SUMMARY_LINES - 1)
        blocks = -(-len(self.tasks) // room)
        while len(columns) > 2 and blocks * (longest + 1 + 9 * (len(columns) - 1)) > width:
            columns.pop()
        blocks = max(1, min(blocks, width // (longest + 1 + 9 * (len(columns) - 1))))
        rows = -(-len(self.tasks) // blocks)
        hidden = 0
        if rows > room:
            rows = max(1, room - 1)
            hidden = max(0, len(self.tasks) - rows * blocks)
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for _ in range(blocks):
            for title, _ in columns:
                table.add_column(
                    title, justify="left" if title == "task" else "right", no_wrap=True, min_width=longest if title == "task" else 8
                )
        for row in range(rows):
            cells = [text(task) for task in self.tasks[row : rows * blocks : rows] for _, text in columns]
            table.add_row(*cells)
        more = [Text(f"and {hidden} more tasks", style="dim")] if hidden else []
        return Group(table, *more, *self._summary(width))

    def _summary(self, width: int) -> list[Text]:
        done = min(1.0, self._step / self.total_steps) if self.total_steps else 1.0
        bar_width = max(10, min(40, width - 40))
        filled = int(bar_width * done)
        bar = Text.assemble(
            ("#" * filled, "green"), ("-" * (bar_width - filled), "dim"), f" {done:6.1%}  step {self._step:,}/{self.total_steps:,}"
        )
        lines = [bar, Text("  ".join(self._speeds())), Text("  ".join(self._times()))]
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        return lines

    def _name(self, task: str) -> str:
        return task if len(task) <= NAME_WIDTH else task[: NAME_WIDTH - 1] + "~"

    def _return(self, task: str) -> str:
        return number(self._metrics.get(f"train/return/{task}"))

    def _score(self, task: str) -> float | None:
        return self._metrics.get(f"train/score/{task}", self._metrics.get(f"eval/score/{task}"))

    def _score_text(self, task: str) -> str:
        return fixed(self._score(task))

    def _epsilon(self, task: str) -> str:
        return fixed(self._metrics.get(f"epsilon/{task}"))

    def _speeds(self) -> list[str]:
        steps = self._metrics.get("perf/steps_per_second")
        frames = self._metrics.get("perf/frames_per_second", None if steps is None else steps * self.frames_per_step)
        speeds = {"steps/s": steps, "frames/s": frames, "updates/s": self._metrics.get("perf/updates_per_second")}
        return [f"{number(value)} {unit}" for unit, value in speeds.items() if value is not None]

    def _times(self) -> list[str]:
        parts = []
        if self._seconds is not None:
            parts.append(f"time {duration(self._seconds)}")
        if self._began is not None:
            (began, first), (now, step) = self._began, self._measured
            elapsed, made = now - began, step - first
            if made > 0 and elapsed > 1:
                left = max(0, self.total_steps - step) / made * elapsed - (time.monotonic() - now)
                parts.append(f"ETA {duration(max(0.0, left))}")
        if "perf/memory" in self._metrics:
            parts.append(f"memory {self._metrics['perf/memory'] / 2**30:.1f} GiB")
        return parts


def say(line: str) -> None:
    """Print a line on standard output, of ranks only the first; where nobody reads it any more, fall silent."""
    if not torchrun.place().is_first:
        return
    try:
        print(line, flush=True)
    except OSError:
        _silence(sys.stdout)


def is_live(out: TextIO) -> bool:
    """Whether a table can be redrawn on `out`: a terminal that understands it, and a user who has not asked for plain text."""
    return _is_terminal(out) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("dumb", "unknown")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the error through, where rich would end the process."""
        self.quiet = True
        raise BrokenPipeError


def console(out: TextIO) -> Console:
    """A rich console on `out`; where that is no terminal, plain and wide enough for every table."""
    if is_live(out):
        return _Console(file=out)
    return _Console(file=out, force_terminal=False, no_color=True, color_system=None, width=None if _is_terminal(out) else 200)


def _is_terminal(out: TextIO) -> bool:
    try:
        return out.isatty()
    except (AttributeError, ValueError):
        return False


def _silence(out: TextIO) -> None:
    """Point a broken standard output at nowhere, or Python would complain again when it exits."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass


def evaluation_table(result: Mapping[str, Any], max_steps: int | None = None, of: str = "the network") -> RenderableType:
    """The table of an evaluation, from what `eval/<step>.json` holds. Its title says whether that was validation, or a test of what.

    A task's "cut", where given, is how many of its games `eval.max_steps` ended: such tasks are marked, with a footnote. The interval
    is left out where a single episode has none, the score where a task has no reference.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("task", no_wrap=True)
    for title in ("mean", "std", "score", "95% interval of the mean", "episodes"):
        table.add_column(title, justify="right", no_wrap=True)
    cut_games = 0
    for name, task in result["tasks"].items():
        cut = int(task.get("cut") or 0)
        cut_games += cut
        episodes = len(task["returns"])
        interval = f"{number(task['ci'][0])} to {number(task['ci'][1])}" if task.get("ci") and episodes > 1 else "-"
        table.add_row(
            name + (" *" if cut else ""), number(task["mean"]), number(task["std"]), fixed(task.get("score")), interval, str(episodes)
        )
    lines: list[RenderableType] = [Text(_title(result, of), style="bold"), table]
    over = result.get("over_tasks") or {}
    if over.get("mean") is not None:
        lines.append(Text("score over tasks: " + "  ".join(_aggregate(name, over) for name in ("mean", "median", "iqm", "min"))))
        lines.append(Text("score: 0 is random play, 1 the reference; in brackets 95% intervals over episodes"))
    unknown = [name for name, task in result["tasks"].items() if task.get("score") is None]
    if unknown:
        lines.append(Text(f"no score, since no reference is known: {', '.join(unknown)}"))
    if cut_games:
        limit = "" if max_steps is None else f" ({max_steps:,} steps)"
        lines.append(Text(f"* games cut by eval.max_steps{limit}, {cut_games} in all: their returns count up to there"))
    return Group(*lines)


def _title(result: Mapping[str, Any], of: str) -> str:
    step, games = f"step {result['step']:,}", f"games of seed {result.get('seed')}"
    if result.get("split") == "validation":
        return f"Validation at {step} ({games}; the best checkpoint is chosen by these)"
    if result.get("split") == "test":
        return f"Test of {of}, {step} ({games}; nothing was chosen by these)"
    return f"Evaluation at {step}"  # from before there was a difference


def _aggregate(name: str, over: Mapping[str, Any]) -> str:
    interval = (over.get("ci") or {}).get(name)
    return f"{name} {fixed(over[name])}" + (f" [{fixed(interval[0])}, {fixed(interval[1])}]" if interval else "")


def number(value: float | None) -> str:
    """Four metrics or so, with thousands set apart: 0.123, 12.3, 1,234; "-" for none."""
    if value is None:
        return "-"
    if value != value or value in (float("inf"), -float("inf")):
        return str(value)
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 or value == int(value) else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
