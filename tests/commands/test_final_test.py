"""Validation and final test: separate seeds, the best checkpoint, and resuming."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.commands import final_test
from mtrl_cli.commands.final_test import metrics
from mtrl_cli.runs.metrics_logger import Logger
from mtrl_cli.training.evaluator import Evaluator
from tests.helpers.command import Mtrl, MtrlHere
from tests.helpers.fake_pack import FakePack, PrefersLastAction
from tests.helpers.shared import Shared
from tests.helpers.tiny_runs import TINY, rows

TASKS = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


class SignedPreference(PrefersLastAction):
    """Network whose greedy action is each task's last action if its parameter is positive, and another action otherwise."""

    def __init__(self, pack: FakePack, sign: float):
        super().__init__(pack)
        self.sign = torch.nn.Parameter(torch.tensor(sign))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.sign * super().forward(observation)


def final_test_at_30(tmp_path: Path, scores: dict[int, float | None], damage: bool = False) -> dict:
    """Run the final test at step 30. The last network prefers last actions, earlier checkpoints do not."""
    pack = FakePack(["short", "long"])
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, with_replay=True)
    for step, score in scores.items():
        network = SignedPreference(pack, 1.0 if step == 30 else -1.0)
        store.save(step, {"model": network.state_dict(), "optimizer": {}}, None, score)
    if damage:
        (tmp_path / "checkpoints" / str(store.best()) / "model.safetensors").write_bytes(b"")
    settings = {"episodes": 4, "max_steps": 50, "epsilon": 0.0, "num_threads": 1, "device": torch.device("cpu")}
    result = final_test.run(Evaluator(pack, seed=7, **settings), network, store, 30, lambda: None)
    assert network.sign.item() == 1.0
    validation = Evaluator(pack, seed=8, **settings).run(network, lambda: None)
    assert validation.returns["long"] != result["last"]["tasks"]["long"]["returns"]
    return result


def test_best_by_validation_is_tested_with_its_own_weights(tmp_path: Path) -> None:
    result = final_test_at_30(tmp_path, {10: 0.2, 20: 0.9, 30: 0.5})
    assert (result["last"]["step"], result["best"]["step"]) == (30, 20)
    assert (result["last"]["split"], result["last"]["seed"], result["best"]["seed"]) == ("test", 7, 7)
    for task, best_action in (("short", 1), ("long", 2)):
        last, best = (result[which]["tasks"][task]["returns"] for which in ("last", "best"))
        # Episodes have the same lengths for both networks, and the reward per step is the action's number plus up to 0.1.
        for one, other in zip(last, best, strict=True):
            length = round(one / (best_action + 0.05))
            assert one - other == pytest.approx(best_action * length, abs=0.1 * length + 1e-6)
            assert other <= 0.1 * length + 1e-6
    assert metrics(result)["test/return/long"] == result["last"]["tasks"]["long"]["mean"]
    assert metrics(result)["test/best/return/long"] == result["best"]["tasks"]["long"]["mean"]
    assert metrics(result)["test/best/step"] == 20


def test_best_checkpoint_that_is_the_last_is_tested_once(tmp_path: Path) -> None:
    result = final_test_at_30(tmp_path, {10: 0.2, 20: 0.4, 30: 0.5})
    assert result["best"] == result["last"]
    assert not [name for name in metrics(result) if name.startswith("test/best")]


def test_run_without_validation_has_no_best_checkpoint(tmp_path: Path) -> None:
    assert final_test_at_30(tmp_path, {10: None, 30: None})["best"] is None


def test_damaged_best_checkpoint_is_reported_and_does_not_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = final_test_at_30(tmp_path, {10: 0.9, 30: 0.5}, damage=True)
    assert result["best"] is None
    assert result["last"]["step"] == 30
    assert "the best checkpoint cannot be tested: checkpoint 10" in capsys.readouterr().out


def test_rows_of_the_final_test_are_removed_on_resume(tmp_path: Path) -> None:
    """A run killed between its test and its end repeats the test and must not log it twice."""
    for resume_at in (None, 20):
        logger = Logger(tmp_path, resume_at)
        if resume_at is None:
            logger.row(10, 10, 0.1, 1, {"eval/return/pong": 1.0})
        logger.row(20, 20, 0.2, 2, {"test/return/pong": 2.0})
        logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]


# -- through the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(shared: Shared) -> tuple[Path, str]:
    """A tiny run with an evaluation before the first step, and its output."""
    return shared.run(*TINY, "eval.at_start=true", "eval.test_episodes=3")


def read(run: Path, name: str) -> dict:
    found: dict = json.loads((run / "eval" / f"{name}.json").read_text())
    return found


