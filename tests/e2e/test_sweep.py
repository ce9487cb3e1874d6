"""`mtrl sweep` from the command line to its end: real runs, small ones."""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.config import compose
from mtrl_cli.sweeps import plan as sweep_plan
from tests.helpers.command import Mtrl

SMALL = ["env=classic_pack", "env.tasks=[CartPole-v1]", "steps_per_task=200", "agent.learning_starts=100", "eval.episodes=1"]
SMALL += ["eval.max_steps=20", "eval.test_episodes=0", "device=cpu", "compile=false", "log.diagnostics=0"]
PATIENCE = 240


def trials(sweep: Path) -> list[dict[str, Any]]:
    return [json.loads((path / "trial.json").read_text()) for path in sorted((sweep / "trials").iterdir())]


def test_a_grid_with_a_combination_that_cannot_be(mtrl: Mtrl, tmp_path: Path) -> None:
    """Four trials, one of which makes no sense: it fails for good and is named, the others end, and the best is a command that works."""
    words = [*SMALL, "network/head=dueling,c51", "agent/value_scale=clip,none", "launcher.jobs=2", "run_dir=s"]
    before = mtrl("sweep", *words, "--dry-run").stdout
    assert "4 trials, a grid" in before
    assert not (tmp_path / "s").exists()
    done = mtrl("sweep", *words, code=1)
    assert "1 of 4 trials failed" in done.stderr
    found = trials(tmp_path / "s")
    assert [each["state"] for each in found] == ["completed", "completed", "completed", "failed"]
    assert "requires bounded returns" in found[3]["why"]
    assert "failed: 1 of 4 trials (3)" in done.stdout
    best = max(found[:3], key=lambda each: each["value"])
    (command,) = (line for line in done.stdout.splitlines() if line.startswith("mtrl train "))
    assert shlex.split(command) == shlex.split(best["command"])
    for each in found[:3]:
        assert dict(word.split("=", 1) for word in each["overrides"]) == each["values"]
        # Each is an ordinary run, of the configuration that its own command makes; its worker decided on what was auto.
        asked = dict(compose.flat(compose.compose_training(shlex.split(each["command"])[2:])))
        ran = dict(compose.flat(compose.load(tmp_path / "s" / "trials" / f"{each['number']:04d}" / "config.yaml")))
        assert {key for key in asked if asked[key] != "auto" and asked[key] != ran[key]} == {"run_dir"}
    # What is over is not done again: neither by the same command nor by a resume, which says the same at its end.
    times = [(tmp_path / "s" / "trials" / f"{number:04d}" / "metrics.jsonl").stat().st_mtime_ns for number in range(3)]
    again = mtrl("sweep", *words, code=1)
    resumed = mtrl("resume", "s", code=1)
    assert command in again.stdout
    assert command in resumed.stdout
    assert times == [(tmp_path / "s" / "trials" / f"{number:04d}" / "metrics.jsonl").stat().st_mtime_ns for number in range(3)]
    # A dry run tells how it went.
    listed = [line.split() for line in mtrl("sweep", *words, "--dry-run").stdout.splitlines()]
    assert ["0", "completed", f"{found[0]['value']:.3f}"] in [line[:3] for line in listed]
    assert ["3", "failed", "-", "-"] in [line[:4] for line in listed]
    # Another sweep does not go on there.
    refused = mtrl("sweep", *words, "seed=3", code=2)
    assert "holds a sweep with other overrides of seed" in refused.stderr


def test_a_search_that_is_stopped_and_given_more_trials(mtrl: Mtrl, tmp_path: Path) -> None:
    words = [*SMALL, "optimizer.lr=tag(log,interval(1e-5,1e-3))", "agent.n_step=interval(1,4)", "sweep.trials=3", "run_dir=s"]
    process = mtrl.start("sweep", *words)
    deadline = time.monotonic() + PATIENCE
    first = tmp_path / "s" / "trials" / "0000" / "trial.json"
    while not (first.exists() and json.loads(first.read_text())["state"] == "completed") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, stderr
    assert "mtrl resume" in stdout
    before = trials(tmp_path / "s")[0]
    done = mtrl("resume", "s", "sweep.trials=4", "launcher.jobs=2")
    found = trials(tmp_path / "s")
    assert found[0] == before, "what is done is not done again"
    assert [each["state"] for each in found] == ["completed"] * 4
    for each in found:
        assert 1e-5 <= float(each["values"]["optimizer.lr"]) <= 1e-3
        assert each["values"]["agent.n_step"] in ("1", "2", "3", "4")
    assert len({each["values"]["optimizer.lr"] for each in found}) == 4
    best = max(found, key=lambda each: each["value"])
    assert best["command"] in done.stdout
    listed = mtrl("sweep", *words, "--dry-run").stdout
    assert "4 trials, sampled by tpe" in listed
    assert listed.count(" completed ") == 4


@pytest.mark.parametrize("words", [["resume", "s", "seed=3"], ["resume", "s", "sweep.trials=1"], ["resume", "s", "launcher=loca"]])
def test_a_resume_that_is_refused_changes_nothing(mtrl: Mtrl, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "s").mkdir()
    sweep_plan.save(sweep_plan.make([*SMALL, "seed=1,2"]), tmp_path / "s", ["mtrl", "sweep"])
    before = (tmp_path / "s" / "sweep.json").read_bytes()
    assert mtrl(*words, code=2).stderr.startswith("mtrl: error: ")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["sweep.json"]
    assert (tmp_path / "s" / "sweep.json").read_bytes() == before
