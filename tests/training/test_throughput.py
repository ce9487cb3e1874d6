"""Throughput: the limit against hand-computed values, and rates of parts with known delays."""

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
# Added seconds per tick of 3 tasks x 8 environments, with one update per tick; the actual work takes additional time.
EMULATING, ACTING, LEARNING = 0.02, 0.015, 0.04
STEPS = 24


def test_times_of_parts_add_up_on_shared_cores() -> None:
    # A step takes 1/100 + 1/200 + 1/50 s = 35 ms.
    assert limit(100.0, 200.0, 50.0, shared_cores=True) == pytest.approx(1 / 0.035)
    assert shares_of_limit(100.0, 200.0, 50.0) == pytest.approx({"emulators": 10 / 35, "acting": 5 / 35, "learning": 20 / 35})


def test_slower_side_limits_the_rate_with_a_separate_device() -> None:
    # On the device: 1/200 + 1/50 s = 25 ms per step, 40 steps/s.
    assert limit(100.0, 200.0, 50.0, shared_cores=False) == pytest.approx(40.0)
    assert limit(30.0, 200.0, 50.0, shared_cores=False) == pytest.approx(30.0)


def test_row_has_rates_limit_and_fraction_of_the_limit() -> None:
    # 600 steps in 10 s: 2 s emulators, 1 s acting, 6 s learning, 1 s other.
    seconds = {"act": 1.0, "env": 2.0, "learn": 6.0, "log": 0.5}
    metrics = between_rows(seconds, steps=600, learned=600, per_update=60, rate=60.0)
    assert metrics == pytest.approx(
        {"perf/emulators": 300.0, "perf/acting": 600.0, "perf/learning": 100.0, "perf/limit": 600 / 9, "perf/share": 0.9}
    )


def test_row_omits_unknown_metrics() -> None:
    seconds = {"act": 1.0, "env": 2.0, "learn": 0.001, "log": 0.5}
    assert set(between_rows(seconds, steps=600, learned=0, per_update=60, rate=60.0)) == {"perf/emulators", "perf/acting"}
    # Learning started half-way: the learning rate in steps/s is known, the limit of a run with all updates is not.
    half = between_rows(seconds | {"learn": 3.0}, steps=600, learned=300, per_update=60, rate=60.0)
    assert half["perf/learning"] == pytest.approx(100.0)
    assert "perf/limit" not in half
    assert "perf/share" not in half
    # The last update of a row may be made in the first tick of the next row.
    assert "perf/share" in between_rows(seconds | {"learn": 3.0}, steps=600, learned=560, per_update=60, rate=60.0)


def test_measured_loop_makes_exactly_the_due_updates() -> None:
    """4 samples per update, 1 per step, 2 environments per task: one update every second tick."""
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
    list(islice(loop.ticks(), 5))  # the loop can still be used


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a known delay to each part."""

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
def test_rates_match_known_delays_and_agree_with_a_real_run(here: MtrlHere) -> None:
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
