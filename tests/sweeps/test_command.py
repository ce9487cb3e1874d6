"""Sweeps through the command line: results, failed and killed workers, stopping, resuming, and several processes."""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.config.compose import load
from mtrl_cli.files import file_lock
from tests.helpers.command import Mtrl
from tests.helpers.fake_launcher import STEPS
from tests.helpers.sweeps import trials, until
from tests.helpers.warm_process import WarmProcess, WarmServer

ROOT = Path(__file__).resolve().parents[2]
FAKE = ["launcher._target_=tests.helpers.fake_launcher.FakeLauncher", "trusted_packages=[tests]"]
QUICK = ["env=classic_pack", f"steps_per_task={STEPS * 10}", "eval.every=10", "agent.learning_starts=50", "device=cpu"]
REAL = [
    "env=classic_pack",
    "env.tasks=[CartPole-v1,Acrobot-v1]",
    "env.num_envs=4",
    "steps_per_task=300",
    "eval.every=100",
    "eval.episodes=1",
]
REAL += ["eval.max_steps=20", "agent.learning_starts=50", "agent.samples_per_step=2", "log.diagnostics=0"]
REAL += ["eval.test_episodes=0", "device=cpu"]


class Commands:
    """Run `mtrl` in separate processes in one folder; remaining processes are killed at the end."""

    def __init__(self, folder: Path, server: WarmServer):
        self.folder = folder
        self._mtrl = Mtrl(folder, server)
        self._started: list[WarmProcess] = []

    def start(self, *words: object, **environment: str) -> WarmProcess:
        """Start the command; further keywords are environment variables."""
        process = self._mtrl.start(*words, PYTHONPATH=str(ROOT), **environment)
        assert isinstance(process, WarmProcess)
        self._started.append(process)
        return process

    def __call__(self, *words: object, code: int = 0, **environment: str) -> tuple[str, str]:
        """Run the command to its end, check its exit code, and return stdout and stderr."""
        return outcome(self.start(*words, **environment), code)

    def sweep(self, *words: object, code: int = 0, **environment: str) -> tuple[str, str]:
        """Run a sweep in S with fake workers."""
        return self("sweep", *QUICK, *FAKE, "run_dir=S", *words, code=code, **environment)

    def close(self) -> None:
        """Kill the processes that still run."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait(timeout=60)


def outcome(process: WarmProcess, code: int) -> tuple[str, str]:
    """Wait for a command's end and check its exit code."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, f"{process.args}: exit code {process.returncode}\n{stdout[-3000:]}\n{stderr[-3000:]}"
    return stdout, stderr


@pytest.fixture
def mtrl(tmp_path: Path, warm_server: WarmServer) -> Iterator[Commands]:
    commands = Commands(tmp_path, warm_server)
    yield commands
    commands.close()


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def step_of(run: Path) -> int:
    """Return the saved step of a fake worker."""
    with contextlib.suppress(OSError, ValueError):
        return int(read(run / "saved.json")["step"])
    return 0


def assert_each_once(sweep: Path, count: int) -> None:
    """Assert that `count` trials are completed and that each step ran once, or twice if a kill interrupted it."""
    assert [path.name for path in sorted((sweep / "trials").iterdir())] == [f"{number:04d}" for number in range(count)]
    for number, record in enumerate(trials(sweep)):
        run = sweep / "trials" / f"{number:04d}"
        assert (record["number"], record["state"], record["why"]) == (number, "completed", None)
        assert record["value"] == float(record["values"]["seed"])
        steps = [int(line) for line in (run / "steps.log").read_text().split()]
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        assert steps == sorted(steps), "two workers ran the trial at the same time"
    journal = [json.loads(line) for line in (sweep / "journal.log").read_text().splitlines()]
    created = [line for line in journal if line["op_code"] == 4]
    assert sum("trial" not in line.get("user_attrs", {}) for line in created) == count, "without the retries of interrupted trials"
    assert sum(line["op_code"] == 6 and line["state"] == 1 for line in journal) == count, "each trial is completed once"


# -- real runs --------------------------------------------------------------------------------------------------------------------


