"""Exact resume: a run that was killed and resumed ends with the same bytes as an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.command import Mtrl, MtrlHere
from tests.helpers.shared import Shared
from tests.helpers.tiny_runs import CLASSIC, learning_rows, model
from tests.helpers.warm_process import Crash, WarmProcess

ATARI = [
    "env=atari_pack",
    "env.tasks=[pong,breakout]",
    "env.num_envs=2",
    "network.width=0.25",
    "network.features=16",
    "agent.learning_starts=40",
    "agent.batch_size=4",
    "agent.samples_per_step=1",
    "steps_per_task=240",
    "eval.every=0",
    "eval.episodes=1",
    "eval.max_steps=10",
    "eval.test_episodes=0",
    "checkpoint.every=60",
    "log.every=40",
    "log.diagnostics=100",
    "device=cpu",
    "compile=false",
    "replay.capacity=150",
]
PQN = [*[word for word in CLASSIC if not word.startswith(("agent.", "replay."))], "agent=pqn", "agent.rollout_length=11"]
PQN += ["agent.epochs=2", "env.num_envs=8"]
CRASHES = [
    Crash("mtrl_cli.envs.vector_tasks:VectorTasks.recv", call=30),
    Crash("os:fsync", call=4),
    Crash("mtrl_cli.training.evaluator:Evaluator.run"),
    Crash("os:replace", call=3, after=True),
    Crash("os:fsync", call=9, after=True),
]
"""Kills during environment steps, within a checkpoint, before an evaluation, after publishing a file, and within the next checkpoint."""


def start(mtrl: Mtrl, overrides: list[str], crash: Crash | None = None) -> WarmProcess:
    process = mtrl.start("train", *overrides, "run_dir=run", "--or-resume", crash=crash)
    assert isinstance(process, WarmProcess)
    return process


def check_same(mtrl: Mtrl) -> None:
    """Assert that the interrupted run ended with the bytes and the rows of the uninterrupted run."""
    uninterrupted, resumed = mtrl.folder / "uninterrupted", mtrl.folder / "run"
    assert model(resumed) == model(uninterrupted)
    assert learning_rows(resumed) == learning_rows(uninterrupted)
    assert json.loads((resumed / "run.json").read_text())["status"] == "completed"


@pytest.mark.parametrize(("overrides", "kills"), [(CLASSIC, 4), (ATARI, 3)], ids=["classic", "atari"])
def test_run_killed_at_random_moments_ends_with_the_same_bytes(mtrl: Mtrl, overrides: list[str], kills: int) -> None:
    begun = time.monotonic()
    mtrl("train", *overrides, "run_dir=uninterrupted")
    longest = (time.monotonic() - begun) / 2
    moments, killed = random.Random(int.from_bytes(os.urandom(4))), 0
    for _ in range(kills):
        process = start(mtrl, overrides)
        time.sleep(moments.uniform(0.1, longest))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed > 0
    output, errors = (process := start(mtrl, overrides)).communicate()
    assert process.returncode == 0, output + errors
    check_same(mtrl)


@pytest.mark.parametrize(
    ("overrides", "crashes"),
    [
        (PQN, CRASHES),
        ([*PQN, "agent.overlap=true"], CRASHES),
        ([*CLASSIC, "replay=prioritized", "network/sharing=independent"], CRASHES),
        ([*ATARI, "env.protocol=nature"], CRASHES[:2]),
    ],
    ids=["pqn", "pqn-overlap", "prioritized", "atari-nature"],
)
def test_run_killed_at_chosen_moments_ends_with_the_same_bytes(mtrl: Mtrl, overrides: list[str], crashes: list[Crash]) -> None:
    MtrlHere(mtrl.folder)("train", *overrides, "run_dir=uninterrupted")
    for crash in crashes:
        process = start(mtrl, overrides, crash)
        output, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, output + errors
    output, errors = (process := start(mtrl, overrides)).communicate()
    assert process.returncode == 0, output + errors
    check_same(mtrl)


def test_run_stopped_by_sigterm_ends_with_the_same_bytes(mtrl: Mtrl) -> None:
    overrides = [*CLASSIC, "checkpoint.every=0"]
    MtrlHere(mtrl.folder)("train", *overrides, "run_dir=uninterrupted")
    process = mtrl.start("train", *overrides, "run_dir=run")
    metrics = mtrl.folder / "run" / "metrics.jsonl"
    while not metrics.exists() or b"grad/norm" not in metrics.read_bytes():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 143, output + errors
    assert json.loads((mtrl.folder / "run" / "run.json").read_text())["status"] == "stopped"
    assert "mtrl resume" in output
    MtrlHere(mtrl.folder)("resume", "run")
    check_same(mtrl)


@pytest.fixture
def short(here: MtrlHere, shared: Shared) -> Callable[..., Path]:
    """`short("checkpoint.replay=false")`: a copy of a run of 480 steps, as `run` in the test's folder."""
    return lambda *overrides: Path(shutil.copytree(shared.run(*CLASSIC, "steps_per_task=480", *overrides).path, here.folder / "run"))


def test_completed_run_is_reported_and_its_budget_may_be_raised(here: MtrlHere, short: Callable[..., Path]) -> None:
    run = short()
    before = model(run)
    assert "completed" in here("resume", "run").stdout
    assert model(run) == before
    here("resume", "run", "steps_per_task=640")
    assert (run / "checkpoints" / "latest").read_text().strip() == "640"
    assert model(run) != before


def test_other_overrides_are_refused(here: MtrlHere, short: Callable[..., Path]) -> None:
    short()
    refused = here("resume", "run", "agent.n_step=2", code=2)
    assert "agent.n_step" in refused.stderr
    assert "steps_per_task" in here("resume", "run", "steps_per_task=100", code=2).stderr


def test_damaged_latest_checkpoint_falls_back_and_ends_with_the_same_bytes(here: MtrlHere, short: Callable[..., Path]) -> None:
    run = short()
    before = model(run)
    newest = run / "checkpoints" / "480" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = here("resume", "run")
    assert "falling back to checkpoint" in resumed.stdout
    assert model(run) == before


def test_anything_but_a_run_is_refused(here: MtrlHere) -> None:
    (here.folder / "empty").mkdir()
    for name in ("nowhere", "empty"):
        refused = here("resume", name, code=2)
        assert len(refused.stderr.strip().splitlines()) <= 2
        assert name in refused.stderr
    assert list((here.folder / "empty").iterdir()) == []


def test_task_added_to_a_trained_run_is_refused(here: MtrlHere, short: Callable[..., Path]) -> None:
    run = short("env.tasks=[CartPole-v1,Acrobot-v1]")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("- Acrobot-v1", "- Acrobot-v1\n  - MountainCar-v0"))
    for command in ("resume", "eval"):
        refused = here(command, "run", *(["steps_per_task=640"] if command == "resume" else []), code=2)
        assert len(refused.stderr.strip().splitlines()) <= 2, refused.stderr
        assert "MountainCar-v0" in refused.stderr, refused.stderr


def test_run_without_saved_replay_refills_the_replay(here: MtrlHere, short: Callable[..., Path]) -> None:
    run = short("checkpoint.replay=false")
    assert not list((run / "checkpoints").glob("replay/*"))
    assert "with an empty replay" in here("resume", "run", "steps_per_task=800").stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = {row["step"]: row["updates"] for row in rows}
    assert updates[560] == updates[480]
    assert updates[800] > updates[480]
