"""Training in one process: the speed in rows of metrics, and the report of a lost rank."""

from __future__ import annotations

import json
import signal
from functools import partial
from typing import Any

import pytest

from mtrl_cli.commands import trainer
from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.errors import RanksLost, print_error
from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.speed import SpeedMeter
from tests.helpers.command import MtrlHere
from tests.helpers.tiny_runs import TINY, rows

PQN = [
    "env=classic_pack",
    "agent=pqn",
    "env.num_envs=4",
    "agent.rollout_length=8",
    "agent.epochs=2",
    "agent.minibatches=4",
    "agent.overlap=false",
    "steps_per_task=240",
    "network.hidden=[16,16]",
    "eval.every=100",
    "eval.episodes=1",
    "eval.max_steps=20",
    "checkpoint.every=100",
    "log.every=20",
    "log.diagnostics=80",
    "device=cpu",
]


def test_speed_of_pqn_is_that_of_whole_rollouts_in_every_row(here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake clock: each tick takes 0.1 s and each update 1 s. A rollout is 96 steps of all tasks and 8 updates in 8.8 s."""
    seconds = 0.0

    def slow_down(owner: type, name: str, duration: float) -> None:
        original = getattr(owner, name)

        def slower(*arguments: Any) -> Any:
            nonlocal seconds
            seconds += duration
            return original(*arguments)

        monkeypatch.setattr(owner, name, slower)

    slow_down(VectorTasks, "recv", 0.1)
    slow_down(Learner, "update", 1.0)
    monkeypatch.setattr(trainer, "SpeedMeter", partial(SpeedMeter, now=lambda: seconds))
    here("train", *PQN, "run_dir=run")
    speeds = {row["step"]: row for row in rows(here.folder / "run") if "perf/steps_per_second" in row}
    assert list(speeds) == list(range(20, 241, 20))
    # The first burst is made in the tick to step 40; the second, in the tick to step 72, completes the first measured rollout.
    for step, row in speeds.items():
        if step >= 80:
            assert row["perf/steps_per_second"] == pytest.approx(96 / 8.8), step
            assert row["perf/frames_per_second"] == pytest.approx(96 / 8.8), step
            assert row["perf/updates_per_second"] == pytest.approx(8 / 8.8), step


def test_lost_rank_is_reported_once_while_signals_are_only_recorded(here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun sends SIGTERM as soon as a rank is gone: with the default handler, it would end this process before the error is printed."""
    handlers: list[Any] = []

    def lose(self: Ranks, number: int) -> int:
        raise RanksLost("rank 1 of 2 is gone")

    def report(message: str) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        print_error(message)

    monkeypatch.setattr(Ranks, "largest", lose)
    monkeypatch.setattr(trainer, "print_error", report)
    failed = here("train", *TINY, "run_dir=run", code=1)
    assert [line for line in failed.stderr.splitlines() if line.startswith("mtrl: error")] == ["mtrl: error: rank 1 of 2 is gone"]
    assert [handler.__name__ for handler in handlers] == ["_handle"]
    assert json.loads((here.folder / "run" / "run.json").read_text())["status"] == "failed"