def test_each_trial_is_bit_identical_to_the_run_of_its_command(mtrl: Commands, tmp_path: Path) -> None:
    """Two jobs at a time on one machine."""
    stdout, _ = mtrl("sweep", *REAL, "network/sharing=hard,film", "launcher.jobs=2", "run_dir=S")
    assert "trial 1: completed: network/sharing=film" in stdout
    assert "mtrl report" in stdout
    records = trials(tmp_path / "S")
    assert [record["overrides"] for record in records] == [["network/sharing=hard"], ["network/sharing=film"]]
    for number, record in enumerate(records):
        run = tmp_path / "S" / "trials" / f"{number:04d}"
        assert (record["state"], record["attempts"], record["metric"], record["step"]) == ("completed", 1, "eval/score/mean", 300)
        assert read(run / "run.json")["status"] == "completed"
        assert load(run / "config.yaml")["run_dir"] == str(run)
        assert "is completed" in mtrl("resume", run)[0]
    words = shlex.split(records[1]["command"])
    assert words[:2] == ["mtrl", "train"]
    mtrl(*words[1:], "run_dir=single")
    assert (tmp_path / "single/checkpoints/300/model.safetensors").read_bytes() == (
        tmp_path / "S/trials/0001/checkpoints/300/model.safetensors"
    ).read_bytes()
    stdout, _ = mtrl("resume", "S")
    assert "2 of 2 completed" in stdout, "the summary of a finished sweep is printed again"


