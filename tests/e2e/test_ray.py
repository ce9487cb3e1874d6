"""The Ray launcher on a real cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.launchers import ray as launchers_ray
from mtrl_cli.launchers.base import End, Job
from tests.helpers import required
from tests.helpers.shared import Shared
from tests.helpers.sweeps import trials, until


@pytest.fixture(scope="module")
def cluster(shared: Shared) -> Iterator[Any]:
    """A Ray cluster with one core on its head node; a test may add nodes."""
    if importlib.util.find_spec("ray") is None:
        required.skip_or_fail("ray", "Ray is not installed (make test installs it)")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    with shared.lock("ray"):
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False})
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def launch(cluster: Any) -> Iterator[Callable[..., launchers_ray.RayLauncher]]:
    """`launch(cpus=2)`: create the launcher of conf/launcher/ray.yaml for the cluster."""
    made = []

    def make(**changes: Any) -> launchers_ray.RayLauncher:
        made.append(
            launchers_ray.RayLauncher(**({"address": cluster.address, "jobs": 2, "cpus": 1, "gpus": 0, "memory_gb": None} | changes))
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`worker(script)`: replace `mtrl resume` by a shell script in the run's folder."""

    def is_now(script: str) -> None:
        monkeypatch.setattr(launchers_ray, "worker_command", lambda run: ["bash", "-c", f'cd "$0"\n{script}', str(run)])

    return is_now


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Four run folders."""
    folders = [tmp_path / "trials" / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def ends_of(*jobs: Job) -> list[End | None]:
    """Return how jobs end. Ray starts them in any order, and each keeps its core until `poll` has returned its end."""
    until(lambda: None not in [job.poll() for job in jobs], "the jobs have not ended")
    return [job.poll() for job in jobs]


SAVES = "trap 'echo saved >> saved; exit 143' TERM\necho $$ > begun\nwhile true; do sleep 0.05; done\n"


def test_job_reports_the_exit_of_its_worker(
    launch: Callable[..., launchers_ray.RayLauncher], runs: list[Path], worker: Callable[[str], None]
) -> None:
    ray = launch(memory_gb=0.25)
    jobs = []
    for script, run in zip(("echo one; echo two >&2; env > env", "exit 1", "exit 2", "kill -KILL $$"), runs, strict=True):
        worker(script)
        jobs.append(ray.start(run))
    assert ends_of(*jobs) == [End(0), End(1), End(2), End(None, "killed by signal 9 (Killed)")]
    assert (runs[0] / "output.txt").read_text() == "one\ntwo\n"
    environment = dict(line.split("=", 1) for line in (runs[0] / "env").read_text().splitlines() if "=" in line)
    assert (environment["MTRL_CORES"], environment["MTRL_MEMORY"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", str(2**28), "")
    assert ends_of(ray.start(runs[0])) == [End(None, "killed by signal 9 (Killed)")]
    assert (runs[0] / "output.txt").read_text() == "one\ntwo\n", "output is appended"


def test_jobs_wait_for_resources_and_stop(
    launch: Callable[..., launchers_ray.RayLauncher], runs: list[Path], worker: Callable[[str], None]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    ray = launch()
    assert signal.getsignal(signal.SIGTERM) == handler, "SIGTERM must reach the sweep"
    worker(SAVES)
    first, second = ray.start(runs[0]), ray.start(runs[1])
    until((runs[0] / "begun").exists, "the first job has not started")
    until(lambda: not first.is_waiting(), "the first job is reported as waiting")
    assert second.is_waiting()
    second.stop()
    assert ends_of(second) == [End(None, "Ray lost its machine or its process")]
    first.stop()
    first.stop()
    assert ends_of(first) == [End(143)]
    assert (runs[0] / "saved").read_text() == "saved\n", "stopped once"
    assert not (runs[1] / "begun").exists()


def test_unreachable_cluster_is_reported_in_one_line(cluster: Any) -> None:
    with pytest.raises(UserError, match=r"launcher\.address=127\.0\.0\.1:1 is unreachable"):
        launchers_ray.RayLauncher(address="127.0.0.1:1", jobs=1, cpus=1, gpus=0, memory_gb=None)
    with pytest.raises(UserError, match=r"launcher\.gpus must be a whole number or less than 1, got 1\.5"):
        launchers_ray.RayLauncher(address=None, jobs=1, cpus=1, gpus=1.5, memory_gb=None)


def children() -> set[int]:
    """Return the children of this process."""
    return {
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if is_child_of(int(path.name), os.getpid()) and int(path.name) != os.getpid()
    }


def test_local_cluster_ends_with_its_launcher(
    launch: Callable[..., launchers_ray.RayLauncher], runs: list[Path], worker: Callable[[str], None]
) -> None:
    before, mode = children(), os.environ.get("RAY_AUTH_MODE")
    with pytest.raises(UserError, match=r"launcher\.cpus=4096 exceeds the \d+ of this machine"):
        launch(address=None, cpus=4096)
    worker("echo done")
    ray = launch(address=None)
    assert ends_of(ray.start(runs[0])) == [End(0)]
    assert children() - before, "separate processes"
    ray.close()
    assert os.environ.get("RAY_AUTH_MODE") == mode, "other clusters do not require the token of the local cluster"
    until(lambda: children() <= before, "Ray's processes live on")


def processes_of(folder: Path) -> set[int]:
    """Return the worker processes of the runs in a folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"resume" in words and any(word.startswith(bytes(folder)) for word in words):
            found.add(int(path.parent.name))
    return found


def is_child_of(process: int, ancestor: int) -> bool:
    """Whether a process is a descendant of another."""
    while process > 1 and process != ancestor:
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return process == ancestor


def test_sweep_loses_no_finished_work_when_a_node_is_killed(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=2**27)
    cluster.wait_for_nodes()
    raylet = node.all_processes["raylet"][0].process.pid
    folder = tmp_path / "S"
    words = ["env=classic_pack", "env.tasks=[CartPole-v1]", "steps_per_task=6000", "checkpoint.every=200", "eval.episodes=1", "device=cpu"]
    words += ["seed=0,1,2", "launcher=ray", f"launcher.address={cluster.address}", "launcher.jobs=2", f"run_dir={folder}"]
    with (tmp_path / "output").open("w") as output:
        sweep = subprocess.Popen([sys.executable, "-m", "mtrl_cli", "sweep", *words], stdout=output, stderr=output, cwd=tmp_path)
    try:
        # One run per node; the second node is killed after its run has saved a checkpoint.
        there = until(lambda: [each for each in processes_of(folder) if is_child_of(each, raylet)], "no run on the second node")[0]
        run = Path(os.fsdecode(Path(f"/proc/{there}/cmdline").read_bytes().split(b"\0")[-2]))
        until(lambda: list(run.glob("checkpoints/*/COMPLETE")), "it has saved nothing")
        assert not (run / "checkpoints/6000").exists(), "the job was running"
        cluster.remove_node(node, allow_graceful=False)
        assert sweep.wait(240) == 0, (tmp_path / "output").read_text()[-3000:]
    finally:
        sweep.kill()
        sweep.wait()
    number = int(run.name)
    found = trials(folder)
    assert [record["state"] for record in found] == ["completed"] * 3
    assert [record["attempts"] for record in found] == [2 if each == number else 1 for each in range(3)]
    assert f"trial {number}: its process died (Ray lost its machine" in (tmp_path / "output").read_text()
    assert "resuming from step" in (run / "output.txt").read_text(), "the run restarted from the beginning"
    assert processes_of(folder) == set()
