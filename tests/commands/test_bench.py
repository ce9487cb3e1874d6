"""`mtrl bench`: output, side effects, and signals."""

from __future__ import annotations

import json
import signal
import time

import pytest

from tests.helpers.command import Mtrl, MtrlHere

SMALL = ["env=classic_pack", "network.hidden=[16,16]", "device=cpu"]
PROMISED = {"emulators", "acting", "learning", "loop", "limit", "share", "bytes_per_transition"}


def test_json_is_the_only_output_on_stdout_and_nothing_is_written(mtrl: Mtrl) -> None:
    pasted = ["run_dir=run", "checkpoint.every=100", "eval.every=100", "log.every=10", "agent.learning_starts=5000"]
    done = mtrl("bench", *SMALL, *pasted, "--json", "--seconds", "0.5")
    result = json.loads(done.stdout)
    assert set(result) >= PROMISED
    assert all(isinstance(result[key], float) and result[key] > 0 for key in PROMISED)
    assert result["limit"] < min(result["emulators"], result["acting"], result["learning"])
    # CartPole, Acrobot and MountainCar: vectors of 6 float32, an action, a reward and flags.
    assert result["bytes_per_transition"] == pytest.approx(6 * 4 + 1 + 4 + 1, rel=0.01)
    assert result["tasks"] == ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]
    assert (result["num_envs"], result["device"], result["compile"]) == (8, "cpu", False)
    assert all(low <= result[part] <= high for part, (low, high) in result["spread"].items())
    assert sum(result["split"].values()) == pytest.approx(1.0, abs=0.02)
    assert "replay: measuring with a capacity of 4,096 transitions per task" in done.stderr
    assert list(mtrl.folder.iterdir()) == []


@pytest.mark.parametrize("more", [["replay=prioritized"], ["task_weights=pcgrad"], ["steps_per_task=2000", "replay.capacity=200"]])
def test_table_output(here: MtrlHere, more: list[str]) -> None:
    done = here("bench", *SMALL, *more, "--seconds", "0.2")
    for word in ("emulators only", "acting only", "learning only", "complete loop", "limit", "bytes per transition", "updates/s"):
        assert word in done.stdout
    assert "of the work: " in done.stdout
    assert list(here.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env=no_such"], "unknown option 'env=no_such'"),
        (["agent.nope=1"], "nope"),
        (["device=cuda:99"], "device=cuda:99"),
        (["replay.capacity=3"], "replay.capacity must be above agent.n_step"),
    ],
)
def test_invalid_configuration_is_refused(here: MtrlHere, words: list[str], message: str) -> None:
    done = here("bench", *SMALL, *words, code=2)
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1] or message in done.stderr.splitlines()[-2]
    assert "mtrl: error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_signal_ends_the_benchmark(mtrl: Mtrl) -> None:
    process = mtrl.start("bench", *SMALL, "--seconds", "120", "--json")
    assert process.stderr is not None
    while "measuring" not in (line := process.stderr.readline()):
        assert line, "ended before measuring"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)  # it would measure for 120 s
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert list(mtrl.folder.iterdir()) == []