def test_killed_sweep_resumes_its_runs(mtrl: Commands, tmp_path: Path) -> None:
    """The sweep is killed twice, each time after the first checkpoint of a trial."""
    words = ["sweep", *REAL, "checkpoint.every=20", "seed=0,1", "run_dir=S"]
    for number in range(2):
        process = mtrl.start(*words)
        run = tmp_path / "S" / "trials" / f"{number:04d}"
        until(lambda run=run: (run / "checkpoints/latest").exists())  # type: ignore[misc]
        process.kill()
        process.communicate(timeout=60)
        until(lambda run=run: file_lock.is_free(run / ".lock"))  # type: ignore[misc]
    stdout, _ = mtrl(*words)
    assert "resuming the sweep in" in stdout
    for number, record in enumerate(trials(tmp_path / "S")):
        assert (record["state"], record["step"], record["attempts"]) == ("completed", 300, 1)
        rows = (tmp_path / f"S/trials/{number:04d}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows if "eval/score/mean" in row] == [100, 200, 300]


# -- fake workers -----------------------------------------------------------------------------------------------------------------


def test_failed_trial_is_named_and_the_others_complete(mtrl: Commands, tmp_path: Path) -> None:
    stdout, stderr = mtrl.sweep("seed=0,1,2", code=1, FAKE_WORKER='{"1": "fail"}')
    assert "trial 1 failed: training diverged" in stdout
    assert "1 of 3 trials failed" in stderr
    assert len(stderr.splitlines()) == 1
    records = trials(tmp_path / "S")
    assert [record["state"] for record in records] == ["completed", "failed", "completed"]
    assert [record["value"] for record in records] == [0.0, None, 2.0]
    assert records[1]["why"] == "training diverged"
    mtrl.sweep("seed=0,1,2", code=1)
    assert [record["attempts"] for record in trials(tmp_path / "S")] == [1, 1, 1], "the failed trial is not retried"


def test_trial_is_resumed_after_its_process_is_killed_and_fails_after_too_many_kills(mtrl: Commands, tmp_path: Path) -> None:
    stdout, _ = mtrl.sweep("seed=0,1", "sweep.retries=2", code=1, FAKE_WORKER='{"0": "crash_once", "1": "crash"}')
    once, always = trials(tmp_path / "S")
    assert (once["state"], once["attempts"]) == ("completed", 2)
    assert (always["state"], always["attempts"]) == ("failed", 3)
    assert "killed by signal 9 (Killed)" in always["why"]
    assert "trial 0: its process died (killed by signal 9 (Killed)); resuming it" in stdout
    steps = [int(line) for line in (tmp_path / "S/trials/0000/steps.log").read_text().split()]
    assert steps == list(range(1, STEPS + 1))


def test_pruned_trial_is_stopped_and_reported(mtrl: Commands, tmp_path: Path) -> None:
    """Halving: the second trial is worse than the first, the third is better."""
    scores = {"0": 2.0, "1": 1.0, "2": 3.0}
    stdout, _ = mtrl.sweep("seed=0,1,2", "sweep.pruner=halving", FAKE_WORKER=json.dumps(scores), FAKE_HOLD='{"1": 2}')
    assert "trial 1: pruned at step 10" in stdout
    records = trials(tmp_path / "S")
    assert [record["state"] for record in records] == ["completed", "pruned", "completed"]
    assert [record["value"] for record in records] == [2.0, 1.0, 3.0]
    assert step_of(tmp_path / "S/trials/0001") == 2
    assert read(tmp_path / "S/trials/0001/run.json")["status"] == "stopped"


def test_stopped_and_resumed_search_has_the_same_trials(mtrl: Commands, tmp_path: Path) -> None:
    words = ["seed=3,4,5,6", "optimizer.lr=tag(log,interval(1e-5,1e-3))", "sweep.trials=4"]
    mtrl.sweep(*words)
    uninterrupted = [record["values"] for record in trials(tmp_path / "S")]
    (tmp_path / "S").rename(tmp_path / "uninterrupted")
    process = mtrl.start("sweep", *QUICK, *FAKE, "run_dir=S", *words, FAKE_HOLD='{"1": 3}')
    until(lambda: step_of(tmp_path / "S/trials/0001") == 3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = outcome(process, 130)
    assert "resume with: mtrl resume" in stdout + stderr
    assert read(tmp_path / "S/trials/0001/run.json")["status"] == "stopped"
    mtrl.sweep(*words)
    assert [record["values"] for record in trials(tmp_path / "S")] == uninterrupted
    assert [record["attempts"] for record in trials(tmp_path / "S")] == [1] * 4, "a stop does not count as an attempt"


def test_two_processes_share_the_trials_of_a_sweep(mtrl: Commands, tmp_path: Path) -> None:
    words = ["sweep", *QUICK, *FAKE, "run_dir=S", "seed=range(6)"]
    processes = [mtrl.start(*words, FAKE_HOLD='{"0": 1, "1": 1}') for _ in range(2)]
    until(lambda: all(step_of(tmp_path / f"S/trials/000{number}") == 1 for number in range(2)))  # one job each: both processes work
    (tmp_path / "S/go").touch()
    printed = [outcome(each, 0)[0] for each in processes]
    assert_each_once(tmp_path / "S", 6)
    assert all("6 of 6 completed" in text for text in printed), "both print the summary"


def test_waiting_process_resumes_the_trial_of_a_killed_process(mtrl: Commands, tmp_path: Path) -> None:
    words = ["sweep", *QUICK, *FAKE, "run_dir=S", "seed=7,8"]
    first = mtrl.start(*words, FAKE_WORKER='{"7": "hang"}')
    until(lambda: step_of(tmp_path / "S/trials/0000") > 0)
    second = mtrl.start(*words)
    until(lambda: step_of(tmp_path / "S/trials/0001") == STEPS)
    first.kill()
    stdout, _ = outcome(second, 0)
    assert "trial 0: resumed" in stdout
    assert [record["state"] for record in trials(tmp_path / "S")] == ["completed"] * 2


def test_another_sweep_in_the_same_folder_is_refused(mtrl: Commands, tmp_path: Path) -> None:
    mtrl.sweep("seed=0,1")
    _, stderr = mtrl.sweep("seed=0,1,2", code=2)
    assert "other values of seed" in stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine").touch()
    _, stderr = mtrl("sweep", *QUICK, "seed=0,1", "run_dir=other", code=2)
    assert "not empty" in stderr
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine"]


def test_unreachable_storage_or_storage_of_another_sweep_creates_nothing(mtrl: Commands, tmp_path: Path) -> None:
    url = "postgresql://me:secret@localhost:1/x"
    stdout, stderr = mtrl.sweep("seed=0,1", f"sweep.storage={url}", code=2)
    assert "sweep.storage=postgresql://me:***@localhost:1/x" in stderr
    assert "secret" not in stdout + stderr
    assert not (tmp_path / "S").exists()
    mtrl.sweep("seed=0,1", "sweep.storage=sqlite:///trials.db")
    (tmp_path / "S").rename(tmp_path / "T")
    _, stderr = mtrl.sweep("seed=0,1,2", "sweep.storage=sqlite:///trials.db", code=2)
    assert "of another sweep" in stderr
    assert not (tmp_path / "S").exists()


def test_each_trial_runs_once_in_a_sweep_killed_ten_times(mtrl: Commands, tmp_path: Path) -> None:
    """At seeded random moments: during imports, creating the folder, and adding, taking, starting, polling and ending trials."""
    words = ["sweep", *QUICK, *FAKE, "run_dir=S", "seed=range(6)", "launcher.jobs=2"]
    moments, begun = random.Random(20), time.monotonic()
    process = mtrl.start(*words, FAKE_SECONDS="0.1")
    until((tmp_path / "S/sweep.json").exists)
    startup_seconds = time.monotonic() - begun
    for _ in range(9):
        process.kill()
        process.communicate(timeout=60)
        process = mtrl.start(*words, FAKE_SECONDS="0.1")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=startup_seconds * moments.uniform(0.3, 2.3))
    process.kill()
    process.communicate(timeout=60)
    mtrl(*words)
    assert_each_once(tmp_path / "S", 6)
    assert [record["attempts"] for record in trials(tmp_path / "S")] == [1] * 6
