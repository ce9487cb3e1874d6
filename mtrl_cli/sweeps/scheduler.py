"""One process's work on a sweep: take trials, launch their runs, report their evaluations, and record how they end."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.sweeps.display import ENDED, TrialRow
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.trial_run import TrialRecord, TrialRun, read_record, trial_folder
from mtrl_cli.sweeps.trial_storage import Assignment, TrialStatus, TrialStorage

POLL_SECONDS = 0.05
METRICS_SECONDS = 0.5  # between reads of the runs' metrics
STORAGE_SECONDS = 2.0  # between reads of other processes' progress


class ProgressDisplay(Protocol):
    """Interface of `SweepDisplay` that a scheduler uses."""

    def update(self, rows: list[TrialRow]) -> None:
        """Take the state of all trials."""

    def message(self, text: str) -> None:
        """Print lines that stay."""


@dataclass
class _Active:
    """A trial that this process holds. Without a job it waits for the last worker of its run to end."""

    run: TrialRun
    job: Job | None = None


class SweepLoop:
    """One process's work on a sweep.

    Args:
        folder: the sweep's folder, absolute.
        plan: of the sweep.
        storage: of its trials.
        launcher: starts the workers.
        display: shows the progress.
        stop: ends the work.
    """

    def __init__(self, folder: Path, plan: Plan, storage: TrialStorage, launcher: Launcher, display: ProgressDisplay, stop: StopRequest):
        self.folder = folder
        self.plan = plan
        self.storage = storage
        self.launcher = launcher
        self.display = display
        self.stop = stop
        self._active: dict[int, _Active] = {}
        self._rows: dict[int, TrialRow] = {}  # of trials that have ended
        self._statuses: list[TrialStatus] = []
        self._metrics_read = self._storage_read = self._nothing_to_take = -float("inf")  # times

    def work(self) -> list[TrialRow]:
        """Work until every trial has ended or runs on another machine. Returns all trials.

        Raises:
            Stopped: by a signal, after the workers have saved.
            RunError: the storage or the launcher was lost.
        """
        try:
            while True:
                self.stop.check()
                self._poll_jobs()
                self._start_trials()
                self._read_progress()
                if self._is_over():
                    rows = self.rows()
                    self.display.update(rows)
                    return rows
                time.sleep(POLL_SECONDS)
        finally:
            self._stop_workers()

    def _is_over(self) -> bool:
        if self._active:
            return False
        if time.monotonic() - self._storage_read > STORAGE_SECONDS:
            self._read_storage()
        return all(status.state in ENDED or (status.state == "running" and not status.is_here) for status in self._statuses)

    def _stop_workers(self) -> None:
        """Stop the workers, wait until they have saved, and leave their trials to the next process."""
        jobs = {active.job: active for active in self._active.values() if active.job is not None}
        for job in jobs:
            job.stop()
        while jobs:
            for job in [job for job in jobs if job.poll() is not None]:
                active = jobs.pop(job)
                active.job = None
                with suppress(RunError):  # a lost storage gets the result from trial.json later
                    active.run.read_metrics()
                    if not self._finish_if_over(active):
                        active.run.write(handle="")
            time.sleep(POLL_SECONDS)

    # -- start --------------------------------------------------------------------------------------------------------------------

    def _start_trials(self) -> None:
        """Take trials while fewer than the launcher's jobs are active, and start the active trials whose runs are free."""
        while len(self._active) < self.launcher.jobs and time.monotonic() - self._nothing_to_take > STORAGE_SECONDS:
            assignment = self.storage.take()
            if assignment is None:
                self._nothing_to_take = time.monotonic()
                break
            self._begin(assignment)
        for active in list(self._active.values()):
            if active.job is None and active.run.is_free():
                self._start(active)

    def _begin(self, assignment: Assignment) -> None:
        run = TrialRun(self.folder, self.plan, assignment)
        active = self._active[run.number] = _Active(run)
        if run.record.state in ENDED:  # the last process died before it wrote the end to the storage
            self._close(active)
            return
        try:
            run.make()
        except UserError as error:
            self._finish(active, "failed", str(error).splitlines()[0])
            return
        self._report_evaluations(active)
        if run.record.handle:
            active.job = self.launcher.attach(run.path, run.record.handle)
        if assignment.is_retry:
            self.display.message(f"trial {run.number}: {'attached to its running job' if active.job else 'resumed'}")

    def _start(self, active: _Active) -> None:
        run = active.run
        if run.status() == "completed":
            run.read_metrics()
        if not self._finish_if_over(active):
            active.job = self.launcher.start(run.path)
            if active.job.handle != run.record.handle:
                run.write(handle=active.job.handle)

    # -- progress and end ---------------------------------------------------------------------------------------------------------

    def _poll_jobs(self) -> None:
        for active in list(self._active.values()):
            end = active.job.poll() if active.job is not None else None
            if end is not None:
                active.job = None
                self._report_evaluations(active)
                self._handle_end(active, end)

    def _handle_end(self, active: _Active, end: End) -> None:
        """Finish a trial whose worker has ended, or retry it if the worker has died.

        The status of the run has priority over the exit code: a node may be lost, or an interpreter crash, after its run was completed.
        """
        run = active.run
        if self._finish_if_over(active):
            return
        if end.code == 2 and (not run.is_free() or run.was_refused()):
            return  # another process holds the run, such as an orphan that is saving: wait for it
        if end.code == 2 or (end.code == 1 and run.status() in (None, "failed")):
            self._finish(active, "failed", run.error())
        else:
            self._retry(active, end)

    def _finish_if_over(self, active: _Active) -> bool:
        if active.run.status() == "completed":
            self._finish(active, "completed")
        elif active.run.record.pruned:
            self._finish(active, "pruned")
        else:
            return False
        return True

    def _retry(self, active: _Active, end: End) -> None:
        run = active.run
        reason = end.why or (f"exit code {end.code}: {run.error()}" if end.code is not None else "no process found")
        attempts, retries = run.record.attempts, self.plan.search["retries"]
        if attempts > retries:
            times = "" if attempts == 1 else f" {attempts} times"
            self._finish(active, "failed", f"its process died{times} ({reason})")
            return
        run.write(attempts=attempts + 1, why=f"its process died ({reason})", handle="")
        self.display.message(f"trial {run.number}: its process died ({reason}); resuming it, retry {attempts} of {retries}")

    def _finish(self, active: _Active, state: str, why: str | None = None) -> None:
        """Record the end of a trial, first in its folder, from which another process can update the storage."""
        run = active.run
        run.end(state, why)
        if state == "failed":
            self.display.message(f"trial {run.number} failed: {why} (see {run.path / OUTPUT})")
        self._close(active)

    def _close(self, active: _Active) -> None:
        run = active.run
        self.storage.finish(run.number, run.record.state, run.record.value)
        self._rows[run.number] = self._active_row(active)
        del self._active[run.number]
        self._storage_read = self._nothing_to_take = -float("inf")

    def _report_evaluations(self, active: _Active) -> None:
        """Report the new evaluations of a run, except the one before its first step. The last one is too late for pruning."""
        run = active.run
        for step, value in run.read_metrics():
            if step == 0 or not self.storage.report(run.number, step, value, is_last=step >= run.steps) or run.record.pruned:
                continue
            run.write(pruned=True)
            self.display.message(f"trial {run.number}: pruned at step {step:,}")
            if active.job is not None:
                active.job.stop()

    # -- table --------------------------------------------------------------------------------------------------------------------

    def _read_progress(self) -> None:
        if time.monotonic() - self._metrics_read < METRICS_SECONDS:
            return
        self._metrics_read = time.monotonic()
        for active in list(self._active.values()):
            self._report_evaluations(active)
        if time.monotonic() - self._storage_read > STORAGE_SECONDS:
            self._read_storage()
        self.display.update(self.rows())

    def _read_storage(self) -> None:
        self._statuses, self._storage_read = self.storage.statuses(), time.monotonic()

    def rows(self) -> list[TrialRow]:
        """Return the state of all trials: current for trials of this process, from the last read of the storage for others."""
        rows = []
        for status in self._statuses:
            number = status.number
            if number in self._active:
                rows.append(self._active_row(self._active[number]))
                continue
            if number not in self._rows and status.state in ENDED:
                self._rows[number] = self._ended_row(status)
            rows.append(self._rows.get(number) or self._status_row(status))
        return rows

    def _active_row(self, active: _Active) -> TrialRow:
        run, row = active.run, active.run.record.row(self.plan)
        if row.state in ENDED:
            return row
        row = dataclasses.replace(row, score=run.score, step=run.step, seconds=run.seconds or None)
        if active.job is None:
            return dataclasses.replace(row, state="queued", note="waits for the last process of its run to end")
        return dataclasses.replace(row, state="queued") if active.job.is_waiting() else row

    def _status_row(self, status: TrialStatus) -> TrialRow:
        state = "elsewhere" if status.state == "running" else status.state
        overrides = tuple(self.plan.overrides(status.values))
        return TrialRow(status.number, overrides, state, status.value, steps=self.plan.steps(status.values))

    def _ended_row(self, status: TrialStatus) -> TrialRow:
        row = self._status_row(status)
        if not status.is_here:
            return row
        if not trial_folder(self.folder, status.number).exists():
            self.display.message(f"trial {status.number}: its folder is missing; its metric is kept, and the trial is not repeated")
        try:
            record = read_record(self.folder, status.number)
            if record is not None and record.state == "failed":
                record = self._completed_since(status) or record
        except UserError as error:
            return dataclasses.replace(row, note=str(error))
        if record is None or record.state not in ENDED:
            return row
        return dataclasses.replace(record.row(self.plan), score=row.score if record.value is None else record.value)

    def _completed_since(self, status: TrialStatus) -> TrialRecord | None:
        """Record a failed trial as completed if its run was completed since, by `mtrl resume`."""
        run = TrialRun(self.folder, self.plan, Assignment(status.number, status.values, is_retry=True))
        if run.status() != "completed":
            return None
        run.read_metrics()
        run.end("completed")
        if run.score is not None:
            self.storage.complete_failed(run.number, run.score)
        self.display.message(f"trial {run.number}: counts as completed, because its run was completed after it had failed")
        return run.record
