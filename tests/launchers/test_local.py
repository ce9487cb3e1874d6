"""Local workers: their share of the machine, their output, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl_cli.errors import RunError
from mtrl_cli.files import file_lock
from mtrl_cli.launchers import local
from mtrl_cli.launchers.base import OUTPUT, End, Job
from mtrl_cli.machine import hardware
from tests.helpers.sweeps import until

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def wait(job: Job) -> End:
    """Wait for the end of a job."""
    end: End = until(job.poll, "the job has not ended")
    return end


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight cores, 16 GiB of free memory, no GPU."""
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    monkeypatch.setattr(hardware, "memory_available", lambda: 16 * GIB)
    monkeypatch.setattr(hardware, "disk_free", lambda folder: 90 * GIB)
    monkeypatch.setattr(hardware, "gpus", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MTRL_CORES", raising=False)
    return monkeypatch


def set_worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Replace the worker by Python code; the run folder is sys.argv[1]."""
    monkeypatch.setattr(local, "worker_command", lambda run: [sys.executable, "-c", code, str(run)])


def test_single_job_gets_the_whole_machine(machine: pytest.MonkeyPatch) -> None:
    assert local.LocalLauncher(jobs=1).environment(0) == {}


def test_jobs_share_cores_memory_and_disk(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_worker(machine, "import os; print({name: os.environ[name] for name in os.environ if name.startswith(('MTRL_', 'OMP_'))})")
    launcher = local.LocalLauncher(jobs=3)
    assert wait(launcher.start(tmp_path)) == End(0)
    environment = launcher.environment(2)
    assert (environment["MTRL_CORES"], environment["OMP_NUM_THREADS"]) == ("2", "2")
    assert int(environment["MTRL_MEMORY"]) == 16 * GIB // 3
    assert int(environment["MTRL_DISK"]) == 30 * GIB
    assert "'MTRL_CORES': '2'" in (tmp_path / OUTPUT).read_text()
    assert "CUDA_VISIBLE_DEVICES" not in environment
    machine.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in launcher.environment(0), "the user's value stays"
    launcher.close()


def test_more_jobs_than_cores_get_one_core_each(machine: pytest.MonkeyPatch) -> None:
    assert local.LocalLauncher(jobs=20).environment(0)["MTRL_CORES"] == "1"


@pytest.mark.parametrize(
    ("gpus", "jobs", "expected", "runs_per_gpu"),
    [
        (["0", "1"], 2, ["0", "1"], "1"),
        (["0", "1", "2", "3"], 2, ["0,2", "1,3"], "1"),
        (["5", "7"], 4, ["5", "7", "5", "7"], "2"),
        (["0"], 3, ["0", "0", "0"], "3"),
        (["MIG-a", "MIG-b"], 3, ["MIG-a", "MIG-b", "MIG-a"], "2"),
    ],
)
def test_gpus_are_assigned_round_robin(
    gpus: list[str], jobs: int, expected: list[str], runs_per_gpu: str, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(hardware, "gpus", lambda: gpus)
    launcher = local.LocalLauncher(jobs=jobs)
    environments = [launcher.environment(slot) for slot in range(jobs)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == expected
    assert {each["MTRL_RUNS_PER_GPU"] for each in environments} == {runs_per_gpu}


def test_job_takes_the_slot_of_one_that_has_ended(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_worker(machine, "import time; time.sleep(600)")
    launcher = local.LocalLauncher(jobs=3)
    jobs = [launcher.start(tmp_path) for _ in range(3)]
    try:
        assert [job.slot for job in jobs] == [0, 1, 2]
        jobs[1].stop()
        wait(jobs[1])
        jobs.append(launcher.start(tmp_path))
        assert jobs[-1].slot == 1
    finally:
        for job in jobs:
            job.stop()
            wait(job)
        launcher.close()


def test_exit_codes_and_output_are_recorded(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher = local.LocalLauncher(jobs=1)
    for code, expected in (
        ("import sys; print('out'); print('err', file=sys.stderr); sys.exit(2)", End(2)),
        ("import os; os.kill(os.getpid(), 9)", End(None, "killed by signal 9 (Killed)")),
        ("print('again')", End(0)),
    ):
        set_worker(machine, code)
        job = launcher.start(tmp_path)
        assert not job.is_waiting()
        assert wait(job) == expected
        job.stop()  # no effect after the end
    assert sorted((tmp_path / OUTPUT).read_text().split()) == ["again", "err", "out"]
    with pytest.raises(RunError, match="cannot be started"):
        launcher.start(tmp_path / "none")
    launcher.close()


def test_workers_are_in_their_own_process_group(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_worker(machine, "import os; print(os.getpgid(0))")
    launcher = local.LocalLauncher(jobs=1)
    wait(launcher.start(tmp_path))
    assert int((tmp_path / OUTPUT).read_text()) != os.getpgid(0)
    launcher.close()


PARENT = """
import sys, time
from pathlib import Path
from tests.helpers import fake_launcher
launcher = fake_launcher.FakeLauncher(jobs=2)
jobs = [launcher.start(Path(run)) for run in sys.argv[1:]]
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_save_and_end_when_their_parent_dies(number: signal.Signals, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("0000", "0001")]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_text("seed: 0\n")
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "FAKE_WORKER": '{"0": "hang"}'}
    process = subprocess.Popen([sys.executable, "-c", PARENT, *map(str, runs)], env=environment)
    try:
        until(lambda: all((run / "saved.json").exists() for run in runs), "the workers have not started")
        process.send_signal(number)
        process.wait(timeout=60)
        until(lambda: all(file_lock.is_free(run / ".lock") for run in runs), "the workers have not ended")
    finally:
        process.kill()
        process.wait(timeout=60)
    assert [json.loads((run / "run.json").read_text())["status"] for run in runs] == ["stopped", "stopped"]
