"""The work of one process on a sweep: take trials, start their runs, report evaluations, and record how the trials end."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.launchers.base import OUTPUT, End, Launcher
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.sweeps.display import ENDED, SweepDisplay, TrialRow
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.trial_run import TrialRecord, TrialRun, read_record, trial_folder
from mtrl_cli.sweeps.trial_storage import Assignment, TrialStorage

POLL_SECONDS = 0.05
METRICS_SECONDS = 0.5  # between reads of the runs' metrics
STORAGE_SECONDS = 2.0  # between reads of other processes' progress


class SweepLoop:
    """The work of one process on a sweep.

    Args:
        folder: the sweep's folder, absolute.
        plan: the sweep's plan.
        storage: the sweep's trials.
        launcher: starts the workers.
        display: shows the progress.
        stop: a stop request ends the work.
    """

    def __init__(self, folder: Path, plan: Plan, storage: TrialStorage, launcher: Launcher, display: SweepDisplay, stop: StopRequest):
        self.folder = folder
        self.plan = plan
        self.storage = storage
        self.launcher = launcher
        self.display = display
        self.stop = stop
        # Trials that this process has taken. Without a job, a trial waits for the last worker of its run to end.
        self._active: dict[int, TrialRun] = {}
        self._ended: dict[int, TrialRow] = {}
        self._stored: list[TrialRow] = []  # all trials, at the last read of the storage
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
        self._read_storage()
        return all(row.state in ENDED or (row.state == "running" and not row.is_here) for row in self._stored)

    def _stop_workers(self) -> None:
        """Stop the workers, wait until they have saved, and leave their trials to the next process."""
        jobs = {run.job: run for run in self._active.values() if run.job is not None}
        for job in jobs:
            job.stop()
        while jobs:
            for job in [job for job in jobs if job.poll() is not None]:
                run = jobs.pop(job)
                run.job = None
                with suppress(RunError):  # if the storage was lost, the next process copies the result from trial.json
                    run.read_metrics()
                    if not self._finish_if_over(run):
                        run.write(handle="")
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
        for run in list(self._active.values()):
            if run.job is None and run.is_free():
                self._start(run)

    def _begin(self, assignment: Assignment) -> None:
        run = self._active[assignment.number] = TrialRun(self.folder, self.plan, assignment.number, assignment.values)
        if run.record.state in ENDED:  # the last process died before it wrote the end to the storage
            self._close(run)
            return
        try:
            run.make()
        except UserError as error:
            self._finish(run, "failed", str(error).splitlines()[0])
            return
        self._report_evaluations(run)
        if run.record.handle:
            run.job = self.launcher.attach(run.path, run.record.handle)
        if assignment.is_retry:
            self.display.message(f"trial {run.number}: {'attached to its running job' if run.job else 'resumed'}")

    def _start(self, run: TrialRun) -> None:
        if run.status() == "completed":
            run.read_metrics()
        if not self._finish_if_over(run):
            run.job = self.launcher.start(run.path)
            if run.job.handle != run.record.handle:
                run.write(handle=run.job.handle)

    # -- progress and end ---------------------------------------------------------------------------------------------------------

    def _poll_jobs(self) -> None:
        for run in list(self._active.values()):
            end = run.job.poll() if run.job is not None else None
            if end is not None:
                run.job = None
                self._report_evaluations(run)
                self._handle_end(run, end)

    def _handle_end(self, run: TrialRun, end: End) -> None:
        """Finish a trial whose worker has ended, or retry the trial if the worker has died.

        The status of the run has priority over the exit code: a node may be lost, or an interpreter crash, after its run was completed.
        """
        if self._finish_if_over(run):
            return
        if end.code == 2 and (not run.is_free() or run.was_refused()):
            return  # another process has locked the run, such as an orphan that is saving: wait for that process
        if end.code == 2 or (end.code == 1 and run.status() in (None, "failed")):
            self._finish(run, "failed", run.error())
        else:
            self._retry(run, end)

    def _finish_if_over(self, run: TrialRun) -> bool:
        if run.status() == "completed":
            self._finish(run, "completed")
        elif run.record.pruned:
            self._finish(run, "pruned")
        else:
            return False
        return True

    def _retry(self, run: TrialRun, end: End) -> None:
        reason = end.why or (f"exit code {end.code}: {run.error()}" if end.code is not None else "no process found")
        attempts, retries = run.record.attempts, self.plan.search["retries"]
        if attempts > retries:
            times = "" if attempts == 1 else f" {attempts} times"
            self._finish(run, "failed", f"its process died{times} ({reason})")
            return
        run.write(attempts=attempts + 1, why=f"its process died ({reason})", handle="")
        self.display.message(f"trial {run.number}: its process died ({reason}); resuming it, retry {attempts} of {retries}")

    def _finish(self, run: TrialRun, state: str, why: str | None = None) -> None:
        """Record the end of a trial, first in its folder, from which another process can update the storage."""
        run.end(state, why)
        if state == "failed":
            self.display.message(f"trial {run.number} failed: {why} (see {run.path / OUTPUT})")
        self._close(run)

    def _close(self, run: TrialRun) -> None:
        self.storage.finish(run.number, run.record.state, run.record.value)
        self._ended[run.number] = run.record.row(self.plan)
        del self._active[run.number]
        self._storage_read = self._nothing_to_take = -float("inf")

    def _report_evaluations(self, run: TrialRun) -> None:
        """Report the new evaluations of a run, except the evaluation before its first step. The last one is too late for pruning."""
        for step, value in run.read_metrics():
            if step == 0 or not self.storage.report(run.number, step, value, is_last=step >= run.steps) or run.record.pruned:
                continue
            run.write(pruned=True)
            self.display.message(f"trial {run.number}: pruned at step {step:,}")
            if run.job is not None:
                run.job.stop()

    # -- table --------------------------------------------------------------------------------------------------------------------

    def _read_progress(self) -> None:
        if time.monotonic() - self._metrics_read < METRICS_SECONDS:
            return
        self._metrics_read = time.monotonic()
        for run in list(self._active.values()):
            self._report_evaluations(run)
        self._read_storage()
        self.display.update(self.rows())

    def _read_storage(self) -> None:
        if time.monotonic() - self._storage_read > STORAGE_SECONDS:
            self._stored, self._storage_read = self.storage.rows(), time.monotonic()

    def rows(self) -> list[TrialRow]:
        """Return the state of all trials: current for trials of this process, from the last read of the storage for others."""
        rows = []
        for stored in self._stored:
            number = stored.number
            if number in self._active:
                rows.append(self._active_row(self._active[number]))
                continue
            if number not in self._ended and stored.state in ENDED:
                self._ended[number] = self._ended_row(stored)
            rows.append(self._ended.get(number) or (replace(stored, state="elsewhere") if stored.state == "running" else stored))
        return rows

    def _active_row(self, run: TrialRun) -> TrialRow:
        row = replace(run.record.row(self.plan), score=run.score, step=run.step, seconds=run.seconds or None)
        if run.job is None:
            return replace(row, state="queued", note="waits for the last process of its run to end")
        return replace(row, state="queued") if run.job.is_waiting() else row

    def _ended_row(self, stored: TrialRow) -> TrialRow:
        number = stored.number
        if not stored.is_here:
            return stored
        if not trial_folder(self.folder, number).exists():
            self.display.message(f"trial {number}: its folder is missing; its metric is kept, and the trial is not repeated")
        try:
            record = read_record(self.folder, number)
            if record is not None and record.state == "failed":
                record = self._completed_since(stored) or record
        except UserError as error:
            return replace(stored, note=str(error))
        if record is None or record.state not in ENDED:
            return stored
        return replace(record.row(self.plan), score=stored.score if record.value is None else record.value)

    def _completed_since(self, stored: TrialRow) -> TrialRecord | None:
        """Record a failed trial as completed if its run was completed since, by `mtrl resume`."""
        run = TrialRun(self.folder, self.plan, stored.number, stored.values)
        if run.status() != "completed":
            return None
        run.read_metrics()
        run.end("completed")
        if run.score is not None:
            self.storage.complete_failed(run.number, run.score)
        self.display.message(f"trial {run.number}: counts as completed, because its run was completed after it had failed")
        return run.record
