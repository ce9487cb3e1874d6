"""One process's work on a sweep: it takes trials, has them worked on, follows their evaluations, and tells how they end."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.sweeps.display import ENDED, TrialRow
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.trial_run import TrialRun, read_record, trial_folder
from mtrl_cli.sweeps.trial_storage import Entry, Taken, TrialStorage

POLL_SECONDS = 0.05
LOOK_SECONDS = 0.5  # between looks at the runs' metrics
BOOK_SECONDS = 2.0  # between looks at what other processes have done


class Shows(Protocol):
    """Who shows a sweep: sweep_display.SweepDisplay."""

    def update(self, rows: list[TrialRow]) -> None:
        """Take the trials as they are now."""

    def message(self, text: str) -> None:
        """Print lines that stay."""


@dataclass
class _Active:
    """A trial that this process has. `job` None: it waits for its run's last worker to end."""

    run: TrialRun
    job: Job | None = None
    pruned: bool = False


class SweepLoop:
    """One process's work on a sweep.

    Args:
        folder: the sweep's, absolute.
        plan: of the sweep.
        book: its trials.
        launcher: where they are worked on.
        display: what the user sees.
        stop: whether to end.
    """

    def __init__(self, folder: Path, plan: Plan, book: TrialStorage, launcher: Launcher, display: Shows, stop: StopRequest):
        self.folder, self.plan, self.book, self.launcher, self.display, self.stop = folder, plan, book, launcher, display, stop
        self._active: dict[int, _Active] = {}
        self._rows: dict[int, TrialRow] = {}  # of trials that have ended
        self._entries: list[Entry] = []
        self._looked = self._read = -float("inf")
        self._nothing_to_take_at = -float("inf")
        self._changed = True  # whether we have told the book something since it was read

    def work(self) -> list[TrialRow]:
        """Work until every trial has ended, or is another machine's; returns them all.

        Raises:
            Stopped: by a signal, once the workers have saved. RunError: the storage or the launcher is lost.
        """
        try:
            while True:
                self.stop.check()
                self._poll()
                self._fill()
                self._look()
                if self._is_over():
                    rows = self.rows()
                    self.display.update(rows)
                    return rows
                time.sleep(POLL_SECONDS)
        finally:
            self._leave()

    def _is_over(self) -> bool:
        if self._active:
            return False
        if self._changed or time.monotonic() - self._read > BOOK_SECONDS:
            self._read_book()
        return all(entry.state in ENDED or (entry.state == "running" and not entry.here) for entry in self._entries)

    def _leave(self) -> None:
        """Ask the workers to save, wait until they have, and leave their trials to whoever goes on."""
        working = [active for active in self._active.values() if active.job is not None]
        for active in working:
            if active.job is not None:
                active.job.stop()
        while working:
            for active in working:
                end = active.job.poll() if active.job is not None else None
                if end is not None:
                    active.job = None
                    with suppress(RunError):  # a storage that is lost: what is in the folder is told later
                        self._left(active)
            working = [active for active in working if active.job is not None]
            time.sleep(POLL_SECONDS)

    def _left(self, active: _Active) -> None:
        active.run.read_metrics()
        if active.run.status() == "completed":
            self._finish(active, "completed")
        elif active.pruned:
            self._finish(active, "pruned")
        else:
            active.run.write(handle="")

    # -- trials begin -------------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Take trials while there is room for them."""
        while len(self._active) < self.launcher.jobs and time.monotonic() - self._nothing_to_take_at > BOOK_SECONDS:
            taken = self.book.take()
            if taken is None:
                self._nothing_to_take_at = time.monotonic()
                return
            self._begin(taken)
        for active in list(self._active.values()):
            if active.job is None and active.run.is_free():
                self._start(active)

    def _begin(self, taken: Taken) -> None:
        run = TrialRun(self.folder, self.plan, taken)
        active = _Active(run)
        self._active[run.number] = active
        if run.record["state"] in ENDED:  # its process died before it could tell
            self._close(active)
            return
        try:
            run.make()
        except UserError as error:
            self._finish(active, "failed", str(error).splitlines()[0])
            return
        for step, value in run.read_metrics():
            self._hear(active, step, value)
        active.pruned = active.pruned or self.book.is_pruned(run.number)
        if run.record["handle"]:
            active.job = self.launcher.attach(run.path, run.record["handle"])
        if taken.begun:
            how = "attached to its job again" if active.job else "gone on with where it was left"
            self.display.message(f"trial {run.number}: {how}")

    def _start(self, active: _Active) -> None:
        run = active.run
        if run.status() == "completed":
            run.read_metrics()
            self._finish(active, "completed")
        elif active.pruned:
            self._finish(active, "pruned")
        else:
            active.job = self.launcher.start(run.path)
            if active.job.handle != run.record["handle"]:
                run.write(handle=active.job.handle)

    # -- trials go on and end -----------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        for active in list(self._active.values()):
            end = active.job.poll() if active.job is not None else None
            if end is not None:
                active.job = None
                for step, value in active.run.read_metrics():
                    self._hear(active, step, value)
                self._ended(active, end)

    def _ended(self, active: _Active, end: End) -> None:
        """What follows from how a worker ended: completed, pruned, failed for good, or died and gone on with.

        What the run says of itself goes first: a node may be lost, or an interpreter die, after its run has completed.
        """
        run, status = active.run, active.run.status()
        if status == "completed":
            self._finish(active, "completed")
        elif active.pruned:
            self._finish(active, "pruned")
        elif end.code == 2 and (not run.is_free() or run.was_refused()):
            return  # another process has taken the run since we looked, such as an orphan that has yet to save: it is waited for
        elif end.code == 2 or (end.code == 1 and status in (None, "failed")):
            self._finish(active, "failed", run.why())
        else:
            self._died(active, end)

    def _died(self, active: _Active, end: End) -> None:
        run = active.run
        how = end.why or (f"exit code {end.code}: {run.why()}" if end.code is not None else "its process is gone")
        attempts, retries = run.record["attempts"], self.plan.search["retries"]
        if attempts > retries:
            times = "" if attempts == 1 else f" {attempts} times"
            self._finish(active, "failed", f"its process died{times} ({how})")
            return
        run.write(attempts=attempts + 1, why=f"its process died ({how})", handle="")
        self.display.message(f"trial {run.number}: its process died ({how}); going on with it, {attempts} of {retries} times")

    def _finish(self, active: _Active, state: str, why: str | None = None) -> None:
        """Write how a trial ended, first in its folder, so that whoever finds it running in the book can tell on."""
        run = active.run
        run.path.mkdir(parents=True, exist_ok=True)
        told = {"state": state, "value": None if state == "failed" else run.score, "step": run.step, "seconds": run.seconds}
        run.write(**told, why=why, handle="")
        if state == "failed":
            self.display.message(f"trial {run.number} failed: {why} (see {run.path / OUTPUT})")
        self._close(active)

    def _close(self, active: _Active) -> None:
        run = active.run
        self.book.tell(run.number, run.record["state"], run.record["value"])
        self._rows[run.number] = self._row_of(active)
        del self._active[run.number]
        self._changed = True
        self._nothing_to_take_at = -float("inf")

    def _hear(self, active: _Active, step: int, value: float) -> None:
        """Tell the book an evaluation. That before the first step judges nothing, and the last one comes too late to prune."""
        if step == 0:
            return
        prune = self.book.report(active.run.number, step, value, is_last=step >= active.run.steps)
        if prune and not active.pruned:
            active.pruned = True
            self.display.message(f"trial {active.run.number}: pruned at step {step:,}")
            if active.job is not None:
                active.job.stop()

    # -- what is shown ------------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for active in list(self._active.values()):
            for step, value in active.run.read_metrics():
                self._hear(active, step, value)
        if time.monotonic() - self._read > BOOK_SECONDS:
            self._read_book()
        self.display.update(self.rows())

    def _read_book(self) -> None:
        self._entries, self._read, self._changed = self.book.entries(), time.monotonic(), False

    def rows(self) -> list[TrialRow]:
        """All trials, as they were when the book was last read; ours as they are."""
        rows = []
        for entry in self._entries:
            number = entry.number
            if number in self._active:
                rows.append(self._row_of(self._active[number]))
                continue
            if number not in self._rows and entry.state in ENDED:
                self._rows[number] = self._row_of_ended(entry)
            rows.append(self._rows.get(number) or self._row_of_other(entry))
        return rows

    def _row_of(self, active: _Active) -> TrialRow:
        run, record = active.run, active.run.record
        state = record["state"]
        if state == "running" and (active.job is None or active.job.is_waiting()):
            state = "queued"
        note = record["why"] or ""
        if state == "queued" and active.job is None:
            note = "its last process has yet to end"
        score = record["value"] if state in ENDED else run.score
        return TrialRow(run.number, run.overrides, state, score, run.step, run.steps, run.seconds or None, note)

    def _row_of_other(self, entry: Entry) -> TrialRow:
        values = entry.values or (self.plan.points[entry.number] if self.plan.points is not None else {})
        state = "elsewhere" if entry.state == "running" else entry.state
        return TrialRow(entry.number, tuple(self.plan.overrides(values)), state, entry.value, steps=self.plan.steps(values))

    def _row_of_ended(self, entry: Entry) -> TrialRow:
        record = read_record(self.folder, entry.number) if entry.here else {}
        if record.get("state") == "failed":
            record = self._mended(entry) or record
        row = self._row_of_other(entry)
        if entry.here and not trial_folder(self.folder, entry.number).exists():
            self.display.message(f"trial {entry.number}: its folder is gone; its metric is kept, and its run is not made again")
        if record.get("state") not in ENDED:
            return row
        step, seconds, value = record.get("step"), record.get("seconds"), record.get("value")
        return dataclasses.replace(
            row,
            state=record["state"],
            score=float(value) if isinstance(value, int | float) else row.score,
            step=step if isinstance(step, int) else 0,
            seconds=seconds if isinstance(seconds, float) else None,
            note=str(record.get("why") or ""),
        )

    def _mended(self, entry: Entry) -> dict[str, Any] | None:
        """The record of a trial that failed and whose run its user has completed since (`mtrl resume`), as one that was completed."""
        try:
            run = TrialRun(self.folder, self.plan, Taken(entry.number, entry.values, begun=True))
        except UserError:  # a link
            return None
        if run.status() != "completed":
            return None
        run.read_metrics()
        told = {"state": "completed", "value": run.score, "step": run.step, "seconds": run.seconds}
        run.write(**told, why=None)
        self.display.message(f"trial {entry.number}: its run was completed since it failed, and counts")
        return run.record
