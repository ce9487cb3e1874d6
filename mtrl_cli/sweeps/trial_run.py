"""Run folder of a trial: its configuration, `trial.json`, and the evaluations that its worker writes."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt

from mtrl_cli.config import compose
from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic, file_lock
from mtrl_cli.launchers.base import OUTPUT, Job
from mtrl_cli.metric_names import EVAL_RETURN, MEAN_SCORE
from mtrl_cli.runs.run_dir import IN_USE, RunFolder, parse_row
from mtrl_cli.sweeps.display import TrialRow
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.search_space import overrides_of

TRIALS = "trials"
RECORD = "trial.json"
_LONGEST_LINE = 2**24  # bytes of a line of metrics
_LARGEST_OUTPUT = 2**16  # bytes at the end of a worker's output that are searched for the last line


class TrialRecord(BaseModel):
    """The content of trial.json.

    Attributes:
        number: from 0.
        overrides: the overrides that differ between trials.
        values: the values of the overrides by key, as text.
        command: the command that trains the run without the sweep.
        state: running, completed, pruned or failed.
        value: the metric of a trial that was completed or pruned.
        metric: the metric's name.
        why: the reason of a failure.
        attempts: the number of started processes, without restarts after a stop of the sweep.
        step, seconds: the run's step and time when the trial ended.
        handle: identifies the trial's job to a later process (`Launcher.attach`).
        pruned: whether the pruner has decided to stop the trial.
    """

    model_config = ConfigDict(strict=True)

    format: Literal[1] = 1
    number: NonNegativeInt
    overrides: tuple[str, ...]
    values: dict[str, str]
    command: str
    state: Literal["running", "completed", "pruned", "failed"] = "running"
    value: FiniteFloat | None = None
    metric: str | None = None
    why: str | None = None
    attempts: NonNegativeInt = 1
    step: NonNegativeInt = 0
    seconds: FiniteFloat = 0.0
    handle: str = ""
    pruned: bool = False

    def row(self, plan: Plan) -> TrialRow:
        """Return the row of a table."""
        return TrialRow(
            self.number,
            self.values,
            self.state,
            score=self.value,
            step=self.step,
            steps=plan.steps(self.values),
            seconds=self.seconds or None,
            note=self.why or "",
        )


def trial_folder(sweep: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return sweep / TRIALS / f"{number:04d}"


def read_record(sweep: Path, number: int) -> TrialRecord | None:
    """Read a trial's trial.json; None if there is none. Raises UserError if it is damaged."""
    path = trial_folder(sweep, number) / RECORD
    record = parse_record(path, sweep)
    if record is not None and record.number != number:
        raise UserError(f"{path} is damaged: number must be {number}, got {record.number}")
    return record


def parse_record(path: Path, folder: Path) -> TrialRecord | None:
    """Read a trial.json inside `folder`; None if there is none. Raises UserError if it is damaged."""
    return atomic.read_model(TrialRecord, path, folder) if os.path.lexists(path) else None


