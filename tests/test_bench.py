"""The benchmarks measure what they say: rates worked out by hand, and commands that the configuration accepts."""

from __future__ import annotations

import pytest

import bench_first_step
from bench import Figure
from bench_sb3 import ALL, ONE, Side, overrides, steady_rates
from conftest import Mtrl
from results_table import interval_over_runs


def test_rates_are_total_work_over_total_time_after_the_warm_up() -> None:
    rows = [
        {"step": 100, "updates": 0, "perf/steps_per_second": 9999.0},
        {"step": 200, "updates": 10, "perf/steps_per_second": 1.0},  # compiles in here
        {"step": 300, "updates": 20, "perf/steps_per_second": 100.0},  # 200 steps of 2 tasks: 2 s
        {"step": 500, "updates": 40, "perf/steps_per_second": 400.0},  # 400 steps: 1 s
        {"step": 500, "eval/return/pong": -21.0},
    ]
    rates = steady_rates(rows, skipped=200, tasks=2, batch_size=80)
    assert rates == pytest.approx({"steps_per_second": 200.0, "updates_per_second": 10.0, "samples_per_step": 8.0})


@pytest.mark.parametrize("side", [ONE, ALL], ids=["one game", "eight games"])
def test_the_benchmarked_command_is_a_valid_one(side: Side, mtrl: Mtrl) -> None:
    resolved = mtrl("train", "--dry-run", *overrides(side, 4096, str(mtrl.folder / "run"))).stdout
    assert "double: false" in resolved
    assert "mtrl_cli.networks.heads.PlainHead" in resolved


def test_a_figure_knows_on_which_side_of_its_bar_it_lies() -> None:
    assert Figure("speed", 2.3, "times", 2.2, at_least=True).met
    assert not Figure("speed", 2.1, "times", 2.2, at_least=True).met
    assert Figure("memory", 7062, "bytes", 7300, at_least=False).met
    assert not Figure("memory", 7301, "bytes", 7300, at_least=False).met


def test_an_interval_over_runs_is_wider_than_that_of_their_games() -> None:
    """Runs that differ count as the chance in training: two runs of games alike within each, drawn anew, may both be the same one."""
    assert interval_over_runs([[1.0, 1.0], [1.0, 1.0]], resamples=100) == (1.0, 1.0)
    low, high = interval_over_runs([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]], resamples=1000)
    assert (low, high) == (1.0, 3.0)


def test_first_steps_stand_beside_their_bars() -> None:
    slow, quick = ({"first_step": seconds, "emulators": 1.0, "first_update": seconds + 1} for seconds in (3.1, 2.9))
    eager = {way: bench_first_step.table({"classic_pack": {"eager": found}}) for way, found in (("slow", slow), ("quick", quick))}
    assert "3 MISSED" in eager["slow"]
    assert "3 met" in eager["quick"]
    assert "60 met" in bench_first_step.table({"classic_pack": {"compiled, first run": slow}})
