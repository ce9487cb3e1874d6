"""Two ranks started by torchrun train as one process: same gradients, one run folder, and a lost rank ends the run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.config.compose import load
from tests.helpers.command import MtrlHere
from tests.helpers.ranks import SMALL, Torchrun
from tests.helpers.shared import Shared
from tests.helpers.tiny_runs import STOPS


@pytest.fixture
def uninterrupted(shared: Shared) -> Path:
    """The folder of an uninterrupted run of two ranks, next to the digests of the ranks."""
    train = lambda folder: Torchrun(folder)(folder, "train", *SMALL, "run_dir=run", script="helpers/ranks_checks.py")  # noqa: E731
    return shared.folder("ranks-uninterrupted", train) / "run"


@pytest.fixture
def found(shared: Shared) -> list[dict[str, Any]]:
    """Results of ranks_checks.py on each of two ranks."""
    folder = shared.folder("ranks-checks", lambda folder: Torchrun(folder)(folder, script="helpers/ranks_checks.py"))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def latest(run: Path) -> int:
    try:
        return int((run / "checkpoints" / "latest").read_text())
    except (FileNotFoundError, ValueError):
        return -1


def model(run: Path) -> bytes:
    return (run / "checkpoints" / str(latest(run)) / "model.safetensors").read_bytes()


def learning_rows(run: Path) -> list[dict[str, float]]:
    """Return the rows of metrics without values that depend on time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/") and name != "seconds"} for row in rows]


def mtrl_errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("mtrl: error")]


# -- averages -------------------------------------------------------------------------------------------------------------------


def test_batch_split_over_two_ranks_gives_the_gradients_of_one(found: list[dict[str, Any]]) -> None:
    weightings = {name: value for name, value in found[0].items() if isinstance(value, dict) and "gradients" in value}
    assert {"uniform plain", "uniform taped", "pcgrad plain", "pcgrad taped", "famo plain", "graddrop taped"} <= set(weightings)
    for name, value in weightings.items():
        assert max(value["gradients"]) < 1e-6, name
        assert value["moments"] < 1e-6, name
        assert value["metrics"] < 1e-4, name


def test_ranks_stay_bit_identical(found: list[dict[str, Any]]) -> None:
    digests = [{name: value["digest"] for name, value in rank.items() if isinstance(value, dict) and "digest" in value} for rank in found]
    assert digests[0] == digests[1]
    assert len(set(digests[0].values())) > 10  # results differ between weightings


def test_returns_are_normalised_over_the_environments_of_all_ranks(found: list[dict[str, Any]]) -> None:
    assert [rank["return_norm"] for rank in found] == [0.0, 0.0]


def test_exchanges_equal_hand_computed_values(found: list[dict[str, Any]]) -> None:
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


def test_failure_of_one_rank_ends_all_ranks_and_the_first_prints_the_reason(found: list[dict[str, Any]]) -> None:
    assert found[0]["lost"] == "rank 1 has failed: the disk is full"


def test_busy_rank_is_ended_by_its_watchdog_when_a_peer_is_lost(tmp_path: Path) -> None:
    _, errors = Torchrun(tmp_path)(tmp_path, "stuck", script="helpers/ranks_checks.py", code=1)
    assert "rank 1 of 2 is gone" in (tmp_path / "lost").read_text()
    assert [line for line in mtrl_errors(errors) if "rank 1 of 2 is gone" in line]


# -- a run ----------------------------------------------------------------------------------------------------------------------


def test_ranks_train_identical_networks_in_different_environments(uninterrupted: Path) -> None:
    digests = [json.loads((uninterrupted.parent / f"{rank}.json").read_text()) for rank in range(2)]
    assert digests[0]["digest"] == digests[1]["digest"]
    assert digests[0]["frames"] != digests[1]["frames"]
    pack = load(uninterrupted / "config.yaml")["env"]
    assert len({*digests[0]["seeds"], *digests[1]["seeds"]}) == pack["num_envs"]


