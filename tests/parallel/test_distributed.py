"""Several ranks train as one: the same gradients as one process with all samples, one run folder, and no rank is waited for in vain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.build.resolve_auto import settle
from mtrl_cli.config.compose import compose_training, load
from mtrl_cli.envs.gymnasium import GymnasiumPack
from mtrl_cli.errors import UserError
from mtrl_cli.parallel import torchrun
from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.parallel.torchrun import Place
from mtrl_cli.runs.run_dir import FolderOfTheFirst, RunFolder
from tests.helpers.command import ROOT, MtrlHere

SMALL = [
    "env=classic_pack",
    "env.tasks=[CartPole-v1,MountainCar-v0]",
    "env.num_envs=4",
    "agent.learning_starts=100",
    "agent.batch_size=16",
    "agent/value_scale=popart",
    "task_weights=pcgrad",
    "network.hidden=[16,16]",
    "network.dropout=0.1",
    "resets.every=500",
    "steps_per_task=1600",
    "eval.every=800",
    "eval.episodes=2",
    "eval.max_steps=30",
    "checkpoint.every=200",
    "log.every=200",
    "log.diagnostics=800",
    "device=cpu",
    "replay.capacity=1200",
]


class Torchrun:
    """Two ranks by torchrun, in processes of their own that inherit nothing but PATH.

    Args:
        folder: what they run in.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen[str]

    def start(self, *words: object, script: str = "") -> subprocess.Popen[str]:
        """Start `mtrl` with these words, or a script with them."""
        clean = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        what = [str(ROOT / "tests" / script)] if script else ["-m", "mtrl_cli"]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2", *what, *map(str, words)],
            cwd=self.folder,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def __call__(self, *words: object, script: str = "", code: int = 0, seconds: float = 300.0) -> tuple[str, str]:
        """Run them to their end: (stdout, stderr)."""
        self.start(*words, script=script)
        return self.end(code, seconds)

    def end(self, code: int = 0, seconds: float = 300.0) -> tuple[str, str]:
        """Wait for the end; torchrun's own exit code is 1 whatever that of a rank is."""
        try:
            output, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in [*self.ranks().values(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            raise
        assert self.process.returncode == code, f"{output[-2000:]}\n{errors[-6000:]}"
        return output, errors

    def ranks(self) -> dict[int, int]:
        """The processes of the ranks."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): int(pid) for each in environment if each.startswith(b"RANK=")}
        return found

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that the run does."""
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that was left alone, beside what each rank said at its end."""
    folder = tmp_path_factory.mktemp("alone")
    Torchrun(folder)(folder, "train", *SMALL, "run_dir=run", script="helpers/ranks_checks.py")
    return folder / "run"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found out in ranks_checks.py."""
    folder = tmp_path_factory.mktemp("checks")
    Torchrun(folder)(folder, script="helpers/ranks_checks.py")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def latest(run: Path) -> int:
    try:
        return int((run / "checkpoints" / "latest").read_text())
    except (FileNotFoundError, ValueError):
        return -1


def model(run: Path) -> bytes:
    return (run / "checkpoints" / str(latest(run)) / "model.safetensors").read_bytes()


def learning_rows(run: Path) -> list[dict[str, float]]:
    """What was learned, row by row, without what depends on the time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/") and name != "seconds"} for row in rows]


def errors_of_ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("mtrl: error")]


# -- averages -------------------------------------------------------------------------------------------------------------------


def test_batch_split_over_two_ranks_gives_the_gradients_of_one(found: list[dict[str, Any]]) -> None:
    weightings = {name: value for name, value in found[0].items() if isinstance(value, dict) and "gradients" in value}
    assert {"uniform plain", "uniform taped", "pcgrad plain", "pcgrad taped", "famo plain", "graddrop taped"} <= set(weightings)
    for name, value in weightings.items():
        assert max(value["gradients"]) < 1e-6, name
        assert value["moments"] < 1e-6, name
        assert value["metrics"] < 1e-4, name


def test_ranks_stay_the_same_bit_by_bit(found: list[dict[str, Any]]) -> None:
    digests = [{name: value["digest"] for name, value in rank.items() if isinstance(value, dict) and "digest" in value} for rank in found]
    assert digests[0] == digests[1]
    assert len(set(digests[0].values())) > 10  # and weightings differ


def test_returns_are_normalised_over_the_environments_of_all_ranks(found: list[dict[str, Any]]) -> None:
    assert [rank["return_norm"] for rank in found] == [0.0, 0.0]


def test_exchanges_worked_out_by_hand(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["mean"] == [[[0.5] * 3] * 2, 0.5, [[0.0, 1.5], [0.5, 2.0], [1.0, 2.5]]]
        assert rank["joined"] == [[0, 1], [10, 11]]
        assert rank["agreed"] == [1.5]
        assert rank["total"] == [3, 20]
        assert rank["largest"] == [7, 1]
        assert rank["recent"] == {"a": 5.0}
        assert rank["row"] == {"train/return/a": 5.0, "train/length/a": 1.0}
        assert rank["from_first"] == {"rank": 0, "text": "ü"}
    assert [rank["gather"] for rank in found] == [["of 1of 1of 1"], []]


def test_error_of_one_rank_is_raised_on_all(found: list[dict[str, Any]]) -> None:
    assert found[0]["raised"] == [["UserError", "0 cannot"], ["RunError", "rank 1: 1 cannot"]]
    assert found[1]["raised"] == [["UserError", "0 cannot"], ["RunError", "1 cannot"]]


def test_rank_that_fails_alone_takes_the_others_with_it_and_the_first_knows_why(found: list[dict[str, Any]]) -> None:
    line, seconds = found[0]["lost"]
    assert line == "rank 1 has failed: the disk is full"
    assert seconds < 10


def test_rank_that_cannot_notice_a_loss_by_itself_is_ended_from_beside(tmp_path: Path) -> None:
    begun = time.monotonic()
    _, errors = Torchrun(tmp_path)(tmp_path, "stuck", script="helpers/ranks_checks.py", code=1)
    assert time.monotonic() - begun < 90  # it would be busy for longer than that
    assert "rank 1 of 2 is gone" in (tmp_path / "lost").read_text()
    assert [line for line in errors_of_ours(errors) if "rank 1 of 2 is gone" in line]


# -- a run ----------------------------------------------------------------------------------------------------------------------


def test_networks_are_identical_and_environments_are_not(alone: Path) -> None:
    said = [json.loads((alone.parent / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0]["digest"] == said[1]["digest"]
    assert said[0]["frames"] != said[1]["frames"]
    pack = load(alone / "config.yaml")["env"]
    assert len({*said[0]["seeds"], *said[1]["seeds"]}) == pack["num_envs"]


def test_run_is_one_and_counts_all_ranks(alone: Path) -> None:
    assert load(alone / "config.yaml")["ranks"] == 2
    assert json.loads((alone / "run.json").read_text())["status"] == "completed"
    rows = learning_rows(alone)
    logged = [row for row in rows if "q/mean/CartPole-v1" in row]
    assert [row["step"] for row in logged] == list(range(200, 1601, 200))
    # An update every batch_size / samples_per_step = 2 steps per task, over all ranks; it comes before its tick's steps are counted.
    assert [row["updates"] for row in logged] == [(step - 4 - 100) // 2 for step in range(200, 1601, 200)]
    whole = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    speeds = [(row["step"], row["seconds"], row["perf/steps_per_second"]) for row in whole if "perf/steps_per_second" in row]
    (before, begun, _), (step, ended, speed) = speeds[1], speeds[2]
    assert speed == pytest.approx(2 * (step - before) / (ended - begun), rel=0.3)  # without the time of saving
    assert sorted(path.name for path in (alone / "checkpoints" / "replay").iterdir() if path.is_dir()) == ["rank-1"]


def test_evaluates_in_one_process_and_refuses_another_number_of_ranks(alone: Path) -> None:
    here = MtrlHere(alone.parent)
    assert "CartPole-v1" in here("eval", "run", "eval.episodes=2", "eval.max_steps=20").stdout
    refused = here("resume", "run", "steps_per_task=4000", code=2).stderr
    assert len(refused.strip().splitlines()) == 1
    assert "torchrun --nproc-per-node=2 -m mtrl_cli resume run" in refused
    assert "ranks=2" in refused


def test_whatever_happens_to_ranks_a_run_ends_with_the_same_bytes(alone: Path, tmp_path: Path) -> None:
    run, ranks = tmp_path / "run", Torchrun(tmp_path)

    def record() -> dict[str, Any]:
        return dict(json.loads((run / "run.json").read_text()))

    def go_on_until(step: int) -> dict[int, int]:
        ranks.start("train", *SMALL, "run_dir=run", "--or-resume")
        ranks.until(lambda: latest(run) >= step)
        return ranks.ranks()

    for killed, step in ((1, 200), (0, 400)):
        os.kill(go_on_until(step)[killed], signal.SIGKILL)
        moment = time.monotonic()
        _, errors = ranks.end(code=1)
        assert time.monotonic() - moment < 30
        assert record()["status"] == "failed"
        (line,) = errors_of_ours(errors)
        assert f"rank {killed} of 2 is gone" in line
        assert "torchrun --nproc-per-node=2 -m mtrl_cli resume run" in errors
        assert "mtrl_cli/" not in errors  # tracebacks are torchrun's own

    for pid in [*go_on_until(800).values(), ranks.process.pid]:
        os.kill(pid, signal.SIGKILL)
    ranks.end(code=-signal.SIGKILL)

    os.kill(go_on_until(1000)[1], signal.SIGTERM)  # one rank alone
    output, errors = ranks.end(code=1)
    assert "exitcode  : 143" in errors, errors
    assert errors_of_ours(errors) == []
    assert record()["status"] == "stopped"
    assert "torchrun --nproc-per-node=2 -m mtrl_cli resume run" in output

    ranks("resume", "run")
    assert record()["status"] == "completed"
    assert model(run) == model(alone)
    assert learning_rows(run) == learning_rows(alone)


def test_error_of_the_user_is_told_once_and_nothing_is_made(tmp_path: Path) -> None:
    _, errors = Torchrun(tmp_path)("train", *SMALL, "env.num_envs=3", "run_dir=run", code=1)
    assert errors_of_ours(errors) == ["mtrl: error: env.num_envs must be a multiple of the number of ranks (2), got 3"]
    assert "exitcode  : 2" in errors
    assert not (tmp_path / "run").exists()


# -- in this process ------------------------------------------------------------------------------------------------------------


def test_what_torchrun_says_is_read_from_the_environment() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert torchrun.place(given) == Place(3, 4, 1, 2)
    assert torchrun.place({"RANK": "3", "WORLD_SIZE": "4"}) == Place()
    for name, value in (("RANK", "4"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "2")):
        with pytest.raises(UserError, match=name):
            torchrun.place(given | {name: value})


def test_number_of_ranks_is_not_for_the_command_line() -> None:
    assert compose_training(["env=classic_pack"])["ranks"] == 1
    with pytest.raises(UserError, match="torchrun --nproc-per-node=4"):
        compose_training(["env=classic_pack", "ranks=4"])


def test_run_from_before_there_were_ranks_is_one_of_one(here: MtrlHere) -> None:
    here("train", *SMALL, "steps_per_task=200", "resets.every=0", "eval.every=0", "run_dir=run")
    config = here.folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("ranks: 1\n", ""))
    assert load(config)["ranks"] == 1
    here("resume", "run", "steps_per_task=400")


@pytest.mark.parametrize(("changes", "words"), [("env.num_envs=8", "env.num_envs=8"), ("device=cuda:1", "device=cuda:1")])
def test_settling_refuses_what_ranks_cannot_share(changes: str, words: str) -> None:
    config = compose_training(["env=classic_pack", changes])
    pack = GymnasiumPack(name="classic_pack", tasks=["CartPole-v1"], num_envs=8, max_episode_steps=0)
    with pytest.raises(UserError, match=words):
        settle(config, pack, lambda line: None, Ranks(Place(0, 3, 0, 3)))


def test_settled_capacity_is_that_of_all_ranks_and_each_keeps_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_training(["env=classic_pack", "device=cpu", "checkpoint.replay=false"])
    pack = GymnasiumPack(name="classic_pack", tasks=["CartPole-v1"], num_envs=8, max_episode_steps=0)
    each = 4 * 4 + 6  # CartPole's four numbers, and action, reward and flags
    monkeypatch.setattr("mtrl_cli.machine.hardware.memory_available", lambda: 2 * 1000 * each)
    of_one_machine = settle(config, pack, lambda line: None, Ranks(Place(0, 4, 0, 4)))["replay"]["capacity"]
    of_two = settle(config, pack, lambda line: None, Ranks(Place(0, 4, 0, 2)))["replay"]["capacity"]
    assert (of_one_machine, of_two) == (1000, 2000)


def test_folder_of_the_first_is_written_to_only_when_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrl_cli.runs.run_dir.PATIENCE_SECONDS", 0.1)
    first = RunFolder.create(tmp_path / "run")
    first.write("config.yaml", "{}")
    first.begin(command=["mtrl"], device="cpu")
    others = FolderOfTheFirst(first.path)
    others.write("config.yaml", "other")
    others.finish("completed", seconds=1.0)
    assert not others.mark_failed(seconds=1.0, error="gone")
    assert first.read_record()["status"] == "running"
    assert first.config.read_text() == "{}"
    first.unlock()
    assert others.mark_failed(seconds=1.0, error="gone")
    assert first.read_record()["status"] == "failed"
    assert not others.mark_failed(seconds=1.0, error="gone")


@pytest.mark.learning
def test_classic_pack_reaches_its_thresholds_on_two_ranks(tmp_path: Path) -> None:
    """At the pack's default budget: minutes."""
    Torchrun(tmp_path)("train", "env=classic_pack", "run_dir=run", "eval.episodes=100", seconds=7200.0)
    step = latest(tmp_path / "run")
    tasks = json.loads((tmp_path / "run" / "eval" / f"{step}.json").read_text())["tasks"]
    thresholds = {"CartPole-v1": 475, "Acrobot-v1": -100, "MountainCar-v0": -120}
    assert {name: tasks[name]["mean"] for name, least in thresholds.items() if tasks[name]["mean"] < least} == {}
