from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl_cli.stats.bootstrap import Estimate, bootstrap_mean_ci, draw, estimates, interval, iqm, over_tasks


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


def test_draws_depend_on_the_shapes_and_the_seed_alone():
    seen = [tuple(chunk) for chunk in draw((3,), (2, 4), resamples=250)]
    assert [(len(x), y.shape) for x, y in seen] == [(100, (100, 2, 4)), (100, (100, 2, 4)), (50, (50, 2, 4))]
    again = draw((3,), (2, 4), resamples=250)
    assert all(np.array_equal(a, b) for one, other in zip(seen, again, strict=True) for a, b in zip(one, other, strict=True))
    assert {index for x, _ in seen for index in x.ravel()} == {0, 1, 2}
    assert {index for _, y in seen for index in y.ravel()} == {0, 1}
    in_one_chunk = next(iter(draw((3, 5), resamples=250, chunk=250)))[0]
    np.testing.assert_array_equal(np.concatenate([rows for (rows,) in draw((3, 5), resamples=250)]), in_one_chunk)


def test_strata_are_drawn_independently():
    ((rows,),) = draw((50, 2), resamples=1)
    assert not np.array_equal(rows[0, :, 0], rows[0, :, 1])


def test_statistic_that_some_resample_does_not_have_has_no_interval():
    values = np.array([1.0, -1.0, 3.0])

    def statistics(rows):
        means = values[rows].mean(axis=1)
        return np.column_stack([means, np.sqrt(np.where(means >= 0, means, np.nan))])

    mean, root = estimates(statistics, (3,))
    assert (mean.value, root) == (1.0, Estimate(1.0))
    assert mean.low < 1 < mean.high


def test_end_of_an_interval_may_be_infinite():
    """One of two seeds gets there: a resample of the other alone never does."""
    (found,) = estimates(lambda rows: np.array([100.0, np.inf])[rows].mean(axis=1)[:, None], (2,), method="nearest")
    assert found == Estimate(np.inf, 100.0, np.inf)


def test_interval_against_all_resamples_in_turn():
    """Of four seeds there are 256 equally likely resamples: their quantiles, within the chance of 2,000 draws."""
    values = np.array([0.0, 1.0, 5.0, 12.0])
    means = [values[list(rows)].mean() for rows in itertools.product(range(4), repeat=4)]
    low, high = interval(lambda rows: values[rows].mean(axis=1), draw((4,)))
    assert np.quantile(means, 0.01) <= low <= np.quantile(means, 0.04)
    assert np.quantile(means, 0.96) <= high <= np.quantile(means, 0.99)
