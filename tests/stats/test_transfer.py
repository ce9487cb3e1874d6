"""Transfer metrics of constructed curves, and their intervals over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from mtrl_cli.stats.bootstrap import Estimate
from mtrl_cli.stats.transfer import METRICS, area, area_ratio, compare, steps_to_threshold

STEPS = np.array([0.0, 100.0, 200.0, 400.0])


def steps_to(steps: np.ndarray, values: np.ndarray, threshold: float) -> float:
    return float(steps_to_threshold(steps, values[None], np.array([threshold]))[0])


@pytest.mark.parametrize(
    ("values", "threshold", "steps"),
    [
        ([0.0, 0.5, 1.0, 1.0], 0.5, 100.0),
        ([0.0, 0.5, 1.0, 1.0], 0.25, 50.0),  # halfway between two evaluations
        ([0.0, 0.2, 0.4, 1.0], 0.7, 300.0),
        ([0.6, 0.2, 0.4, 1.0], 0.5, 0.0),  # before any training
        ([0.0, 0.8, 0.2, 1.0], 0.8, 100.0),  # the first time counts
        ([0.0, 0.2, 0.4, 0.6], 0.7, float("inf")),
        ([-200.0, -200.0, -150.0, -100.0], -125.0, 300.0),
    ],
)
def test_steps_to_a_threshold(values: list[float], threshold: float, steps: float) -> None:
    assert steps_to(STEPS, np.array(values), threshold) == pytest.approx(steps)


def test_steps_to_a_threshold_agree_with_a_fine_interpolation() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        values = random.normal(size=4)
        threshold = float(random.normal())
        step = steps_to(STEPS, values, threshold)
        fine = np.linspace(0, 400, 40_001)
        above = fine[np.interp(fine, STEPS, values) >= threshold]
        assert (step == float("inf")) if not above.size else step == pytest.approx(above[0], abs=0.02)


def test_area_is_the_mean_of_trapezoids() -> None:
    """Trapezoids: 25 + 75 + 200 over 400 steps."""
    curve = np.array([0.0, 0.5, 1.0, 1.0])
    assert area(STEPS, curve) == pytest.approx(0.75)
    assert area_ratio(STEPS, 2 * curve, curve) == pytest.approx(2.0)
    assert area_ratio(STEPS, np.full(4, 0.75), curve) == pytest.approx(1.0)
    assert np.isnan(area_ratio(STEPS, curve, -curve))
    assert np.isnan(area_ratio(STEPS, curve, 0 * curve))


def test_equal_runs_gain_nothing() -> None:
    curves = np.array([[0.0, 0.3, 0.6, 0.9], [0.1, 0.2, 0.5, 0.7], [0.0, 0.4, 0.5, 0.6]])
    found = compare(STEPS, curves, curves, curves[:, -1], curves[:, -1])
    assert found["jump_start"] == Estimate(0.0, 0.0, 0.0)
    assert found["area_ratio"] == Estimate(*[pytest.approx(1.0)] * 3)
    assert found["final_difference"] == Estimate(0.0, 0.0, 0.0)
    assert found["steps_to_scratch"].value == pytest.approx(400.0)


def test_metrics_of_two_seeds_equal_hand_computed_values() -> None:
    """Mean curves: 0.3, 0.5, 0.7, 0.9 and 0, 0.1, 0.3, 0.6. The first reaches 0.6 halfway between the evaluations at 100 and 200."""
    fine_tuned = np.array([[0.2, 0.4, 0.6, 0.8], [0.4, 0.6, 0.8, 1.0]])
    scratch = np.array([[0.0, 0.1, 0.2, 0.5], [0.0, 0.1, 0.4, 0.7]])
    found = compare(STEPS, fine_tuned, scratch, np.array([0.9, 0.7]), np.array([0.4, 0.6]))
    assert found["zero_shot"].value == pytest.approx(0.3)
    assert found["jump_start"].value == pytest.approx(0.3)
    assert (found["jump_start"].low, found["jump_start"].high) == (pytest.approx(0.2), pytest.approx(0.4))
    assert found["steps_to_scratch"].value == pytest.approx(150.0)
    # Each seed alone: 0.5 is between 0.4 at 100 and 0.6 at 200; 0.7 is between 0.6 at 100 and 0.8 at 200.
    assert (found["steps_to_scratch"].low, found["steps_to_scratch"].high) == (pytest.approx(150.0), pytest.approx(150.0))
    assert found["area_ratio"].value == pytest.approx((40 + 60 + 160) / (5 + 20 + 90))
    assert found["final_fine_tuned"].value == pytest.approx(0.8)
    assert found["final_scratch"].value == pytest.approx(0.5)
    assert found["final_difference"] == Estimate(pytest.approx(0.3), pytest.approx(0.1), pytest.approx(0.5))


def test_areas_are_measured_above_random_play() -> None:
    """Returns of -200 to -100: 0 to 100 above random."""
    scratch = np.array([[-200.0, -150.0, -100.0, -100.0]])
    found = compare(STEPS, (scratch + 200) / 2 - 200, scratch, scratch[:, -1], scratch[:, -1], random=-200.0)
    assert found["area_ratio"] == Estimate(pytest.approx(0.5))


def test_one_seed_has_no_interval_and_steps_to_an_unreached_threshold_are_infinite() -> None:
    fine_tuned, scratch = np.array([[0.0, 0.1, 0.1, 0.1]]), np.array([[0.0, 0.1, 0.2, 0.3]])
    found = compare(STEPS, fine_tuned, scratch, fine_tuned[:, -1], scratch[:, -1])
    assert list(found) == list(METRICS)
    assert {(each.low, each.high) for each in found.values()} == {(None, None)}
    assert found["steps_to_scratch"] == Estimate(np.inf)
