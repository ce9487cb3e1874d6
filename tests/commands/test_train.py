"""`mtrl train` through the command line: files, metrics, errors, stopping and resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.command import Mtrl, MtrlHere
from tests.helpers.shared import Shared
from tests.helpers.tiny_runs import TASKS, TINY, rows


@pytest.fixture
def trained(shared: Shared) -> tuple[Path, str]:
    """A tiny run and its output."""
    return shared.run(*TINY)


def test_run_folder_contents(trained: tuple[Path, str]) -> None:
    run, _ = trained
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["device"] == "cpu"
    assert "train" in record["command"]
    latest = (run / "checkpoints" / "latest").read_text().strip()
    assert latest == "600"
    assert {path.name for path in (run / "checkpoints" / latest).iterdir()} >= {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "COMPLETE",
    }
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["304.json", "600.json", "test.json"]
    assert list((run / "tensorboard").iterdir())


def test_saved_configuration_has_no_auto_values(trained: tuple[Path, str]) -> None:
    run, _ = trained
    text = (run / "config.yaml").read_text()
    assert "auto" not in text
    assert "device: cpu" in text


def test_rows_have_all_metrics(trained: tuple[Path, str]) -> None:
    run, _ = trained
    last = [row for row in rows(run) if "perf/steps_per_second" in row][-1]
    assert last["step"] == last["frames"] == 600
    # 500 learning steps with 2 samples per step, 16 samples per update. The updates of the last step are due at the next step.
    assert last["updates"] == (600 - 8 - 100) * 2 // 16
    for task in TASKS:
        for name in (f"loss/{task}", f"q/mean/{task}", f"weight/{task}", f"epsilon/{task}"):
            assert name in last
        assert last[f"weight/{task}"] == pytest.approx(1 / 3)
    for name in ("grad/norm", "perf/frames_per_second", "perf/updates_per_second", "perf/memory"):
        assert last[name] > 0
    for part in ("act", "env", "learn", "log"):
        assert last[f"perf/seconds/{part}"] >= 0


def test_evaluation_file_has_scores_and_intervals(trained: tuple[Path, str]) -> None:
    run, _ = trained
    evaluation = json.loads((run / "eval" / "600.json").read_text())
    assert evaluation["step"] == 600
    assert evaluation["checkpoint"] == "600"
    assert evaluation["episodes"] == 2
    for task in TASKS:
        result = evaluation["tasks"][task]
        assert len(result["returns"]) == 2
        assert result["mean"] == pytest.approx(sum(result["returns"]) / 2)
        assert result["ci"][0] <= result["mean"] <= result["ci"][1]
    assert set(evaluation["over_tasks"]) >= {"mean", "median", "iqm", "min", "ci"}
    # Acrobot and MountainCar cannot end within 40 steps: their episodes are marked as cut.
    assert evaluation["tasks"]["MountainCar-v0"]["cut"] == 2
    assert evaluation["tasks"]["MountainCar-v0"]["mean"] == -40


def test_end_of_a_run_prints_the_next_commands(trained: tuple[Path, str]) -> None:
    _, printed = trained
    assert "tensorboard --logdir" in printed
    assert "mtrl eval" in printed
    assert "parameters" in printed
    assert "replay:" in printed


def test_same_seed_gives_identical_bytes(trained: tuple[Path, str], here: MtrlHere) -> None:
    run, _ = trained
    here("train", *TINY, "run_dir=again", "log.every=37", "checkpoint.every=0")
    here("train", *TINY, "run_dir=other", "seed=1")
    model = Path("checkpoints") / "600" / "model.safetensors"
    assert (here.folder / "again" / model).read_bytes() == (run / model).read_bytes()
    assert (here.folder / "other" / model).read_bytes() != (run / model).read_bytes()


def test_existing_run_is_not_overwritten(trained: tuple[Path, str], here: MtrlHere) -> None:
    run, _ = trained
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    refused = here("train", *TINY, f"run_dir={run}", code=2)
    assert "not empty" in refused.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agent.n_stp=3"], "n_step"),
        (["env=atari_pck"], "atari_pack"),
        (["env=atari_pack", "env.tasks=[pongg]"], "pong"),
        (["agent.n_step=three"], "agent.n_step"),
        (["steps_per_task=0"], "steps_per_task"),
        (["steps_per_task=-5"], "steps_per_task"),
        (["env.tasks=[]"], "env.tasks"),
        (["env.tasks=[CartPole-v1,CartPole-v1]"], "env.tasks"),
        (["device=cuda"], "cuda"),
        (["network=nature"], "vector"),
        (["replay.capacity=20"], "replay.capacity"),
        (["replay.capacity=4000000000000"], "GiB are free"),
        (["env=gymnasium", "env.tasks=[NoSuchGame-v0]"], "NoSuchGame-v0"),
        (["env=gymnasium", "env.tasks=[Pendulum-v1]"], "Pendulum-v1"),
        (["agent.epsilon_tasks={Pong: 0.1}"], "Pong"),
    ],
)
def test_invalid_input_is_two_lines_and_exit_code_2_and_creates_nothing(here: MtrlHere, overrides: list[str], message: str) -> None:
    refused = here("train", "env=classic_pack", *overrides, "run_dir=bad", code=2)
    lines = refused.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 2, refused.stderr
    assert message in refused.stderr
    assert list(here.folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_refused(here: MtrlHere) -> None:
    (here.folder / "locked").mkdir(mode=0o500)
    assert "writable" in here("train", *TINY, "run_dir=locked/run", code=2).stderr


def test_folder_that_cannot_be_created_is_refused(here: MtrlHere) -> None:
    refused = here("train", *TINY, "run_dir=/proc/nowhere/run", code=2)
    assert "/proc/nowhere/run" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_folder_below_a_file_is_refused(here: MtrlHere) -> None:
    (here.folder / "file").write_text("")
    assert "file" in here("train", *TINY, "run_dir=file/run", code=2).stderr


def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(here: MtrlHere) -> None:
    failed = here("train", *TINY, "run_dir=run", "optimizer.lr=1e30", "optimizer.max_grad_norm=0", "agent.huber=0", code=1)
    lines = failed.stderr.strip().splitlines()
    assert len(lines) <= 2
    assert "not finite" in failed.stderr
    assert any(task in failed.stderr for task in TASKS)
    assert json.loads((here.folder / "run" / "run.json").read_text())["status"] == "failed"
    assert not (here.folder / "run" / "checkpoints" / "600").exists()


def test_second_process_on_a_run_is_refused(mtrl: Mtrl) -> None:
    first = mtrl.start("train", *TINY, "run_dir=run", "steps_per_task=1000000")
    while not (mtrl.folder / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert first.poll() is None
    refused = mtrl("resume", "run", code=2)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert "in use" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert first.returncode == 143


def test_evaluation_interrupted_by_a_signal_is_repeated_on_resume(mtrl: Mtrl) -> None:
    long = [
        "eval.every=200",
        "eval.episodes=64",
        "eval.max_steps=500",
        "eval.epsilon=0.0",
        "eval.test_episodes=0",
        "steps_per_task=200",
        "run_dir=run",
    ]
    process = mtrl.start("train", *TINY, *long)
    assert process.stdout is not None
    while "evaluating" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert not (mtrl.folder / "run" / "eval").exists()
    MtrlHere(mtrl.folder)("resume", "run")
    assert (mtrl.folder / "run" / "eval" / "200.json").exists()


def test_folder_deleted_during_training_is_reported(mtrl: Mtrl) -> None:
    process = mtrl.start("train", *TINY, "run_dir=run", "steps_per_task=1000000", "eval.every=0", "checkpoint.every=100000")
    while not (mtrl.folder / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert process.poll() is None
    shutil.rmtree(mtrl.folder / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "run" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (mtrl.folder / "run").exists()


def test_or_resume_reports_ignored_overrides(trained: tuple[Path, str], here: MtrlHere) -> None:
    run = shutil.copytree(trained[0], here.folder / "run")
    printed = here("train", *TINY, f"run_dir={run}", "--or-resume", "steps_per_task=700", "agent.gamma=0.5").stdout
    assert "ignored from this command: agent.gamma" in printed
    assert (run / "checkpoints" / "latest").read_text().strip() == "704"