def test_two_ranks_write_one_run_folder_and_count_the_steps_of_both(uninterrupted: Path) -> None:
    assert load(uninterrupted / "config.yaml")["ranks"] == 2
    assert json.loads((uninterrupted / "run.json").read_text())["status"] == "completed"
    rows = learning_rows(uninterrupted)
    logged = [row for row in rows if "q/mean/CartPole-v1" in row]
    assert [row["step"] for row in logged] == list(range(200, 1601, 200))
    # One update per batch_size / samples_per_step = 8 steps per task of both ranks, made before the steps of the tick are counted.
    assert [row["updates"] for row in logged] == [(step - 4 - 100) // 8 for step in range(200, 1601, 200)]
    whole = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    speeds = [(row["step"], row["seconds"], row["perf/steps_per_second"]) for row in whole if "perf/steps_per_second" in row]
    (before, begun, _), (step, ended, speed) = speeds[1], speeds[2]
    assert speed == pytest.approx(2 * (step - before) / (ended - begun), rel=0.3)  # excludes the time of saving
    assert sorted(path.name for path in (uninterrupted / "checkpoints" / "replay").iterdir() if path.is_dir()) == ["rank-1"]


def test_evaluates_in_one_process_and_refuses_another_number_of_ranks(uninterrupted: Path) -> None:
    here = MtrlHere(uninterrupted.parent)
    assert "CartPole-v1" in here("eval", "run", "eval.episodes=2", "eval.max_steps=20").stdout
    refused = here("resume", "run", "steps_per_task=4000", code=2).stderr
    assert len(refused.strip().splitlines()) == 1
    assert "torchrun --nproc-per-node=2 -m mtrl_cli resume run" in refused
    assert "run was started with 2 ranks, got 1" in refused


def test_run_whose_ranks_are_killed_ends_with_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    run, ranks = tmp_path / "run", Torchrun(tmp_path)

    def record() -> dict[str, Any]:
        return dict(json.loads((run / "run.json").read_text()))

    def resume_until(step: int) -> dict[int, int]:
        ranks.start("train", *SMALL, "run_dir=run", "--or-resume")
        ranks.until(lambda: latest(run) >= step)
        return ranks.ranks()

    for killed, step in ((1, 200), (0, 400)):
        os.kill(resume_until(step)[killed], signal.SIGKILL)
        _, errors = ranks.end(code=1)
        assert record()["status"] == "failed"
        (line,) = mtrl_errors(errors)
        assert f"rank {killed} of 2 is gone" in line
        assert "torchrun --nproc-per-node=2 -m mtrl_cli resume run" in errors
        assert "mtrl_cli/" not in errors  # the only tracebacks are torchrun's

    for pid in [*resume_until(800).values(), ranks.process.pid]:
        os.kill(pid, signal.SIGKILL)
    ranks.end(code=-signal.SIGKILL)

    os.kill(resume_until(1000)[1], signal.SIGTERM)  # only one rank
    output, errors = ranks.end(code=1)
    assert "exitcode  : 143" in errors, errors
    assert mtrl_errors(errors) == []
    assert record()["status"] == "stopped"
    assert "torchrun --nproc-per-node=2 -m mtrl_cli resume run" in output

    ranks("resume", "run")
    assert record()["status"] == "completed"
    assert model(run) == model(uninterrupted)
    assert learning_rows(run) == learning_rows(uninterrupted)


def test_user_error_is_printed_once_and_nothing_is_created(tmp_path: Path) -> None:
    _, errors = Torchrun(tmp_path)("train", *SMALL, "env.num_envs=3", "run_dir=run", code=1)
    assert mtrl_errors(errors) == ["mtrl: error: env.num_envs must be a multiple of the number of ranks (2), got 3"]
    assert "exitcode  : 2" in errors
    assert not (tmp_path / "run").exists()


def test_all_ranks_stop_together(tmp_path: Path) -> None:
    printed, _ = Torchrun(tmp_path)("train", *STOPS, "run_dir=run", seconds=120)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["stopped_early"]["step"]) == ("completed", 400)
    assert printed.count("stopped early at step 400") == 1
    assert json.loads((tmp_path / "run" / "eval" / "test.json").read_text())["last"]["step"] == 400


@pytest.mark.learning
def test_classic_pack_reaches_its_thresholds_on_two_ranks(tmp_path: Path) -> None:
    """Trains with the pack's default budget, which takes minutes."""
    Torchrun(tmp_path)("train", "env=classic_pack", "run_dir=run", "eval.episodes=100", seconds=7200.0)
    step = latest(tmp_path / "run")
    tasks = json.loads((tmp_path / "run" / "eval" / f"{step}.json").read_text())["tasks"]
    thresholds = {"CartPole-v1": 475, "Acrobot-v1": -100, "MountainCar-v0": -120}
    assert {name: tasks[name]["mean"] for name, least in thresholds.items() if tasks[name]["mean"] < least} == {}
