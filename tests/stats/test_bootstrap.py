"""Bootstrap intervals and aggregates over tasks: known answers, and properties of the resamples."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl_cli.stats.bootstrap import Estimate, bootstrap_mean_ci, draw, estimates, interval, over_tasks, trimmed_means


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    values = [[1, 2, 3, 4, 5, 6, 7, 1000], [4, 1000, 5, -1000, 5, 4, -1, 6]]
    assert trimmed_means(np.array(values, float)).tolist() == [(3 + 4 + 5 + 6) / 4, (4 + 4 + 5 + 5) / 4]
    assert trimmed_means(np.array([[2.0, 4.0, 9.0]])) == 5.0, "a quarter of three values is rounded down to none"


def test_interval_of_a_mean_agrees_with_the_normal_approximation():
    returns = np.random.default_rng(1).normal(10, 2, size=400)
    low, high = bootstrap_mean_ci(returns)
    error = returns.std() / np.sqrt(returns.size)
    assert low == pytest.approx(returns.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(returns.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_mean_ci(returns) == (low, high)
    assert bootstrap_mean_ci([5.0]) == (5.0, 5.0)


def test_aggregates_over_tasks_equal_hand_computed_values():
    scores = {"a": [0.0, 2.0], "b": [4.0, 4.0], "c": [-1.0, 1.0]}
    result = over_tasks(scores)
    assert result["mean"] == pytest.approx((1 + 4 + 0) / 3)
    assert result["median"] == 1.0
    assert result["min"] == 0.0
    assert result["iqm"] == pytest.approx((0 + 1 + 2 + 4) / 4), "of six episodes, the lowest and the highest are dropped"
    json.dumps(result, allow_nan=False)


def test_bootstrap_resamples_within_tasks_only():
    """Equal episodes within every task give an interval of zero width, although the tasks differ."""
    result = over_tasks({"a": [0.0] * 5, "b": [10.0] * 3})
    assert result["ci"]["mean"] == [5.0, 5.0]
    assert result["ci"]["min"] == [0.0, 0.0]


def test_without_scores_there_are_no_aggregates():
    assert over_tasks({}) == {}


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_intervals_are_ordered_and_within_the_scores(scores):
    result = over_tasks(scores)
    flat = [value for values in scores.values() for value in values]
    for name in ("mean", "median", "iqm", "min"):
        low, high = result["ci"][name]
        assert low <= high
        assert min(flat) - 1e-6 <= low
        assert high <= max(flat) + 1e-6


def test_draws_depend_only_on_the_shapes_and_the_seed():
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


def test_statistic_that_is_undefined_for_some_resamples_has_no_interval():
    values = np.array([1.0, -1.0, 3.0])

    def statistics(rows):
        means = values[rows].mean(axis=1)
        return np.column_stack([means, np.sqrt(np.where(means >= 0, means, np.nan))])

    mean, root = estimates(statistics, (3,))
    assert (mean.value, root) == (1.0, Estimate(1.0))
    assert mean.low < 1 < mean.high


def test_end_of_an_interval_may_be_infinite():
    """One of two seeds reaches the threshold; a resample of only the other seed never does."""
    (found,) = estimates(lambda rows: np.array([100.0, np.inf])[rows].mean(axis=1)[:, None], (2,), method="nearest")
    assert found == Estimate(np.inf, 100.0, np.inf)


def test_interval_agrees_with_the_quantiles_of_all_resamples():
    """Four seeds have 256 equally likely resamples. The interval agrees with their quantiles within the error of 2,000 draws."""
    values = np.array([0.0, 1.0, 5.0, 12.0])
    means = [values[list(rows)].mean() for rows in itertools.product(range(4), repeat=4)]
    low, high = interval(lambda rows: values[rows].mean(axis=1), draw((4,)))
    assert np.quantile(means, 0.01) <= low <= np.quantile(means, 0.04)
    assert np.quantile(means, 0.96) <= high <= np.quantile(means, 0.99)
