"""Aggregates over runs and tasks: known answers, and agreement with rliable, with intervals from the same resamples."""

from __future__ import annotations

import numpy as np
import pytest

from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats.bootstrap import draw

RESAMPLES = 200


def matrices() -> list[np.ndarray]:
    """Score matrices of several shapes: with ties, above 1, below 0."""
    random = np.random.default_rng(0)
    shapes = [(2, 1), (3, 5), (5, 8), (10, 3), (4, 26)]
    return [random.normal(0.8, 0.5, shape) for shape in shapes] + [random.integers(0, 3, (6, 4)) / 2.0]


def rows_of_rliable(shapes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    """Return the indices that rliable draws with numpy's global generator, resample by resample, for one score matrix or several."""
    np.random.seed(seed)
    drawn = [[np.random.choice(shape[0], shape, replace=True) for shape in shapes] for _ in range(RESAMPLES)]
    return [np.stack(of_matrix) for of_matrix in zip(*drawn, strict=True)]


def test_aggregates_equal_hand_computed_values() -> None:
    scores = np.array([[0.0, 1.0], [0.5, 2.0], [1.0, 0.0], [0.5, 3.0]])  # tasks' means 0.5 and 1.5
    found = score_stats.aggregates(scores)
    assert found["mean"].value == 1.0
    assert found["median"].value == 1.0
    assert found["iqm"].value == 0.75  # of 0 0 | 0.5 0.5 1 1 | 2 3
    assert found["optimality_gap"].value == pytest.approx(1 - (0 + 1 + 0.5 + 1 + 1 + 0 + 0.5 + 1) / 8)


def test_probability_of_improvement_counts_ties_as_half() -> None:
    low, high = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0], [4.0]])
    assert score_stats.probability_of_improvement(high, low).value == 1
    assert score_stats.probability_of_improvement(low, high).value == 0
    assert score_stats.probability_of_improvement(low, low).value == 0.5
    # 1 in the first task; 0.5 in the second: of four pairs one is won, one is lost, two are ties.
    x, y = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 0.0], [0.0, 1.0]])
    assert score_stats.probability_of_improvement(x, y).value == 0.75


def test_profile_is_the_fraction_of_scores_above_each_threshold() -> None:
    scores = np.array([[0.0, 0.5], [1.0, 1.0]])
    assert score_stats.profile(scores, np.array([-1.0, 0.0, 0.5, 0.75, 1.0])).tolist() == [1, 0.75, 0.5, 0.5, 0]


def test_one_run_has_no_interval() -> None:
    one, two = np.ones((1, 3)), np.ones((2, 3))
    estimates = [*score_stats.aggregates(one).values(), *score_stats.task_means(one)]
    estimates += [score_stats.probability_of_improvement(one, two), score_stats.probability_of_improvement(two, one)]
    assert {(each.low, each.high) for each in estimates} == {(None, None)}
    assert score_stats.profile_band(one, np.linspace(0, 1, 3)) is None
    assert score_stats.curve_band(np.ones((1, 3, 4))) is None


@pytest.mark.parametrize("scores", matrices())
def test_aggregates_and_intervals_agree_with_rliable(scores: np.ndarray) -> None:
    metrics, library = pytest.importorskip("rliable.metrics"), pytest.importorskip("rliable.library")
    (rows,) = rows_of_rliable([scores.shape], seed=3)
    own = score_stats.aggregates(scores, [(rows,)])
    theirs = {"mean": metrics.aggregate_mean, "median": metrics.aggregate_median, "iqm": metrics.aggregate_iqm}
    for name, function in (theirs | {"optimality_gap": metrics.aggregate_optimality_gap}).items():
        assert own[name].value == pytest.approx(function(scores), abs=1e-6)
        np.random.seed(3)
        _, found = library.get_interval_estimates({"x": scores}, lambda x, f=function: np.array([f(x)]), reps=RESAMPLES)
        assert [own[name].low, own[name].high] == pytest.approx(found["x"].ravel().tolist(), abs=1e-6)


@pytest.mark.parametrize("x", matrices())
def test_probabilities_of_improvement_agree_with_rliable(x: np.ndarray) -> None:
    metrics, library = pytest.importorskip("rliable.metrics"), pytest.importorskip("rliable.library")
    random = np.random.default_rng(1)
    y = x[random.integers(0, len(x), len(x) + 2)] + random.choice([-0.1, 0.0, 0.1], (len(x) + 2, x.shape[1]))
    theirs = metrics.probability_of_improvement
    x_rows, y_rows = rows_of_rliable([x.shape, y.shape], seed=5)
    np.random.seed(5)
    _, found = library.get_interval_estimates({"x": [x, y]}, lambda a, b: np.array([theirs(a, b)]), reps=RESAMPLES)
    own = score_stats.probability_of_improvement(x, y, [(x_rows, y_rows)])
    assert own.value == pytest.approx(theirs(x, y), abs=1e-6)
    assert [own.low, own.high] == pytest.approx(found["x"].ravel().tolist(), abs=1e-6)


@pytest.mark.parametrize("scores", matrices())
def test_profiles_agree_with_rliable(scores: np.ndarray) -> None:
    library = pytest.importorskip("rliable.library")
    taus = np.linspace(-0.5, 2, 26)
    (rows,) = rows_of_rliable([scores.shape], seed=7)
    np.random.seed(7)
    profiles, bands = library.create_performance_profile({"x": scores}, taus, reps=RESAMPLES)
    np.testing.assert_allclose(score_stats.profile(scores, taus), profiles["x"], atol=1e-6)
    np.testing.assert_allclose(score_stats.profile_band(scores, taus, [(rows,)]), bands["x"], atol=1e-6)


def test_intervals_contain_the_value_and_narrow_with_more_runs() -> None:
    random = np.random.default_rng(2)
    widths = []
    for runs in (4, 40):
        scores = random.normal(0.5, 0.2, (runs, 5))
        found = score_stats.aggregates(scores)["iqm"]
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.5 * widths[0]


def test_curve_is_the_aggregate_at_each_point() -> None:
    values = np.random.default_rng(4).normal(size=(4, 3, 6))
    draws = list(draw((4, 3), resamples=50))
    low, high = score_stats.curve_band(values, draws)
    for point in range(6):
        found = score_stats.aggregates(values[:, :, point], draws)["iqm"]
        assert score_stats.curve(values)[point] == pytest.approx(found.value)
        assert (low[point], high[point]) == pytest.approx((found.low, found.high))
