"""Runs as jobs of a real Slurm cluster, of one machine: how they end, wait, stop, are found again, and go on when they were preempted."""

from __future__ import annotations

import json
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

SECONDS = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment of this process reaches a Slurm of this machine alone, with two cores."""
    if reason := slurm_machine.missing():
        required.skip_or_fail("slurm", reason)
    with slurm_machine.started(tmp_path_factory.mktemp("slurm")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, in a path with a space."""
    folder = tmp_path / "a sweep" / "trials" / "0001"
    folder.mkdir(parents=True)
    return folder


def launcher(**changes: Any) -> slurm.SlurmLauncher:
    """As conf/launcher/slurm.yaml makes it, but that asks more often."""
    names = ("partition", "account", "qos", "timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node")
    return slurm.SlurmLauncher(**({"jobs": 2, "setup": [], "extra": {}, "poll_seconds": 0.1} | dict.fromkeys(names) | changes))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`worker(script)`: what jobs run in place of `mtrl resume`, in the run's folder."""

    def is_now(script: str) -> None:
        monkeypatch.setattr(slurm, "worker_command", lambda run: ["bash", "-c", f'cd "$0"\n{script}', str(run)])

    return is_now


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that comes about by itself."""
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


def end_of(job: Job) -> End:
    """How a job ends."""
    end = until(job.poll, f"job {job.handle} has not ended")
    assert isinstance(end, End)
    assert job.poll() == end, "an end stays"
    return end


def slurm_says(*words: str) -> str:
    """What one of Slurm's commands prints."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


SAVES = "trap 'echo saved >> saved; exit 143' TERM\necho begun >> begun\nwhile true; do sleep 0.05; done\n"


