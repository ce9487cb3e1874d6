"""Trial states after workers end in different ways, with scripted workers in this process."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps import scheduler
from mtrl_cli.sweeps.display import SweepDisplay, TrialRow
from mtrl_cli.sweeps.dry_run import read_row
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.scheduler import SweepLoop
from mtrl_cli.sweeps.trial_storage import TrialStorage

RUN = ["env=classic_pack", "env.tasks=[CartPole-v1]", "steps_per_task=30", "eval.every=10", "agent.learning_starts=10", "device=cpu"]
Worker = Callable[[Path], End]


class Done(Job):
    """A job that has already ended."""

    def __init__(self, end: End):
        self._end = end

    def poll(self) -> End | None:
        return self._end

    def stop(self) -> None:
        pass


class Scripted(Launcher):
    """A launcher of scripted workers, run one after the other; each is a function of the run's folder."""

    jobs = 1

    def __init__(self, *workers: Worker):
        self.workers = list(workers)

    def start(self, run: Path) -> Job:
        return Done(self.workers.pop(0)(run))


class Silent(SweepDisplay):
    """A display that records messages and shows nothing."""

    def __init__(self) -> None:
        super().__init__(jobs=1, out=io.StringIO())
        self.messages: list[str] = []

    def update(self, rows: Sequence[TrialRow]) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(autouse=True)
def poll_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll without pauses."""
    for name in ("POLL_SECONDS", "METRICS_SECONDS", "STORAGE_SECONDS"):
        monkeypatch.setattr(scheduler, name, 0.0)


def work(folder: Path, *workers: Worker) -> dict[str, Any]:
    """Run a sweep of one trial with these workers and return its trial.json."""
    folder.mkdir(exist_ok=True)
    plan = plan_of(folder)
    launcher, storage = Scripted(*workers), TrialStorage(folder, plan, first=10)
    with StopRequest() as stop:
        SweepLoop(folder, plan, storage, launcher, Silent(), stop).work()
    assert launcher.workers == []
    found: dict[str, Any] = json.loads((folder / "trials/0000/trial.json").read_text())
    return found


def complete(run: Path, end: End | None = None) -> End:
    """A worker that trains to the end."""
    rows = [{"step": step, "seconds": step / 10, "eval/return/CartPole-v1": float(step)} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "run.json").write_text(json.dumps({"status": "completed", "seconds": 3.0, "error": None}))
    return end or End(0)


@pytest.mark.parametrize("end", [End(None, "Slurm no longer lists the job"), End(None, "killed by SIGSEGV"), End(1), End(2)])
def test_completed_run_counts_as_completed_for_every_end_of_its_process(end: End, tmp_path: Path) -> None:
    record = work(tmp_path / "S", lambda run: complete(run, end))
    assert (record["state"], record["value"], record["step"], record["seconds"]) == ("completed", 30.0, 30, 3.0)
    assert (record["attempts"], record["why"]) == (1, None)


def locked_out(run: Path) -> End:
    """A worker whose run is locked by another process, which releases the lock before the sweep checks."""
    other = RunFolder(run)
    other.lock()
    with pytest.raises(UserError) as locked:
        RunFolder(run).lock()
    other.unlock()
    (run / OUTPUT).write_text(f"mtrl: error: {locked.value}\nsaved at step 10\n")
    return End(2)


def test_run_that_was_briefly_locked_by_another_process_is_resumed(tmp_path: Path) -> None:
    record = work(tmp_path / "S", locked_out, complete)
    assert (record["state"], record["attempts"]) == ("completed", 1)


def test_trial_with_an_invalid_configuration_is_not_retried(tmp_path: Path) -> None:
    def wrong(run: Path) -> End:
        with open(run / OUTPUT, "a") as output:
            output.write("mtrl: error: agent.n_step=-1: expected a positive number\n")
        return End(2)

    record = work(tmp_path / "S", locked_out, wrong)
    assert (record["state"], record["why"]) == ("failed", "agent.n_step=-1: expected a positive number")


def plan_of(folder: Path) -> Plan:
    return sweep_plan.make([*RUN, "seed=0,1", "sweep.sampler=random", "sweep.trials=1", f"run_dir={folder}"])


def test_failed_trial_counts_as_completed_once_its_run_was_completed(tmp_path: Path) -> None:
    folder = tmp_path / "S"
    assert work(folder, lambda run: End(2))["state"] == "failed"
    assert [row.state for row in TrialStorage(folder, plan_of(folder), first=10).rows()] == ["failed"]
    complete(folder / "trials/0000")
    for _ in range(2):
        record = work(folder)
        assert (record["state"], record["value"], record["why"]) == ("completed", 30.0, None)
        storage = TrialStorage(folder, plan_of(folder), first=10)
        assert [(row.state, row.score) for row in storage.rows()] == [("completed", 30.0)]
        assert len(storage._study.get_trials()) == 2, "the failed trial and the completed trial"


def test_damaged_trial_record_is_noted_and_does_not_end_the_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "S"
    work(folder, complete)
    (folder / "trials/0000/trial.json").write_text("[]")
    with StopRequest() as stop:
        (row,) = SweepLoop(folder, plan_of(folder), TrialStorage(folder, plan_of(folder), first=10), Scripted(), Silent(), stop).work()
    assert (row.state, row.score) == ("completed", 30.0)
    assert row.note.startswith(f"{folder}/trials/0000/trial.json is damaged: ")
    assert read_row(plan_of(folder), 0, folder).note == row.note


def test_deleted_folder_of_a_trial_is_reported(tmp_path: Path) -> None:
    folder, display = tmp_path / "S", Silent()
    work(folder, complete)
    shutil.rmtree(folder / "trials/0000")
    plan = plan_of(folder)
    with StopRequest() as stop:
        (row,) = SweepLoop(folder, plan, TrialStorage(folder, plan, first=10), Scripted(), display, stop).work()
    assert (row.state, row.score) == ("completed", 30.0)
    assert display.messages == ["trial 0: its folder is missing; its metric is kept, and the trial is not repeated"]
