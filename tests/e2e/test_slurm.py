"""The Slurm launcher on a real cluster of one machine: ends, waiting, stopping, attaching, and preemption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.launchers import slurm
from mtrl_cli.launchers.base import End, Job
from tests.helpers import required, slurm_machine
from tests.helpers.shared import Shared
from tests.helpers.sweeps import trials, until

SECONDS = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, shared: Shared) -> Iterator[None]:
    """Start Slurm on this machine with two cores, and set the environment of this process to use it."""
    if reason := slurm_machine.missing():
        required.skip_or_fail("slurm", reason)
    folder = tmp_path_factory.mktemp("slurm")
    with shared.lock("slurm"), slurm_machine.started(folder) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder in a path with a space."""
    folder = tmp_path / "a sweep" / "trials" / "0001"
    folder.mkdir(parents=True)
    return folder


def launcher(**changes: Any) -> slurm.SlurmLauncher:
    """Create the launcher of conf/launcher/slurm.yaml with a shorter polling interval."""
    names = ("partition", "account", "qos", "timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node")
    return slurm.SlurmLauncher(**({"jobs": 2, "setup": [], "extra": {}, "poll_seconds": 0.1} | dict.fromkeys(names) | changes))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`worker(script)`: replace `mtrl resume` by a shell script in the run's folder."""

    def is_now(script: str) -> None:
        monkeypatch.setattr(slurm, "worker_command", lambda run: ["bash", "-c", f'cd "$0"\n{script}', str(run)])

    return is_now


def end_of(job: Job) -> End:
    """Wait for the end of a job."""
    end = until(job.poll, f"job {job.handle} has not ended")
    assert isinstance(end, End)
    assert job.poll() == end, "the end does not change"
    return end


