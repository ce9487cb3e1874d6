"""What a network that was trained before gains on new tasks: two learning curves compared. Numpy only.

The metrics are those of Taylor and Stone 2009, "Transfer Learning for Reinforcement Learning Domains: A Survey", section 2.1: jump-start,
time to threshold (here: what training from scratch ends with), transfer ratio (of the areas under the curves), asymptotic performance
(here: the score at the end of the budget). S seeds, P evaluations. A fine-tuned run and the run from scratch of the same seed are a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Metric = dict[str, Any]


def steps_to(steps_P: Floats, values_P: Floats, threshold: float) -> float:
    """The step at which a curve first reaches a threshold, linear between evaluations; infinity if it never does."""
    return float(steps_to_each(steps_P, values_P[None], np.array([threshold]))[0])


def steps_to_each(steps_P: Floats, values_BP: Floats, thresholds_B: Floats) -> Floats:
    """The same of B curves with a threshold each, `[B]`."""
    reached_BP = values_BP >= thresholds_B[:, None]
    first_B = reached_BP.argmax(axis=1)
    before_B, rows_B = np.maximum(first_B - 1, 0), np.arange(len(values_BP))
    below_B, above_B = values_BP[rows_B, before_B], values_BP[rows_B, first_B]
    with np.errstate(divide="ignore", invalid="ignore"):
        share_B = np.where(first_B > 0, (thresholds_B - below_B) / (above_B - below_B), 0.0)
    found_B = steps_P[before_B] + share_B * (steps_P[first_B] - steps_P[before_B])
    return np.where(reached_BP.any(axis=1), found_B, np.inf)


def area(steps_P: Floats, values_P: Floats) -> float:
    """The area under a curve, linear between evaluations, over the steps that it takes: its mean height."""
    return float(np.trapezoid(values_P, steps_P) / (steps_P[-1] - steps_P[0]))


def area_ratio(steps_P: Floats, fine_tuned_P: Floats, scratch_P: Floats) -> float:
    """The area under the one curve over that under the other, both in units in which 0 is random play.

    NaN where the curve from scratch is on the whole not above random play: then there is nothing to compare with.
    """
    below = area(steps_P, scratch_P)
    return area(steps_P, fine_tuned_P) / below if below > 0 else float("nan")


def over_seeds(statistic: Callable[[Rows], float], seeds: int, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Metric:
    """A statistic of the seeds and its percentile bootstrap interval, seeds drawn with replacement.

    Args:
        statistic: of the seeds whose indices it is given, [S].
        seeds: how many there are.

    Returns: {"value", "ci": [low, high]}, None for what is not finite: a statistic that does not exist, or an end that is never reached.
        "ci" is None where there is one seed, or a resample of which the statistic does not exist.
    """
    value = statistic(np.arange(seeds))
    result: Metric = {"value": value if np.isfinite(value) else None, "ci": None}
    if seeds == 1 or np.isnan(value):
        return result
    random = np.random.default_rng(seed)
    drawn, times = np.unique(np.sort(random.integers(0, seeds, (resamples, seeds)), axis=1), axis=0, return_counts=True)
    values = np.repeat([statistic(rows) for rows in drawn], times)
    if not np.isnan(values).any():
        # Without interpolation, which would make nothing of infinity.
        ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")
        result["ci"] = [float(end) if np.isfinite(end) else None for end in ends]
    return result


def band(values_SP: Floats, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[Floats, Floats]:
    """The bootstrap interval over seeds of a mean curve, at each evaluation for itself: low [P], high [P]."""
    random = np.random.default_rng(seed)
    drawn_RS = random.integers(0, len(values_SP), (resamples, len(values_SP)))
    low_P, high_P = np.quantile(values_SP[drawn_RS].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low_P, high_P


def compare(
    steps_P: Floats, fine_tuned_SP: Floats, scratch_SP: Floats, fine_tuned_final_S: Floats, scratch_final_S: Floats, random: float = 0.0
) -> dict[str, Metric]:
    """All metrics of the mean curves over seeds, with their intervals, in which the runs of one seed stay together.

    Args:
        steps_P: at which the curves were evaluated, the first before any training.
        fine_tuned_SP, scratch_SP: the curves.
        fine_tuned_final_S, scratch_final_S: what the test at the end gave.
        random: random play's value, above which areas are counted.
    """
    seeds = len(fine_tuned_SP)

    def both(rows: Rows) -> tuple[Floats, Floats]:
        return fine_tuned_SP[rows].mean(axis=0), scratch_SP[rows].mean(axis=0)

    def time(rows: Rows) -> float:
        fine_tuned_P, scratch_P = both(rows)
        return steps_to(steps_P, fine_tuned_P, float(scratch_P[-1]))

    def ratio(rows: Rows) -> float:
        fine_tuned_P, scratch_P = both(rows)
        return area_ratio(steps_P, fine_tuned_P - random, scratch_P - random)

    def mean(values_S: Floats) -> Callable[[Rows], float]:
        return lambda rows: float(values_S[rows].mean())

    statistics: dict[str, Callable[[Rows], float]] = {
        "zero_shot": mean(fine_tuned_SP[:, 0]),
        "jump_start": mean(fine_tuned_SP[:, 0] - scratch_SP[:, 0]),
        "steps_to_scratch": time,
        "area_ratio": ratio,
        "final_fine_tuned": mean(fine_tuned_final_S),
        "final_scratch": mean(scratch_final_S),
        "final_difference": mean(fine_tuned_final_S - scratch_final_S),
    }
    return {name: over_seeds(statistic, seeds) for name, statistic in statistics.items()}
