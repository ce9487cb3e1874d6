"""`mtrl sweep` through the command line with small real runs."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest

from mtrl_cli.config import compose
from mtrl_cli.sweeps import plan as sweep_plan
from tests.helpers.command import Mtrl
from tests.helpers.sweeps import trials, until

SMALL = ["env=classic_pack", "env.tasks=[CartPole-v1]", "steps_per_task=200", "agent.learning_starts=100", "eval.episodes=1"]
SMALL += ["eval.max_steps=20", "eval.test_episodes=0", "device=cpu", "compile=false", "log.diagnostics=0"]
PATIENCE = 240


def test_grid_with_an_invalid_combination_completes_the_other_trials(mtrl: Mtrl, tmp_path: Path) -> None:
    """Of four trials, the invalid one fails and is named, the others complete, and the best is printed as a valid command."""
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
        # Each trial is a normal run with the configuration of its command; its worker resolved `auto` values.
        requested = dict(compose.flat(compose.compose_training(shlex.split(each["command"])[2:])))
        ran = dict(compose.flat(compose.load(tmp_path / "s" / "trials" / f"{each['number']:04d}" / "config.yaml")))
        assert {key for key in requested if requested[key] != "auto" and requested[key] != ran[key]} == {"run_dir"}
    # Neither the same command nor a resume repeats completed trials; both print the same summary.
    times = [(tmp_path / "s" / "trials" / f"{number:04d}" / "metrics.jsonl").stat().st_mtime_ns for number in range(3)]
    again = mtrl("sweep", *words, code=1)
    resumed = mtrl("resume", "s", code=1)
    assert command in again.stdout
    assert command in resumed.stdout
    assert times == [(tmp_path / "s" / "trials" / f"{number:04d}" / "metrics.jsonl").stat().st_mtime_ns for number in range(3)]
    # A dry run lists the results.
    listed = [line.split() for line in mtrl("sweep", *words, "--dry-run").stdout.splitlines()]
    assert ["0", "completed", f"{found[0]['value']:.3f}"] in [line[:3] for line in listed]
    assert ["3", "failed", "-", "-"] in [line[:4] for line in listed]
    # Another sweep in the same folder is refused.
    refused = mtrl("sweep", *words, "seed=3", code=2)
    assert "contains a sweep with other overrides of seed" in refused.stderr


def test_stopped_search_is_resumed_with_more_trials(mtrl: Mtrl, tmp_path: Path) -> None:
    words = [*SMALL, "optimizer.lr=tag(log,interval(1e-5,1e-3))", "agent.n_step=interval(1,4)", "sweep.trials=3", "run_dir=s"]
    process = mtrl.start("sweep", *words)
    until(lambda: [each for each in trials(tmp_path / "s")[:1] if each["state"] == "completed"], "trial 0 is not completed")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, stderr
    assert "mtrl resume" in stdout
    before = trials(tmp_path / "s")[0]
    done = mtrl("resume", "s", "sweep.trials=4", "launcher.jobs=2")
    found = trials(tmp_path / "s")
    assert found[0] == before, "completed trials are not repeated"
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
def test_refused_resume_changes_nothing(mtrl: Mtrl, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "s").mkdir()
    sweep_plan.save(sweep_plan.make([*SMALL, "seed=1,2"]), tmp_path / "s", ["mtrl", "sweep"])
    before = (tmp_path / "s" / "sweep.json").read_bytes()
    assert mtrl(*words, code=2).stderr.startswith("mtrl: error: ")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["sweep.json"]
    assert (tmp_path / "s" / "sweep.json").read_bytes() == before