class TrialRun:
    """The run of a trial that this process has taken.

    Args:
        sweep: the sweep's folder.
        plan: the sweep's plan.
        number: the trial's number.
        values: the trial's values by key, as text.

    Attributes:
        job: the job of the run's worker; None before the worker is started and after it has ended.
        steps: the run's budget per task.
        evaluations: the metric by step, as far as it was read.
        step, seconds: the run's progress.

    Raises:
        UserError: the run's folder is a link, which may lead to another run of the user, or its trial.json is damaged.
    """

    def __init__(self, sweep: Path, plan: Plan, number: int, values: Mapping[str, str]):
        self.number = number
        self.path = trial_folder(sweep, number)
        for folder in (self.path.parent, self.path):
            atomic.refuse_link(folder)
        self.job: Job | None = None
        self.steps = plan.steps(values)
        self.evaluations: dict[int, float] = {}
        self.step, self.seconds = 0, 0.0
        self._plan = plan
        self._values = values
        self._read_to: tuple[int, int] = (0, 0)  # the file's inode, and the position in it
        self.record = read_record(sweep, number) or TrialRecord(
            number=number, overrides=tuple(overrides_of(values)), values=dict(values), command=plan.command(values)
        )

    def make(self) -> None:
        """Create the run's folder unless it exists. Its configuration keeps every `auto`, which the worker resolves.

        Raises:
            UserError: the trial's values are not a valid configuration.
            OSError: the disk is full.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.remove_temporaries(self.path)
        if not (self.path / RECORD).is_file():
            self.write()
        if not RunFolder.is_run(self.path):
            config = self._plan.configuration(self._values, self.path)
            atomic.replace(self.path / "config.yaml", compose.dump(config).encode())

    def write(self, **changes: Any) -> None:
        """Write trial.json with these changes. Raises OSError."""
        self.record = self.record.model_copy(update=changes)
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.replace(self.path / RECORD, atomic.to_json(self.record.model_dump()).encode())

    def end(self, state: str, why: str | None = None) -> None:
        """Write the end of the trial. Raises OSError."""
        value = None if state == "failed" else self.score
        self.write(state=state, value=value, step=self.step, seconds=self.seconds, why=why, handle="")

    def status(self) -> str | None:
        """Return the status in run.json; None before it is written."""
        return self._run_record().get("status")

    def is_free(self) -> bool:
        """Return whether no process works on the run. The worker of a killed sweep may still be saving."""
        return file_lock.is_free(self.path / ".lock")

    def _run_record(self) -> dict[str, Any]:
        try:
            return RunFolder(self.path).read_record()
        except UserError:
            return {}

    def error(self) -> str:
        """Return the error in run.json, or else the last line of the worker's output."""
        error = self._run_record().get("error")
        if isinstance(error, str) and error:
            return error.splitlines()[0][:300]
        return self._last_line() or "no output"

    def was_refused(self) -> bool:
        """Return whether the last worker ended because another process held the run."""
        return self._last_line().startswith(f"{self.path} {IN_USE} ")

    def _last_line(self) -> str:
        with contextlib.suppress(OSError), atomic.open_regular(self.path / OUTPUT) as output:
            output.seek(max(0, os.fstat(output.fileno()).st_size - _LARGEST_OUTPUT))
            lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("mtrl: error: ")]
            if lines:
                return re.sub(r"[^\x20-\x7e\xa0-\uffff]", "?", (errors or lines)[-1].removeprefix("mtrl: error: "))[:300]
        return ""

    # -- metrics ------------------------------------------------------------------------------------------------------------------

    def read_metrics(self) -> list[tuple[int, float]]:
        """Return the evaluations since the last call, as (step, metric).

        An incomplete last line is left to the next call. After a resume has cut the file, the file is read from its start.
        """
        found: list[tuple[int, float]] = []
        try:
            with atomic.open_regular(self.path / "metrics.jsonl") as file:
                status = os.fstat(file.fileno())
                begin = self._read_to[1] if self._read_to[0] == status.st_ino and status.st_size >= self._read_to[1] else 0
                file.seek(begin)
                while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                    begin += len(line)
                    found += self._new_evaluation(line)
        except OSError:
            return found
        self._read_to = (status.st_ino, begin)
        return found

    def _new_evaluation(self, line: bytes) -> list[tuple[int, float]]:
        """Read the progress from a line of metrics.jsonl, and return the line's evaluation, if there is a new one."""
        row = parse_row(line)
        if row is None:
            return []
        self.step, self.seconds = row["step"], float(row.get("seconds") or 0.0)
        value = self._value(row)
        if value is None or self.evaluations.get(self.step) == value:
            return []
        self.evaluations[self.step] = value
        return [(self.step, value)]

    def _value(self, row: dict[str, Any]) -> float | None:
        """Return the row's value of `sweep.metric`, by default of the metric that ranks checkpoints; None if it is missing."""
        name = self._plan.search["metric"]
        if name is None:
            returns = [key for key in row if key.startswith(EVAL_RETURN)]
            name = MEAN_SCORE if MEAN_SCORE in row else returns[0] if len(returns) == 1 else None
        value = row.get(name) if name is not None else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        self.record.metric = name
        return float(value)

    @property
    def score(self) -> float | None:
        """The metric of the last evaluation; None before the first."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None