def test_a_job_ends_as_its_worker_did(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
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
    assert (jobs[0][0] / "output.txt").read_text() == "one\ntwo\n", "output is added, never replaced"
    assert sorted(path.name for path in jobs[0][0].iterdir()) == ["output.txt", "slurm"]


def test_a_worker_is_told_what_slurm_gave_it(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    worker('echo "$MTRL_CORES $MTRL_MEMORY $FROM_SETUP $SLURM_JOB_PARTITION $(nice)"')
    given = launcher(partition="main", cpus_per_task=1, mem_gb=0.25, setup=["export FROM_SETUP='a b'"], extra={"comment": "ours"})
    job = given.start(run)
    assert end_of(job) == End(0)
    assert (run / "output.txt").read_text() == f"1 {256 * 2**20} a b main 0\n"
    told = slurm_says("scontrol", "show", "job", job.handle)
    assert "JobName=mtrl-0001" in told
    assert "Comment=ours" in told
    assert "TimeLimit=UNLIMITED" in told, "the partition's, not submitit's five minutes"


def test_jobs_wait_stop_and_are_found_again(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    worker(SAVES)
    whole = launcher(cpus_per_task=2)
    other = run.with_name("0002")
    other.mkdir()
    first, second = whole.start(run), whole.start(other)
    until((run / "begun").exists, "the first has not begun")
    until(lambda: not first.is_waiting(), "the first is said to wait")
    assert second.is_waiting()

    later = launcher()  # of a process that comes after
    assert later.attach(run, "999999") is None
    assert later.attach(run, "") is None
    assert later.attach(run, second.handle) is None, "another run's job"
    found_first, found_second = later.attach(run, first.handle), later.attach(other, second.handle)
    assert found_first is not None
    assert found_second is not None
    assert found_second.is_waiting()

    found_second.stop()
    found_first.stop()
    found_first.stop()
    assert end_of(found_first) == end_of(first) == End(143)
    assert end_of(found_second) == end_of(second) == End(None, "the job was cancelled")
    assert (run / "saved").read_text() == "saved\n", "asked once"
    assert not (other / "begun").exists()
    assert later.attach(run, first.handle) is None, "it has ended"


def test_a_job_that_is_out_of_time_saves_and_goes_on_under_its_number(cluster: None, run: Path, worker: Callable[[str], None]) -> None:
    worker(f"if [ -e saved ]; then exit 0; fi\n{SAVES}")
    job = launcher(timeout_min=10).start(run)
    until((run / "begun").exists, "it has not begun")
    assert "TimeLimit=00:10:00" in slurm_says("scontrol", "show", "job", job.handle)
    slurm_says("scancel", "--signal=USR2", job.handle)  # as Slurm does 90 seconds before the limit
    assert end_of(job) == End(0)
    assert (run / "saved").read_text() == "saved\n"
    assert "Restarts=1" in slurm_says("scontrol", "show", "job", job.handle)


def test_a_worker_saves_and_ends_when_the_process_that_watches_it_is_killed(
    cluster: None, run: Path, worker: Callable[[str], None]
) -> None:
    # A worker of ours follows its parent; a shell does not.
    program = (
        "import signal, sys, time; from mtrl_cli.machine import parent_watchdog; parent_watchdog.watch();"
        "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w'), sys.exit(143))); open('begun', 'w'); time.sleep(60)"
    )
    worker(f'echo $PPID > watcher; exec "{sys.executable}" -c "{program}"')
    job = launcher().start(run)
    until((run / "begun").exists, "it has not begun")
    os.kill(int((run / "watcher").read_text()), signal.SIGKILL)
    assert end_of(job) == End(None, "killed by signal 9 (Killed)")
    until((run / "saved").exists, "the worker lives on")


def test_what_slurm_would_refuse_is_refused_before_anything_is_made(cluster: None, run: Path) -> None:
    with pytest.raises(UserError, match=r"sbatch refuses the job: .*[Ii]nvalid partition name"):
        launcher(partition="nowhere")
    with pytest.raises(UserError, match=r"sbatch refuses the job: .*node configuration is not available"):
        launcher(cpus_per_task=3)
    with pytest.raises(UserError, match="frobnicate"):
        launcher(extra={"frobnicate": 1})


def test_a_controller_that_is_lost_ends_no_job(
    cluster: None, run: Path, worker: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(SAVES)
    job = launcher().start(run)
    until((run / "begun").exists, "it has not begun")
    with monkeypatch.context() as lost:
        lost.setenv("PATH", "/nowhere")
        time.sleep(0.2)
        assert job.poll() is None
        with pytest.raises(RunError, match=f"does not report the state of job {job.handle}"):
            slurm.SlurmLauncher.attach(launcher_without_slurm(), run, job.handle)
    job.stop()
    assert end_of(job) == End(143)


def launcher_without_slurm() -> slurm.SlurmLauncher:
    """One that was made while there was a Slurm."""
    made = slurm.SlurmLauncher.__new__(slurm.SlurmLauncher)
    made._queue = slurm._Queue(0.1)
    return made


def mtrl(*words: str) -> list[str]:
    """A command line of ours."""
    return [sys.executable, "-m", "mtrl_cli", *words]


def records(sweep: Path) -> list[dict[str, Any]]:
    """Each trial's trial.json."""
    return [json.loads(path.read_text()) for path in sorted((sweep / "trials").glob("*/trial.json"))]


def test_a_sweep_whose_job_is_preempted_and_whose_process_is_killed_has_each_trial_once(cluster: None, tmp_path: Path) -> None:
    folder, words = tmp_path / "S", ["env=classic_pack", "env.tasks=[CartPole-v1]", "steps_per_task=1200", "checkpoint.every=200"]
    words += ["eval.episodes=1", "device=cpu", "threads=1"]
    on_slurm = ["launcher=slurm", "launcher.jobs=2", "launcher.poll_seconds=0.5"]
    swept = mtrl("sweep", *words, "seed=0,1,2", *on_slurm, f"run_dir={folder}")
    with (tmp_path / "output").open("w") as output:
        first = subprocess.Popen(swept, stdout=output, stderr=output, cwd=tmp_path)
    try:
        until(lambda: list(folder.glob("trials/0000/checkpoints/*/COMPLETE")), "trial 0 has no checkpoint")
        handle = records(folder)[0]["handle"]
        slurm_says("scontrol", "requeue", handle)
    finally:
        first.kill()
        first.wait()
    assert not (folder / "trials/0000/checkpoints/1200").exists(), "it was at work"

    resumed = subprocess.run(mtrl("resume", str(folder), *on_slurm), capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "trial 0: attached to its job again" in resumed.stdout + resumed.stderr
    assert [(record["state"], record["attempts"]) for record in records(folder)] == [("completed", 1)] * 3
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["0000", "0001", "0002"]
    assert "Restarts=1" in slurm_says("scontrol", "show", "job", handle)
    begun_anew = [path.parent.name for path in folder.glob("trials/*/output.txt") if "going on from step" not in path.read_text()]
    assert "0000" not in begun_anew, "the requeued job began anew"

    plain = subprocess.run(mtrl("train", *words, "seed=0", f"run_dir={tmp_path / 'plain'}"), capture_output=True, timeout=240, cwd=tmp_path)
    assert plain.returncode == 0
    of_sweep, alone = (run / "checkpoints/1200/model.safetensors" for run in (folder / "trials/0000", tmp_path / "plain"))
    assert of_sweep.read_bytes() == alone.read_bytes()


def test_a_sweep_that_slurm_would_refuse_makes_nothing(cluster: None, tmp_path: Path) -> None:
    words = ["env=classic_pack", "seed=0,1", "launcher=slurm", "launcher.partition=nowhere", f"run_dir={tmp_path / 'S'}"]
    done = subprocess.run(mtrl("sweep", *words), capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path)
    assert done.returncode == 2
    assert "nvalid partition name" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_slurm_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        launcher()


def test_a_machine_of_no_cluster_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if reason := slurm_machine.missing():
        required.skip_or_fail("slurm", reason)
    (tmp_path / "slurm.conf").write_text("")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(UserError, match="start the sweep on a machine of a Slurm cluster"):
        launcher()