def slurm_output(*words: str) -> str:
    """Return the output of a Slurm command."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


SAVES = "trap 'echo saved >> saved; exit 143' TERM\necho begun >> begun\nwhile true; do sleep 0.05; done\n"


def test_job_reports_the_exit_of_its_worker(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    queue = launcher()
    jobs = []
    for number, script in enumerate(("echo one; echo two >&2", "exit 1", "exit 2", "kill -KILL $$")):
        worker(script)
        folder = run.parent / str(number)
        folder.mkdir()
        jobs.append((folder, queue.start(folder)))
    assert [end_of(job) for _, job in jobs] == [End(0), End(1), End(2), End(None, "killed by signal 9 (Killed)")]
    assert (jobs[0][0] / "output.txt").read_text() == "one\ntwo\n"
    again = queue.start(jobs[0][0])
    assert end_of(again) == End(None, "killed by signal 9 (Killed)")
    assert (jobs[0][0] / "output.txt").read_text() == "one\ntwo\n", "output is appended"
    assert sorted(path.name for path in jobs[0][0].iterdir()) == ["output.txt", "slurm"]


def test_worker_gets_the_resources_of_its_job(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    worker('echo "$MTRL_CORES $MTRL_MEMORY $FROM_SETUP $SLURM_JOB_PARTITION $(nice)"')
    configured = launcher(partition="main", cpus_per_task=1, mem_gb=0.25, setup=["export FROM_SETUP='a b'"], extra={"comment": "ours"})
    job = configured.start(run)
    assert end_of(job) == End(0)
    assert (run / "output.txt").read_text() == f"1 {256 * 2**20} a b main 0\n"
    described = slurm_output("scontrol", "show", "job", job.handle)
    assert "JobName=mtrl-0001" in described
    assert "Comment=ours" in described
    assert "TimeLimit=UNLIMITED" in described, "the partition's, not submitit's five minutes"


def test_second_job_waits_and_later_launcher_attaches_to_and_stops_both(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    worker(SAVES)
    whole = launcher(cpus_per_task=2)
    other = run.with_name("0002")
    other.mkdir()
    first, second = whole.start(run), whole.start(other)
    until((run / "begun").exists, "the first job has not started")
    until(lambda: not first.is_waiting(), "the first job is reported as waiting")
    assert second.is_waiting()

    later = launcher()  # as in a later process
    assert later.attach(run, "999999") is None
    assert later.attach(run, "") is None
    assert later.attach(run, second.handle) is None, "job of another run"
    found_first, found_second = later.attach(run, first.handle), later.attach(other, second.handle)
    assert found_first is not None
    assert found_second is not None
    assert found_second.is_waiting()

    found_second.stop()
    found_first.stop()
    found_first.stop()
    assert end_of(found_first) == end_of(first) == End(143)
    assert end_of(found_second) == end_of(second) == End(None, "the job was cancelled")
    assert (run / "saved").read_text() == "saved\n", "stopped once"
    assert not (other / "begun").exists()
    assert later.attach(run, first.handle) is None, "the job has ended"


def test_job_at_its_time_limit_saves_and_is_requeued(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    worker(f"if [ -e saved ]; then exit 0; fi\n{SAVES}")
    job = launcher(timeout_min=10).start(run)
    until((run / "begun").exists, "the job has not started")
    assert "TimeLimit=00:10:00" in slurm_output("scontrol", "show", "job", job.handle)
    slurm_output("scancel", "--signal=USR2", job.handle)  # as Slurm does 90 seconds before the limit
    assert end_of(job) == End(0)
    assert (run / "saved").read_text() == "saved\n"
    assert "Restarts=1" in slurm_output("scontrol", "show", "job", job.handle)


def test_worker_saves_and_ends_when_its_parent_is_killed(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    # `mtrl resume` watches its parent; a shell does not.
    program = (
        "import signal, sys, time; from mtrl_cli.machine import parent_watchdog; parent_watchdog.watch();"
        "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w'), sys.exit(143))); open('begun', 'w'); time.sleep(60)"
    )
    worker(f'echo $PPID > watcher; exec "{sys.executable}" -c "{program}"')
    job = launcher().start(run)
    until((run / "begun").exists, "the job has not started")
    os.kill(int((run / "watcher").read_text()), signal.SIGKILL)
    assert end_of(job) == End(None, "killed by signal 9 (Killed)")
    until((run / "saved").exists, "the worker did not end")


def test_parameters_that_slurm_refuses_are_refused_first(cluster: None, run: Path) -> None:
    with pytest.raises(UserError, match=r"sbatch refuses the job: .*[Ii]nvalid partition name"):
        launcher(partition="nowhere")
    with pytest.raises(UserError, match=r"sbatch refuses the job: .*node configuration is not available"):
        launcher(cpus_per_task=3)
    with pytest.raises(UserError, match="frobnicate"):
        launcher(extra={"frobnicate": 1})


def test_lost_controller_ends_no_job(cluster: None, run: Path, worker: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    worker(SAVES)
    job = launcher().start(run)
    until((run / "begun").exists, "the job has not started")
    later = launcher()
    with monkeypatch.context() as lost:
        lost.setenv("PATH", "/nowhere")
        time.sleep(0.2)
        assert job.poll() is None
        with pytest.raises(RunError, match=f"does not report the state of job {job.handle}"):
            later.attach(run, job.handle)
    job.stop()
    assert end_of(job) == End(143)


def mtrl(*words: str) -> list[str]:
    """Return a command line of `mtrl`."""
    return [sys.executable, "-m", "mtrl_cli", *words]


def test_sweep_survives_preemption_and_a_killed_process_without_repeating_trials(cluster: None, tmp_path: Path) -> None:
    folder, words = tmp_path / "S", ["env=classic_pack", "env.tasks=[CartPole-v1]", "steps_per_task=1200", "checkpoint.every=200"]
    words += ["eval.episodes=1", "device=cpu", "threads=1"]
    on_slurm = ["launcher=slurm", "launcher.jobs=2", "launcher.poll_seconds=0.5"]
    swept = mtrl("sweep", *words, "seed=0,1,2", *on_slurm, f"run_dir={folder}")
    with (tmp_path / "output").open("w") as output:
        first = subprocess.Popen(swept, stdout=output, stderr=output, cwd=tmp_path)
    try:
        until(lambda: list(folder.glob("trials/0000/checkpoints/*/COMPLETE")), "trial 0 has no checkpoint")
        handle = trials(folder)[0]["handle"]
        slurm_output("scontrol", "requeue", handle)
    finally:
        first.kill()
        first.wait()
    assert not (folder / "trials/0000/checkpoints/1200").exists(), "the job was running"

    resumed = subprocess.run(mtrl("resume", str(folder), *on_slurm), capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "trial 0: attached to its running job" in resumed.stdout + resumed.stderr
    assert [(record["state"], record["attempts"]) for record in trials(folder)] == [("completed", 1)] * 3
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["0000", "0001", "0002"]
    assert "Restarts=1" in slurm_output("scontrol", "show", "job", handle)
    restarted = [path.parent.name for path in folder.glob("trials/*/output.txt") if "resuming from step" not in path.read_text()]
    assert "0000" not in restarted, "the requeued job restarted from the beginning"

    plain = subprocess.run(mtrl("train", *words, "seed=0", f"run_dir={tmp_path / 'plain'}"), capture_output=True, timeout=240, cwd=tmp_path)
    assert plain.returncode == 0
    of_sweep, uninterrupted = (run / "checkpoints/1200/model.safetensors" for run in (folder / "trials/0000", tmp_path / "plain"))
    assert of_sweep.read_bytes() == uninterrupted.read_bytes()


def test_sweep_that_slurm_refuses_creates_nothing(cluster: None, tmp_path: Path) -> None:
    words = ["env=classic_pack", "seed=0,1", "launcher=slurm", "launcher.partition=nowhere", f"run_dir={tmp_path / 'S'}"]
    done = subprocess.run(mtrl("sweep", *words), capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path)
    assert done.returncode == 2
    assert "nvalid partition name" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_slurm_commands_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        launcher()


def test_machine_outside_a_cluster_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if reason := slurm_machine.missing():
        required.skip_or_fail("slurm", reason)
    (tmp_path / "slurm.conf").write_text("")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(UserError, match="start the sweep on a machine of a Slurm cluster"):
        launcher()
