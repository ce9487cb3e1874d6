"""The limit by hand-worked numbers, and parts that are made so slow that their rates are known."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.throughput import Meter, between_rows, limit, shares_of_limit
from tests.helpers.command import MtrlHere
from tests.helpers.loops import loop_of

SMALL = ["env=classic_pack", "network.hidden=[16,16]", "device=cpu"]
# Seconds of a tick of 3 tasks x 8 environments, for which one update is due; what they really do comes on top.
EMULATING, ACTING, LEARNING = 0.02, 0.015, 0.04
STEPS = 24


def test_on_shared_cores_the_times_of_the_parts_add_up() -> None:
    # A step takes 1/100 + 1/200 + 1/50 s = 35 ms.
    assert limit(100.0, 200.0, 50.0, shared_cores=True) == pytest.approx(1 / 0.035)
    assert shares_of_limit(100.0, 200.0, 50.0) == pytest.approx({"emulators": 10 / 35, "acting": 5 / 35, "learning": 20 / 35})


def test_with_a_device_of_its_own_the_slower_side_decides() -> None:
    # The device alone: 1/200 + 1/50 s = 25 ms a step, 40 steps/s.
    assert limit(100.0, 200.0, 50.0, shared_cores=False) == pytest.approx(40.0)
    assert limit(30.0, 200.0, 50.0, shared_cores=False) == pytest.approx(30.0)


def test_a_row_tells_rates_limit_and_share() -> None:
    # 600 steps in 10 s: 2 s of emulators, 1 s of acting, 6 s of learning, a second of all else.
    seconds = {"act": 1.0, "env": 2.0, "learn": 6.0, "log": 0.5}
    metrics = between_rows(seconds, steps=600, learned=600, per_update=60, rate=60.0)
    assert metrics == pytest.approx(
        {"perf/emulators": 300.0, "perf/acting": 600.0, "perf/learning": 100.0, "perf/limit": 600 / 9, "perf/share": 0.9}
    )


def test_a_row_leaves_out_what_it_cannot_tell() -> None:
    seconds = {"act": 1.0, "env": 2.0, "learn": 0.001, "log": 0.5}
    assert set(between_rows(seconds, steps=600, learned=0, per_update=60, rate=60.0)) == {"perf/emulators", "perf/acting"}
    # Learning began half-way: how fast it is is known, how fast a run with all its updates would be is not what this row shows.
    half = between_rows(seconds | {"learn": 3.0}, steps=600, learned=300, per_update=60, rate=60.0)
    assert half["perf/learning"] == pytest.approx(100.0)
    assert "perf/limit" not in half
    assert "perf/share" not in half
    # The last update of a row may come with the next one's first tick.
    assert "perf/share" in between_rows(seconds | {"learn": 3.0}, steps=600, learned=560, per_update=60, rate=60.0)


def test_the_measured_loop_makes_just_the_updates_that_are_due() -> None:
    """4 samples an update, 1 a step, 2 environments of each of 3 tasks: an update every second tick."""
    loop = loop_of(learning_starts=0)
    loop.reset()
    meter = Meter(loop, seed=0)
    meter.fill(20)
    meter.warm_up()
    first = loop.step
    for _ in range(3):
        meter.round(0.1)
    steps_in_loop = sum(rate for rate in meter.measured.rates["loop"]) / 3 * meter.measured.loop_seconds / 3
    assert meter.measured.loop_updates * 4 == pytest.approx(steps_in_loop, rel=0.3)
    assert loop.step - first >= meter.measured.loop_updates * 4
    assert sum(meter.measured.split.values()) == pytest.approx(1.0)
    assert all(len(rates) == 3 and min(rates) > 0 for rates in meter.measured.rates.values())
    list(islice(loop.ticks(), 5))  # it is still a loop that can go on


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part takes a known time at the least."""

    def slow(owner: type, name: str, seconds: float) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def slower(*arguments: Any) -> Any:
            time.sleep(seconds)
            return original(*arguments)

        monkeypatch.setattr(owner, name, slower)

    slow(VectorTasks, "recv", EMULATING)
    slow(EpsilonGreedy, "choose", ACTING)
    slow(Learner, "update", LEARNING)


@pytest.mark.usefixtures("slowed")
def test_rates_follow_from_how_slow_parts_are_and_agree_with_a_real_run(here: MtrlHere) -> None:
    measured = json.loads(here("bench", *SMALL, "--seconds", "3", "--json").stdout)
    highest = {"emulators": STEPS / EMULATING, "acting": STEPS / ACTING, "learning": STEPS / LEARNING}
    for part, rate in highest.items():
        assert 0.4 * rate < measured[part] <= rate * 1.001, part
    parts = [measured[part] for part in highest]
    assert measured["limit"] == pytest.approx(1 / sum(1 / each for each in parts))
    assert measured["share"] == pytest.approx(measured["loop"] / measured["limit"])
    assert 0.7 < measured["share"] < 1.2
    assert max(("env", "act", "learn"), key=lambda part: measured["split"][part]) == "learn"
    assert measured["limited_by"].startswith("learning is ")

    here("train", *SMALL, "steps_per_task=480", "agent.learning_starts=80", "eval.episodes=1", "eval.max_steps=5", "log.every=160",
         "log.diagnostics=0", "run_dir=run")  # fmt: skip
    rows = [json.loads(line) for line in (here.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "perf/steps_per_second" in row][-1]
    for part in highest:
        assert last[f"perf/{part}"] == pytest.approx(measured[part], rel=0.5), part
    assert last["perf/steps_per_second"] == pytest.approx(measured["loop"], rel=0.5)
    assert last["perf/limit"] == pytest.approx(measured["limit"], rel=0.5)
    assert last["perf/share"] == pytest.approx(last["perf/steps_per_second"] / last["perf/limit"])
    assert 0.6 < last["perf/share"] < 1.05
