"""Early stopping: on given curves, across a resume, and through the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from mtrl_cli.training.early_stopping import EarlyStopping
from tests.helpers.command import MtrlHere
from tests.helpers.shared import Shared
from tests.helpers.tiny_runs import STOPS, TINY, learning_rows, model, rows


def stops_at(curve: list[float | None], patience: int, min_delta: float = 0.0) -> int | None:
    """Return the index of the value after which training stops, or None."""
    stopping = EarlyStopping(metric="eval/score/mean", patience=patience, min_delta=min_delta)
    for index, value in enumerate(curve):
        stopping.update(index, value)
        if stopping.stopped:
            return index
    return None


@pytest.mark.parametrize(
    ("curve", "patience", "min_delta", "index"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1, 0.0, None),
        ([0.1, 0.2, 0.2, 0.4], 1, 0.0, 2),  # an equal value is not an improvement
        ([0.1, 0.0, 0.2, 0.1, 0.1, 0.3], 2, 0.0, 4),
        ([-5.0, -6.0, -4.0, -4.5, -4.2, -4.1], 3, 0.0, 5),
        ([0.0, 0.25, 0.5, 0.75], 1, 0.5, 1),
        ([0.0, 0.25, 0.5, 0.75], 2, 0.5, 2),  # 0.5 is not above 0 by more than 0.5
        ([0.0, 0.25, 0.5, 0.75, 1.0], 3, 0.5, None),  # slow progress adds up: 0.75 is above 0 by more than 0.5
        ([0.0, None, 0.0], 2, 0.0, 2),
        ([None, None, 0.0, math.nan], 2, 0.0, None),  # patience starts with the first value
        ([0.0, math.nan, math.nan], 2, 0.0, 2),
        ([math.nan, 1.0, 2.0, 3.0], 2, 0.0, None),
    ],
)
def test_stops_at_the_expected_value_of_a_curve(curve: list[float | None], patience: int, min_delta: float, index: int | None) -> None:
    assert stops_at(curve, patience, min_delta) == index


def test_stops_once_the_best_value_is_as_old_as_the_patience() -> None:
    """An independent formulation for random curves with min_delta 0."""
    random = np.random.default_rng(0)
    for _ in range(200):
        curve = [float(value) for value in random.integers(0, 20, 25)]
        patience = int(random.integers(1, 8))
        expected = next((index for index in range(25) if index - int(np.argmax(curve[: index + 1])) >= patience), None)
        assert stops_at(curve, patience) == expected


def test_restored_state_stops_at_the_same_value() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        curve = [float(value) for value in random.normal(size=20)]
        uninterrupted = EarlyStopping(metric="a", patience=6, min_delta=0.2)
        resumed = EarlyStopping(metric="a", patience=6, min_delta=0.2)
        for index, value in enumerate(curve):
            uninterrupted.update(index, value)
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = EarlyStopping(metric="a", patience=6, min_delta=0.2)
            resumed.load_state_dict(state)
            resumed.update(index, value)
            assert (resumed.stopped, resumed.state_dict()) == (uninterrupted.stopped, uninterrupted.state_dict())


def test_never_stops_without_a_metric() -> None:
    stopping = EarlyStopping(metric=None, patience=1, min_delta=0.0)
    for step in range(5):
        stopping.update(step, 0.0)
    assert not stopping.stopped


# -- through the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(shared: Shared) -> tuple[Path, str]:
    """A run that stops after its second evaluation, and its output."""
    return shared.run(*STOPS)


def test_stopped_run_is_completed_and_prints_the_reason(stopped: tuple[Path, str]) -> None:
    run, printed = stopped
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["200.json", "400.json", "test.json"]
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["stopped_early"]["step"] == 400
    assert "eval/score/iqm" in record["stopped_early"]["reason"]
    assert record["stopped_early"]["reason"] in printed
    assert (run / "checkpoints" / "latest").read_text() == "400\n"
    assert json.loads((run / "eval" / "test.json").read_text())["last"]["step"] == 400


def test_stopped_run_is_resumed_only_with_a_larger_budget(stopped: tuple[Path, str], here: MtrlHere) -> None:
    run = Path(shutil.copytree(stopped[0], here.folder / "run"))
    before = sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoints").rglob("*"))
    for words in (["resume", "run"], ["train", *STOPS, "run_dir=run", "--or-resume"]):
        printed = here(*words).stdout
        assert "stopped early at step 400 of 600" in printed
        assert "steps_per_task=1200" in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoints").rglob("*")) == before
    # With a larger budget, patience starts again and ends with the next evaluation.
    here("resume", "run", "steps_per_task=1200")
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["stopped_early"]["step"]) == ("completed", 600)
    assert [row["step"] for row in rows(run) if "test/return/CartPole-v1" in row] == [600]


def test_killed_run_stops_at_the_same_step_with_the_same_bytes(stopped: tuple[Path, str], here: MtrlHere) -> None:
    """Killed after the last checkpoint, and before it."""
    run = Path(shutil.copytree(stopped[0], here.folder / "run"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running", "stopped_early": None}))
    before, test = model(run), (run / "eval" / "test.json").read_bytes()
    (run / "eval" / "test.json").unlink()
    here("resume", "run")
    assert json.loads((run / "run.json").read_text())["stopped_early"]["step"] == 400
    assert (run / "eval" / "test.json").read_bytes() == test
    (run / "checkpoints" / "400" / "COMPLETE").unlink()
    assert "falling back to checkpoint 200" in here("resume", "run").stdout
    assert json.loads((run / "run.json").read_text())["stopped_early"]["step"] == 400
    assert model(run) == before
    assert (run / "eval" / "test.json").read_bytes() == test
    assert learning_rows(run) == learning_rows(stopped[0])


def test_run_with_sufficient_patience_is_unchanged(here: MtrlHere, shared: Shared) -> None:
    here("train", *TINY, "run_dir=patient", "early_stopping.metric=eval/return/CartPole-v1", "early_stopping.patience=3")
    assert model(shared.run(*TINY).path) == model(here.folder / "patient")
    assert json.loads((here.folder / "patient" / "run.json").read_text())["stopped_early"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["early_stopping.metric=eval/score/iqn"], "eval/score/iqm"),
        (["early_stopping.metric=eval/return/Pong"], "eval/return/Acrobot-v1"),
        (["early_stopping.metric=eval/score/mean", "eval.every=0"], "eval.every"),
        (["early_stopping.metric=eval/score/mean", "early_stopping.patience=0"], "early_stopping.patience"),
        (["early_stopping.metric=eval/score/mean", "early_stopping.min_delta=-1"], "early_stopping.min_delta"),
        (["early_stopping.metrc=eval/score/mean"], "Did you mean 'early_stopping.metric'?"),
    ],
)
def test_invalid_setting_is_refused_in_two_lines_with_exit_code_2(here: MtrlHere, overrides: list[str], message: str) -> None:
    refused = here("train", *TINY, *overrides, "run_dir=bad", code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2
    assert list(here.folder.iterdir()) == []


def test_tasks_without_reference_have_no_score_metrics(here: MtrlHere) -> None:
    words = ["train", *TINY, "env=gymnasium", "env.tasks=[CartPole-v0]", "run_dir=bad"]
    refused = here(*words, "early_stopping.metric=eval/score/mean", code=2)
    assert refused.stderr.strip().endswith("must be one of eval/return/CartPole-v0, got eval/score/mean")
