"""Differences between configurations: hand-computed results, and properties for any scores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mtrl_cli.stats.bootstrap import Estimate
from mtrl_cli.stats.sharing import data_efficiency, gain, nearest_size


def test_gain_equals_hand_computed_differences() -> None:
    ours_SK, theirs_TK = np.array([[0.5, 0.9], [0.7, 0.9]]), np.array([[0.2, 1.0], [0.2, 1.0], [0.2, 0.7]])
    found = gain(ours_SK, theirs_TK)
    # Tasks: 0.6 - 0.2 and 0.9 - 0.9. Interquartile means: the middle two of .5 .7 .9 .9; all of .2 .2 .2 .7 1 1 except one at each end.
    assert [task.value for task in found.tasks] == pytest.approx([0.4, 0.0])
    assert found.mean.value == pytest.approx(0.2)
    assert found.iqm.value == pytest.approx(0.8 - (0.2 + 0.2 + 0.7 + 1.0) / 4)


def test_intervals_agree_with_all_equally_likely_draws() -> None:
    ours_SK, theirs_TK = np.array([[0.0], [1.0]]), np.array([[0.0], [0.1]])
    draws = list(itertools.product(itertools.product([0, 1], repeat=2), repeat=2))
    means = sorted(np.mean([ours_SK[i] for i in a]) - np.mean([theirs_TK[i] for i in b]) for a, b in draws)
    found = gain(ours_SK, theirs_TK).tasks[0]
    # Each of the 16 draws is more likely than 2.5%, so the interval extends from the smallest to the largest mean.
    assert (found.low, found.high) == pytest.approx((means[0], means[-1]))


def test_runs_are_drawn_whole() -> None:
    # The two tasks of each run add up to 1, so the mean over tasks is the same for all resamples of whole runs.
    scores_SK = np.array([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
    found = gain(scores_SK, np.zeros((3, 2)))
    assert (found.mean.low, found.mean.high) == pytest.approx((0.5, 0.5))
    low, high = found.tasks[0].low, found.tasks[0].high
    assert low is not None
    assert high is not None
    assert high - low > 0.4


def test_one_run_has_no_interval_and_no_sign() -> None:
    found = gain(np.array([[0.9, 0.8]]), np.array([[0.1, 0.1], [0.2, 0.2]]))
    assert found.mean == Estimate(pytest.approx(0.7))
    assert [task.sign for task in found.tasks] == [0, 0]


def test_sign_is_nonzero_only_if_the_interval_excludes_zero() -> None:
    random = np.random.default_rng(0)
    noise_SK = 0.01 * random.standard_normal((5, 3))
    found = gain(noise_SK + np.array([0.5, 0.0, -0.5]), 0.01 * random.standard_normal((5, 3)))
    assert [found.tasks[0].sign, found.tasks[2].sign] == [1, -1]
    assert [Estimate(0.0, -0.1, 0.1).sign, Estimate(0.1, 0.0, 0.2).sign, Estimate(1.0).sign] == [0, 0, 0]


def test_exchanging_the_sides_changes_the_sign_of_the_difference() -> None:
    random = np.random.default_rng(1)
    ours_SK, theirs_TK = random.random((4, 3)), random.random((4, 3))
    there, back = gain(ours_SK, theirs_TK), gain(theirs_TK, ours_SK)
    for one, other in zip((there.mean, there.iqm, *there.tasks), (back.mean, back.iqm, *back.tasks), strict=True):
        assert one.value == pytest.approx(-other.value)
        assert one.low is not None
        assert other.high is not None
        assert one.low == pytest.approx(-other.high, abs=0.05)


def test_intervals_of_normal_scores_cover_the_true_difference() -> None:
    # A percentile bootstrap over 20 runs covers a little less than 95%.
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        found = gain(1 + random.standard_normal((20, 1)), random.standard_normal((20, 1))).mean
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1 <= found.high
    assert 0.88 < covered / 200 < 0.99


def test_data_efficiency_is_the_ratio_of_steps_to_the_baselines_final_score() -> None:
    theirs = np.array([100.0, 200.0, 400.0]), np.array([[0.0, 0.5, 0.8]])
    # `ours` reaches 0.8 after a quarter of the steps from 100 to 200.
    ours = np.array([100.0, 200.0, 300.0]), np.array([[0.7, 1.1, 1.2]])
    assert data_efficiency(ours, theirs).value == pytest.approx(400 / 125)
    assert data_efficiency(theirs, theirs).value == 1
    assert data_efficiency((ours[0], ours[1] - 0.9), theirs).value == 0  # never
    # The baseline reached its final score earlier, before its score fell.
    fallen = np.array([100.0, 200.0, 400.0]), np.array([[0.0, 0.8, 0.4]])
    assert data_efficiency(ours, fallen).value == pytest.approx(150 / 100)


def test_data_efficiency_is_computed_from_mean_curves() -> None:
    steps = np.array([0.0, 100.0])
    ours = steps, np.array([[0.0, 2.0], [0.0, 0.0]])  # the second curve alone never reaches 1
    found = data_efficiency(ours, (steps, np.array([[0.0, 1.0], [0.0, 1.0]])))
    assert found.value == 1
    assert (found.low, found.high) == (0, 2)


def test_nearest_size_is_within_five_percent() -> None:
    assert nearest_size(1000, [1100, 1049, 960]) == 2
    assert nearest_size(1000, [1051, 949]) is None
    assert nearest_size(1000, []) is None