def test_validation_and_test_are_distinguished_in_all_outputs(trained: tuple[Path, str]) -> None:
    run, printed = trained
    validation, test = read(run, "600"), read(run, "test")
    assert (validation["split"], validation["seed"], validation["episodes"]) == ("validation", 1000003, 2)
    assert (test["split"], test["seed"], test["step"], test["last"]["episodes"]) == ("test", 2000003, 600, 3)
    assert test["best"]["step"] == int((run / "checkpoints" / "best").read_text())
    assert "Validation at step 600 (episodes of seed 1000003" in printed
    assert "Test of the last network" in printed
    assert "episodes of seed 2000003; not used to choose anything" in printed
    (row,) = (row for row in rows(run) if "test/return/CartPole-v1" in row)
    assert row["step"] == 600
    for task in TASKS:
        assert row[f"test/return/{task}"] == pytest.approx(np.mean(test["last"]["tasks"][task]["returns"]))
        assert row[f"test/score/{task}"] == pytest.approx(test["last"]["tasks"][task]["score"])
    assert row["test/score/iqm"] == pytest.approx(test["last"]["over_tasks"]["iqm"])


def test_best_is_chosen_by_the_mean_normalised_score_of_validation(trained: tuple[Path, str]) -> None:
    run, _ = trained
    scores = {step: read(run, str(step))["over_tasks"]["mean"] for step in (0, 304, 600)}
    assert int((run / "checkpoints" / "best").read_text()) == max(sorted(scores), key=lambda step: scores[step])


def test_evaluation_before_the_first_step_does_not_affect_training(trained: tuple[Path, str], here: MtrlHere) -> None:
    run, _ = trained
    here("train", *TINY, "eval.test_episodes=0", "run_dir=plain")
    model = Path("checkpoints") / "600" / "model.safetensors"
    assert (here.folder / "plain" / model).read_bytes() == (run / model).read_bytes()
    assert not (here.folder / "plain" / "eval" / "test.json").exists()
    assert [row["step"] for row in rows(run) if "eval/return/CartPole-v1" in row] == [0, 304, 600]
    assert read(run, "0")["tasks"]["MountainCar-v0"]["mean"] == -40


def test_eval_prints_its_split_and_reproduces_the_final_test(trained: tuple[Path, str], here: MtrlHere) -> None:
    run = Path(shutil.copytree(trained[0], here.folder / "run"))
    validation, test = read(run, "600"), read(run, "test")
    few = ["eval.episodes=3", "checkpoint=600"]
    printed = here("eval", "run", *few, "eval.seed=2000003").stdout
    assert "Test of the network, step 600 (episodes of seed 2000003" in printed
    assert "replaced a validation evaluation of 2 episodes" in printed
    assert read(run, "600")["split"] == "test"
    assert read(run, "600")["tasks"] == test["last"]["tasks"]
    assert "Validation at step 600" in here("eval", "run", "checkpoint=600").stdout
    assert read(run, "600") == validation
    assert read(run, "test") == test


def test_test_seed_must_differ_from_the_validation_seed(here: MtrlHere) -> None:
    refused = here("train", *TINY, "eval.test_seed=1000003", "run_dir=bad", code=2)
    assert "eval.test_seed must differ from eval.seed, got 1000003 for both" in refused.stderr
    assert list(here.folder.iterdir()) == []
    without_test = here("train", *TINY, "eval.test_seed=1000003", "eval.test_episodes=0", "--dry-run").stdout
    assert "test_episodes: 0" in without_test


def test_test_interrupted_by_a_signal_is_repeated_with_the_same_results(mtrl: Mtrl) -> None:
    overrides = [*TINY, "steps_per_task=208", "eval.every=0", "eval.max_steps=300", "eval.test_episodes=32"]
    MtrlHere(mtrl.folder)("train", *overrides, "run_dir=uninterrupted")
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = mtrl.start("train", *overrides, "run_dir=run", "--or-resume")
        assert process.stdout is not None
        while "testing at step 208" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.05)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == code
        assert not (mtrl.folder / "run" / "eval" / "test.json").exists()
    MtrlHere(mtrl.folder)("resume", "run")
    run, uninterrupted = mtrl.folder / "run", mtrl.folder / "uninterrupted"
    assert (run / "eval" / "test.json").read_bytes() == (uninterrupted / "eval" / "test.json").read_bytes()
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    of_tests = [[row for row in rows(each) if "test/return/CartPole-v1" in row] for each in (run, uninterrupted)]
    assert [len(found) for found in of_tests] == [1, 1]
    model = Path("checkpoints") / "208" / "model.safetensors"
    assert (run / model).read_bytes() == (uninterrupted / model).read_bytes()
