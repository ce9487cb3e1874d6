from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl_cli.stats.bootstrap import bootstrap_mean_ci, iqm, over_tasks


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm([1, 2, 3, 4, 5, 6, 7, 1000]) == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert iqm([[4, 1000], [5, -1000]]) == 4.5
    assert iqm([2, 4, 9]) == 5.0, "a quarter of three values is rounded down to none"
    with pytest.raises(ValueError):
        iqm([])


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    returns = np.random.default_rng(1).normal(10, 2, size=400)
    low, high = bootstrap_mean_ci(returns, resamples=4000)
    error = returns.std() / np.sqrt(returns.size)
    assert low == pytest.approx(returns.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(returns.mean() + 1.96 * error, abs=0.2 * error)


def test_bootstrap_is_reproducible_and_narrower_at_less_confidence():
    returns = [1.0, 2.0, 3.0, 10.0]
    wide = bootstrap_mean_ci(returns, seed=3)
    narrow = bootstrap_mean_ci(returns, confidence=0.5, seed=3)
    assert wide == bootstrap_mean_ci(returns, seed=3)
    assert wide[0] < narrow[0] < np.mean(returns) < narrow[1] < wide[1]
    assert bootstrap_mean_ci([5.0]) == (5.0, 5.0)
    with pytest.raises(ValueError):
        bootstrap_mean_ci([])


def test_aggregates_over_tasks_known_answer():
    scores = {"a": [0.0, 2.0], "b": [4.0, 4.0], "c": [-1.0, 1.0]}
    result = over_tasks(scores)
    assert result["mean"] == pytest.approx((1 + 4 + 0) / 3)
    assert result["median"] == 1.0
    assert result["min"] == 0.0
    assert result["iqm"] == pytest.approx((0 + 1 + 2 + 4) / 4), "of six episodes, the lowest and the highest are dropped"
    json.dumps(result, allow_nan=False)


def test_bootstrap_resamples_within_tasks_only():
    """With equal episodes in every task there is nothing to resample, however far apart the tasks are."""
    result = over_tasks({"a": [0.0] * 5, "b": [10.0] * 3})
    assert result["ci"]["mean"] == [5.0, 5.0]
    assert result["ci"]["min"] == [0.0, 0.0]


def test_no_task_with_a_score_gives_nothing():
    assert over_tasks({}) == {}
    with pytest.raises(ValueError, match="pong"):
        over_tasks({"pong": []})


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_intervals_hold_what_they_are_of_within_the_extremes(scores):
    result = over_tasks(scores, resamples=150)
    flat = [value for values in scores.values() for value in values]
    for name in ("mean", "median", "iqm", "min"):
        low, high = result["ci"][name]
        assert low <= high
        assert min(flat) - 1e-6 <= low
        assert high <= max(flat) + 1e-6
