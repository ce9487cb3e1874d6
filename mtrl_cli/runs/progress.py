"""Progress of a run as a live table or as plain lines, and the table of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.text import Text

from mtrl_cli.metric_names import (
    EPSILON,
    EVAL_SCORE,
    FRAMES_PER_SECOND,
    MEMORY,
    STEPS_PER_SECOND,
    TRAIN_RETURN,
    TRAIN_SCORE,
    UPDATES_PER_SECOND,
)
from mtrl_cli.runs import terminal
from mtrl_cli.runs.terminal import LiveDisplay, duration, fixed, number

PLAIN_TASKS = 10  # a line with more returns is too long to read: print the number of tasks and their mean instead
SUMMARY_LINES = 4
NAME_WIDTH = 22


class Display(LiveDisplay):
    """The progress of a run.

    Args:
        tasks: names, in order.
        total_steps: the run's budget per task.
        frames_per_step: emulator frames per step.
        out: where to write; None: standard output.
        quiet: whether to print nothing, as on all ranks except the first.
    """

    plain_seconds = 5.0

    def __init__(self, tasks: Sequence[str], total_steps: int, frames_per_step: int = 1, *, out: TextIO | None = None, quiet: bool = False):
        super().__init__(out, quiet=quiet)
        self.tasks = list(tasks)
        self.total_steps = total_steps
        self.frames_per_step = frames_per_step
        self._metrics: dict[str, float] = {}
        self._step = 0
        self._seconds: float | None = None
        self._began: tuple[float, int] | None = None  # time and step of the first update
        self._measured = (0.0, 0)  # time and step of the last update that the speed is measured to

    def update(self, step: int, metrics: Mapping[str, float], *, seconds: float | None = None, is_measured: bool = True) -> None:
        """Show the newest metrics. Metrics that are missing keep their last values.

        Args:
            step: the run's step.
            metrics: by their names in metrics.jsonl. The table prefers `train/score/<task>` to the last evaluation's `eval/score/<task>`.
            seconds: the run's time so far over all resumes.
            is_measured: whether the ETA uses this step; false within a rollout, so that bursts of updates do not affect the ETA.
        """
        self._step = step
        self._seconds = seconds
        self._metrics.update(metrics)
        if self._began is None:
            self._began = (time.monotonic(), step)
        if is_measured:
            self._measured = (time.monotonic(), step)
        self.refresh()

    def line(self) -> str:
        """Summarize the run in one line."""
        returns = [(task, self._metrics[TRAIN_RETURN + task]) for task in self.tasks if TRAIN_RETURN + task in self._metrics]
        if len(self.tasks) > PLAIN_TASKS:
            scores = [score for task in self.tasks if (score := self._score(task)) is not None]
            results = f"mean score {number(sum(scores) / len(scores))} of {len(scores)} tasks" if scores else f"{len(self.tasks)} tasks"
        else:
            results = "  ".join(f"{task} {number(value)}" for task, value in returns)
        return "  ".join(part for part in (f"step {self._step:,}/{self.total_steps:,}", results, *self._speeds(), *self._times()) if part)

    def table(self) -> RenderableType:
        """Render the table to fit the terminal: several tasks per row if there are many, fewer columns if it is narrow."""
        width, height = self.console.size
        titles = ["task", "return", "score", "epsilon"]
        longest = min(NAME_WIDTH, max(len(task) for task in self.tasks))
        room = max(1, height - SUMMARY_LINES - 1)
        blocks = -(-len(self.tasks) // room)
        while len(titles) > 2 and blocks * (longest + 1 + 9 * (len(titles) - 1)) > width:
            titles.pop()
        blocks = max(1, min(blocks, width // (longest + 1 + 9 * (len(titles) - 1))))
        rows = -(-len(self.tasks) // blocks)
        hidden = 0
        if rows > room:
            rows = max(1, room - 1)
            hidden = max(0, len(self.tasks) - rows * blocks)
        cells = []
        for row in range(rows):
            tasks = self.tasks[row : rows * blocks : rows]
            cells.append([cell for task in tasks for cell in self._cells(task)[: len(titles)]])
        min_widths = dict.fromkeys(titles, 8) | {"task": longest}
        table = terminal.table(cells, titles * blocks, right=titles[1:], min_widths=min_widths, gap=1)
        more = [Text(f"and {hidden} more tasks", style="dim")] if hidden else []
        return Group(table, *more, *self._summary(width))

    def _summary(self, width: int) -> list[Text]:
        done = min(1.0, self._step / self.total_steps) if self.total_steps else 1.0
        bar_width = max(10, min(40, width - 40))
        filled = int(bar_width * done)
        parts = ("#" * filled, "green"), ("-" * (bar_width - filled), "dim"), f" {done:6.1%}  step {self._step:,}/{self.total_steps:,}"
        bar = Text.assemble(*parts, no_wrap=True, overflow="crop")
        return [bar, *(Text("  ".join(texts), no_wrap=True, overflow="crop") for texts in (self._speeds(), self._times()))]

    def _cells(self, task: str) -> list[str]:
        name = task if len(task) <= NAME_WIDTH else task[: NAME_WIDTH - 1] + "~"
        epsilon = self._metrics.get(EPSILON + task)
        return [name, number(self._metrics.get(TRAIN_RETURN + task)), fixed(self._score(task)), fixed(epsilon)]

    def _score(self, task: str) -> float | None:
        return self._metrics.get(TRAIN_SCORE + task, self._metrics.get(EVAL_SCORE + task))

    def _speeds(self) -> list[str]:
        steps = self._metrics.get(STEPS_PER_SECOND)
        frames = self._metrics.get(FRAMES_PER_SECOND, None if steps is None else steps * self.frames_per_step)
        speeds = {"steps/s": steps, "frames/s": frames, "updates/s": self._metrics.get(UPDATES_PER_SECOND)}
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
        if MEMORY in self._metrics:
            parts.append(f"memory {self._metrics[MEMORY] / 2**30:.1f} GiB")
        return parts


def evaluation_table(result: Mapping[str, Any], max_steps: int | None = None, of: str = "the network") -> RenderableType:
    """Build the table of an evaluation. Tasks with episodes that `eval.max_steps` cut are marked with a star and a footnote.

    Args:
        result: the content of `eval/<step>.json`. A single episode has no interval; a task without a reference has no score.
        max_steps: the limit of an episode, in the footnote.
        of: the tested network, in the title.
    """
    rows, cut_episodes = [], 0
    for name, task in result["tasks"].items():
        cut = int(task.get("cut") or 0)
        cut_episodes += cut
        episodes = len(task["returns"])
        interval = f"{number(task['ci'][0])} to {number(task['ci'][1])}" if task.get("ci") and episodes > 1 else "-"
        mark = " *" if cut else ""
        rows.append((name + mark, number(task["mean"]), number(task["std"]), fixed(task.get("score")), interval, str(episodes)))
    header = ("task", "mean", "std", "score", "95% interval of the mean", "episodes")
    lines: list[RenderableType] = [Text(_title(result, of), style="bold"), terminal.table(rows, header, right=header[1:])]
    over = result.get("over_tasks") or {}
    if over.get("mean") is not None:
        lines.append(Text("score over tasks: " + "  ".join(_aggregate(name, over) for name in ("mean", "median", "iqm", "min"))))
        lines.append(Text("score: 0 is random play, 1 the reference; in brackets: 95% intervals over episodes"))
    unknown = [name for name, task in result["tasks"].items() if task.get("score") is None]
    if unknown:
        lines.append(Text(f"no score, since no reference is known: {', '.join(unknown)}"))
    if cut_episodes:
        limit = "" if max_steps is None else f" ({max_steps:,} steps)"
        lines.append(Text(f"* {cut_episodes} episodes cut by eval.max_steps{limit}; their returns count up to the cut"))
    return Group(*lines)


def _title(result: Mapping[str, Any], of: str) -> str:
    step, seed = f"step {result['step']:,}", f"episodes of seed {result.get('seed')}"
    if result.get("split") == "validation":
        return f"Validation at {step} ({seed}; used to choose the best checkpoint)"
    if result.get("split") == "test":
        return f"Test of {of}, {step} ({seed}; not used to choose anything)"
    return f"Evaluation at {step}"


def _aggregate(name: str, over: Mapping[str, Any]) -> str:
    interval = (over.get("ci") or {}).get(name)
    return f"{name} {fixed(over[name])}" + (f" [{fixed(interval[0])}, {fixed(interval[1])}]" if interval else "")
