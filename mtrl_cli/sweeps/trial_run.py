"""One trial of a sweep as a run's folder: making it, `trial.json`, which tells what becomes of it, and its evaluations as they come."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrl_cli.config import compose
from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic, file_lock
from mtrl_cli.launchers.base import OUTPUT
from mtrl_cli.metric_names import EVAL_RETURN, MEAN_SCORE
from mtrl_cli.runs.run_dir import IN_USE, RunFolder
from mtrl_cli.sweeps.plan import Plan

if TYPE_CHECKING:  # what only reads a sweep needs no Optuna
    from mtrl_cli.sweeps.trial_storage import Taken

TRIALS = "trials"
RECORD = "trial.json"
_LARGEST_READ = 2**24  # bytes of metrics at a time
_LARGEST_OUTPUT = 2**16  # bytes of output in which the last lines are looked for


def trial_folder(sweep: Path, number: int) -> Path:
    """Where a trial's run lies."""
    return sweep / TRIALS / f"{number:04d}"


def read_record(sweep: Path, number: int) -> dict[str, Any]:
    """What a trial's trial.json holds; {} where it has none, or a damaged one."""
    path = trial_folder(sweep, number) / RECORD
    if not path.is_file():
        return {}
    try:
        return atomic.read_json(path, sweep)
    except UserError:
        return {}


class TrialRun:
    """A trial that this process has, and its folder. Called by whoever holds the trial in the book.

    Args:
        sweep: the sweep's folder.
        plan: of the sweep.
        taken: the trial.

    Attributes:
        steps: its budget, per task.
        evaluations: its metric by step, as far as they were read.
        step, seconds: how far it is.

    Raises:
        UserError: its folder is a link, which may lead to a run of the user's own.
    """

    def __init__(self, sweep: Path, plan: Plan, taken: Taken):
        self.number, self.path = taken.number, trial_folder(sweep, taken.number)
        for folder in (self.path.parent, self.path):
            atomic.refuse_link(folder)
        self.overrides = tuple(plan.overrides(taken.values))
        self.steps = plan.steps(taken.values)
        self.evaluations: dict[int, float] = {}
        self.step, self.seconds = 0, 0.0
        self._plan, self._metric = plan, plan.search["metric"]
        self._read: tuple[int, int] = (0, 0)  # which file, and up to where
        self._values = taken.values
        self.record: dict[str, Any] = {
            "format": 1,
            "number": self.number,
            "overrides": list(self.overrides),
            "values": {key: str(value) for key, value in taken.values.items()},
            "command": plan.command(taken.values),
            "state": "running",
            "value": None,
            "metric": None,
            "why": None,
            "attempts": 1,
            "step": 0,
            "seconds": 0.0,
            "handle": "",
        }
        before = read_record(sweep, self.number)
        self.record |= {key: before[key] for key in ("state", "value", "metric", "why", "handle") if key in before}
        if isinstance(before.get("attempts"), int):
            self.record["attempts"] = before["attempts"]

    def make(self) -> None:
        """Make the run, unless it is there: a folder with the configuration in which `auto` stays open, for its worker to settle.

        Raises:
            UserError: what the trial tries is no valid configuration. OSError: the disk is full.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.remove_temporaries(self.path)
        if not (self.path / RECORD).is_file():
            self.write()
        if not RunFolder.is_run(self.path):
            config = self._plan.configuration(self._values, self.path)
            atomic.replace(self.path / "config.yaml", compose.dump(config).encode())

    def write(self, **changes: Any) -> None:
        """Take changes into trial.json, in one move. Raises OSError."""
        self.record |= changes
        atomic.replace(self.path / RECORD, atomic.to_json(self.record).encode())

    def status(self) -> str | None:
        """What run.json says of the run; None while it says nothing."""
        return self._run_record().get("status")

    def is_free(self) -> bool:
        """Whether no process works on the run, such as the worker of a sweep that was killed, which has yet to save."""
        return file_lock.is_free(self.path / ".lock")

    def _run_record(self) -> dict[str, Any]:
        try:
            return RunFolder(self.path).read_record()
        except UserError:
            return {}

    def why(self) -> str:
        """What the worker said last: the run's own error, or the last line that it printed."""
        error = self._run_record().get("error")
        if isinstance(error, str) and error:
            return error.splitlines()[0][:300]
        return self._last_line() or "it said nothing"

    def was_refused(self) -> bool:
        """Whether the last worker ended because another process had the run, as its last line says."""
        return self._last_line().startswith(f"{self.path} {IN_USE} ")

    def _last_line(self) -> str:
        with contextlib.suppress(OSError), atomic.open_regular(self.path / OUTPUT) as output:
            output.seek(max(0, os.fstat(output.fileno()).st_size - _LARGEST_OUTPUT))
            lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
            told = [line for line in lines if line.startswith("mtrl: error: ")]
            if told or lines:
                return re.sub(r"[^\x20-\x7e\xa0-\uffff]", "?", (told or lines)[-1].removeprefix("mtrl: error: "))[:300]
        return ""

    # -- its metrics --------------------------------------------------------------------------------------------------------------

    def read_metrics(self) -> list[tuple[int, float]]:
        """The evaluations that came since the last call, (step, metric) each.

        A half-written last line is left for the next call; rows that were cut by a resume are read again as they are written again.
        """
        found: list[tuple[int, float]] = []
        try:
            with atomic.open_regular(self.path / "metrics.jsonl") as file:
                status = os.fstat(file.fileno())
                begin = self._read[1] if self._read[0] == status.st_ino and status.st_size >= self._read[1] else 0
                file.seek(begin)
                while whole := (content := file.read(_LARGEST_READ)).rfind(b"\n") + 1:
                    begin += whole
                    file.seek(begin)
                    found += self._take_rows(content[:whole])
        except OSError:
            return found
        self._read = (status.st_ino, begin)
        return found

    def _take_rows(self, lines: bytes) -> list[tuple[int, float]]:
        found = []
        for line in lines.splitlines():
            row = _row(line)
            if row is None:
                continue
            self.step, self.seconds = row["step"], float(row.get("seconds") or 0.0)
            value = self._value(row)
            if value is not None and self.evaluations.get(row["step"]) != value:
                self.evaluations[row["step"]] = value
                found.append((row["step"], value))
        return found

    def _value(self, row: dict[str, Any]) -> float | None:
        """The metric of an evaluation by which trials are judged: the one asked for, or else what ranks checkpoints. None: it has none."""
        name = self._metric
        if name is None:
            returns = [key for key in row if key.startswith(EVAL_RETURN)]
            name = MEAN_SCORE if MEAN_SCORE in row else returns[0] if len(returns) == 1 else None
        value = row.get(name) if name is not None else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        self.record["metric"] = name
        return float(value)

    @property
    def score(self) -> float | None:
        """The last evaluation's metric."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
