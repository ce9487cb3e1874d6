"""The benchmark scripts: rates against hand-computed values, and valid commands."""

from __future__ import annotations

import pytest
import yaml

import bench_first_step
import bench_limit
from bench import Measurement, metrics
from bench_sb3 import ALL, ONE, PQN, Side, overrides, steady_rates
from results_table import interval_over_runs
from tests.helpers.command import Mtrl


def test_rates_are_total_work_over_total_time_after_warm_up() -> None:
    rows = [
        {"step": 100, "updates": 0, "perf/steps_per_second": 9999.0},
        {"step": 200, "updates": 10, "perf/steps_per_second": 1.0},  # includes compilation
        {"step": 300, "updates": 20, "perf/steps_per_second": 100.0},  # 200 steps of 2 tasks: 2 s
        {"step": 500, "updates": 40, "perf/steps_per_second": 400.0},  # 400 steps: 1 s
        {"step": 500, "eval/return/pong": -21.0},
    ]
    rates = steady_rates(rows, skipped=200, tasks=2, batch_size=80)
    assert rates == pytest.approx({"steps_per_second": 200.0, "updates_per_second": 10.0, "samples_per_step": 8.0})


@pytest.mark.parametrize("side", [ONE, ALL, PQN], ids=["one game", "eight games", "pqn"])
def test_benchmarked_command_is_valid(side: Side, mtrl: Mtrl) -> None:
    resolved = yaml.safe_load(mtrl("train", "--dry-run", *overrides(side, 4096, str(mtrl.folder / "run"))).stdout)
    assert resolved["network"]["head"]["_target_"] == "mtrl_cli.networks.heads.PlainHead"
    agent = resolved["agent"]
    if side is PQN:
        # 4 samples per step, in minibatches of the size in the table.
        assert (agent["epochs"], agent["rollout_length"] * resolved["env"]["num_envs"] // agent["minibatches"]) == (4, side.batch_size)
    else:
        assert (agent["double"], agent["n_step"], agent["samples_per_step"], agent["batch_size"]) == (False, 1, 8.0, side.batch_size)


@pytest.mark.parametrize("side", bench_limit.SIDES)
def test_configurations_of_the_limit_benchmark_are_valid(side: str, mtrl: Mtrl) -> None:
    resolved = yaml.safe_load(mtrl("train", "--dry-run", *bench_limit.SIDES[side]).stdout)
    assert len(resolved["env"]["tasks"]) * resolved["env"]["num_envs"] == {"pqn": 128, "dqn": 64}["pqn" if "pqn" in side else "dqn"] or (
        resolved["env"]["name"] == "minatar_pack"
    )


def test_every_performance_target_is_measured() -> None:
    ways = {"eager": {"first_step": 2.0, "emulators": 1.0, "first_update": 3.0}}
    sides = {side: {"share": 0.95, "loop": 3999.0} for side in bench_limit.SIDES}
    ratio = {"mtrl, breakout": 3.6, "mtrl, eight games": 2.9, "mtrl pqn, breakout": 5.6}
    weights = [{"needs": needs, "name": needs, "ratio": 1.2, "bar": 1.3} for needs in ("gram", "rows")]
    costs = {"shift": (1.12, 1.1), "blur": (1.2, 1.25), "noise": (1.05, 1.25)}
    augmentations = [{"env": "minatar_pack", "name": name, "ratio": ratio, "bar": bar} for name, (ratio, bar) in costs.items()]
    startup, memory = {"help": 0.1, "dry_run": 0.2}, {"bytes_per_transition": 7000.0}
    found = metrics(startup, {"classic_pack": ways}, memory, ratio, {"sides": sides, "eight_over_one": 0.8}, weights, augmentations)
    missed = [metric.name for metric in found if not metric.met]
    assert len(found) == 19
    assert missed == [
        "speedup over stable-baselines3 DQN, all eight games",
        "eight games relative to one game with as many environments",
        "MinAtar, dqn at 8 samples per step",
        "MinAtar, pqn at 4 samples per step",
        "update time relative to no augmentation, shift, minatar_pack",
    ]


def test_measurement_is_met_on_the_right_side_of_its_target() -> None:
    assert Measurement("speed", 2.3, "times", 2.2, at_least=True).met
    assert not Measurement("speed", 2.1, "times", 2.2, at_least=True).met
    assert Measurement("memory", 7062, "bytes", 7300, at_least=False).met
    assert not Measurement("memory", 7301, "bytes", 7300, at_least=False).met


def test_interval_over_runs_includes_the_variance_between_runs() -> None:
    """With identical episodes within each of two runs, a resample may draw the same run twice."""
    assert interval_over_runs([[1.0, 1.0], [1.0, 1.0]], resamples=100) == (1.0, 1.0)
    low, high = interval_over_runs([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]], resamples=1000)
    assert (low, high) == (1.0, 3.0)


def test_first_step_table_shows_targets() -> None:
    slow, quick = ({"first_step": seconds, "emulators": 1.0, "first_update": seconds + 1} for seconds in (3.1, 2.9))
    eager = {way: bench_first_step.table({"classic_pack": {"eager": found}}) for way, found in (("slow", slow), ("quick", quick))}
    assert "3 MISSED" in eager["slow"]
    assert "3 met" in eager["quick"]
    assert "60 met" in bench_first_step.table({"classic_pack": {"compiled, first run": slow}})
