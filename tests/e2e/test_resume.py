"""Exact resume: a run that was killed and resumed ends with the same bytes as an uninterrupted run."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.command import Mtrl, MtrlHere
from tests.helpers.tiny_runs import CLASSIC, learning_rows, model

ATARI = [
    "env=atari_pack",
    "env.tasks=[pong,breakout]",
    "env.num_envs=2",
    "network.width=0.25",
    "network.features=16",
    "agent.learning_starts=40",
    "agent.batch_size=4",
    "steps_per_task=400",
    "eval.every=0",
    "eval.episodes=1",
    "eval.max_steps=10",
    "checkpoint.every=60",
    "log.every=40",
    "log.diagnostics=100",
    "device=cpu",
    "compile=false",
    "replay.capacity=300",
]
PQN = [*[word for word in CLASSIC if not word.startswith(("agent.", "replay."))], "agent=pqn", "env.num_envs=8", "agent.rollout_length=11"]
MODEL = Path("checkpoints") / "latest"


def kill_and_resume(mtrl: Mtrl, overrides: list[str], kills: int, seed: int, longest: float) -> int:
    """Start a run and kill it at random moments until it completes. Returns the number of kills."""
    moments, killed = random.Random(seed), 0
    for attempt in range(kills + 1):
        process = mtrl.start("train", *overrides, "run_dir=run", "--or-resume")
        if attempt < kills:
            time.sleep(moments.uniform(0.2, longest))
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
        output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return killed


@pytest.mark.parametrize(
    ("overrides", "kills", "longest"),
    [
        (CLASSIC, 5, 6.0),
        (PQN, 3, 6.0),
        ([*PQN, "agent.overlap=true"], 3, 6.0),
        ([*CLASSIC, "replay=prioritized", "network/sharing=independent"], 3, 6.0),
        (ATARI, 4, 8.0),
        ([*ATARI, "env.protocol=nature"], 2, 8.0),
    ],
    ids=["classic", "pqn", "pqn-overlap", "prioritized", "atari", "atari-nature"],
)
def test_run_killed_at_random_moments_ends_with_the_same_bytes(mtrl: Mtrl, overrides: list[str], kills: int, longest: float) -> None:
    MtrlHere(mtrl.folder)("train", *overrides, "run_dir=uninterrupted")
    killed = kill_and_resume(mtrl, overrides, kills, seed=len(overrides), longest=longest)
    assert killed > 0
    alone, resumed = mtrl.folder / "uninterrupted", mtrl.folder / "run"
    assert model(resumed) == model(alone)
    assert learning_rows(resumed) == learning_rows(alone)


def test_run_stopped_by_sigterm_ends_with_the_same_bytes(mtrl: Mtrl) -> None:
    overrides = [*CLASSIC, "checkpoint.every=0"]
    MtrlHere(mtrl.folder)("train", *overrides, "run_dir=uninterrupted")
    process = mtrl.start("train", *overrides, "run_dir=run")
    metrics = mtrl.folder / "run" / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 143, output + errors
    assert json.loads((mtrl.folder / "run" / "run.json").read_text())["status"] == "stopped"
    assert "mtrl resume" in output
    MtrlHere(mtrl.folder)("resume", "run")
    assert model(mtrl.folder / "run") == model(mtrl.folder / "uninterrupted")
    assert learning_rows(mtrl.folder / "run") == learning_rows(mtrl.folder / "uninterrupted")
    assert json.loads((mtrl.folder / "run" / "run.json").read_text())["status"] == "completed"


def short(here: MtrlHere, *overrides: str) -> Path:
    here("train", *CLASSIC, "steps_per_task=480", "run_dir=run", *overrides)
    return here.folder / "run"


def test_completed_run_is_reported_and_its_budget_may_be_raised(here: MtrlHere) -> None:
    run = short(here)
    before = model(run)
    assert "completed" in here("resume", "run").stdout
    assert model(run) == before
    here("resume", "run", "steps_per_task=640")
    assert (run / "checkpoints" / "latest").read_text().strip() == "640"
    assert model(run) != before


def test_other_overrides_are_refused(here: MtrlHere) -> None:
    short(here)
    refused = here("resume", "run", "agent.n_step=2", code=2)
    assert "agent.n_step" in refused.stderr
    assert "steps_per_task" in here("resume", "run", "steps_per_task=100", code=2).stderr


def test_damaged_latest_checkpoint_falls_back_and_ends_with_the_same_bytes(here: MtrlHere) -> None:
    run = short(here)
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


def test_task_added_to_a_trained_run_is_refused(here: MtrlHere) -> None:
    run = short(here, "env.tasks=[CartPole-v1,Acrobot-v1]")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("- Acrobot-v1", "- Acrobot-v1\n  - MountainCar-v0"))
    for command in ("resume", "eval"):
        refused = here(command, "run", *(["steps_per_task=640"] if command == "resume" else []), code=2)
        assert len(refused.stderr.strip().splitlines()) <= 2, refused.stderr
        assert "MountainCar-v0" in refused.stderr, refused.stderr


def test_run_without_saved_replay_refills_the_replay(here: MtrlHere) -> None:
    run = short(here, "checkpoint.replay=false")
    assert not list((run / "checkpoints").glob("replay/*"))
    assert "with an empty replay" in here("resume", "run", "steps_per_task=800").stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = {row["step"]: row["updates"] for row in rows}
    assert updates[560] == updates[480]
    assert updates[800] > updates[480]
