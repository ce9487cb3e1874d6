"""Transfer metrics of two learning curves: fine-tuning of a trained network, and training from scratch. Numpy only.

The metrics are those of Taylor and Stone 2009, "Transfer Learning for Reinforcement Learning Domains: A Survey", section 2.1: jump-start,
time to threshold (here: the final score of training from scratch), transfer ratio (of the areas under the curves), asymptotic performance
(here: the score at the end of the budget). S seeds, P evaluations. The fine-tuned run and the run from scratch of one seed form a pair.
"""

from __future__ import annotations

import numpy as np

from mtrl_cli.stats.bootstrap import Estimate, Floats, Indices, estimates

METRICS = ("zero_shot", "jump_start", "steps_to_scratch", "area_ratio", "final_fine_tuned", "final_scratch", "final_difference")


def steps_to_threshold(steps_P: Floats, values_BP: Floats, thresholds_B: Floats) -> Floats:
    """Find the step at which each of B curves first reaches its threshold, `[B]`; linear between evaluations, infinity if never."""
    reached_BP = values_BP >= thresholds_B[:, None]
    first_B = reached_BP.argmax(axis=1)
    before_B, rows_B = np.maximum(first_B - 1, 0), np.arange(len(values_BP))
    below_B, above_B = values_BP[rows_B, before_B], values_BP[rows_B, first_B]
    with np.errstate(divide="ignore", invalid="ignore"):
        share_B = np.where(first_B > 0, (thresholds_B - below_B) / (above_B - below_B), 0.0)
    found_B = steps_P[before_B] + share_B * (steps_P[first_B] - steps_P[before_B])
    return np.where(reached_BP.any(axis=1), found_B, np.inf)


def area(steps_P: Floats, values_BP: Floats) -> Floats:
    """Compute the mean height of curves, `[...]`: the area under a curve, linear between evaluations, over its range of steps."""
    return np.asarray(np.trapezoid(values_BP, steps_P, axis=-1) / (steps_P[-1] - steps_P[0]))


def area_ratio(steps_P: Floats, fine_tuned_BP: Floats, scratch_BP: Floats) -> Floats:
    """Compute the ratio of the areas under two curves, in units in which 0 is random play.

    NaN where the mean height of the curve from scratch is not above random play, because the ratio has no meaning then.
    """
    below = area(steps_P, scratch_BP)
    return area(steps_P, fine_tuned_BP) / np.where(below > 0, below, np.nan)


def compare(
    steps_P: Floats, fine_tuned_SP: Floats, scratch_SP: Floats, fine_tuned_final_S: Floats, scratch_final_S: Floats, random: float = 0.0
) -> dict[str, Estimate]:
    """Compute `METRICS` of the mean curves over seeds, with intervals; the two runs of a seed are resampled as a pair.

    A value or an end of `steps_to_scratch` is infinite where the threshold is never reached; an undefined value is NaN.

    Args:
        steps_P: steps of the evaluations, the first before any training.
        fine_tuned_SP, scratch_SP: the curves.
        fine_tuned_final_S, scratch_final_S: final test results.
        random: result of random play; areas are measured above this result.
    """

    def statistic(rows_BS: Indices) -> Floats:
        fine_tuned_BP, scratch_BP = fine_tuned_SP[rows_BS].mean(axis=1), scratch_SP[rows_BS].mean(axis=1)
        fine_tuned_B, scratch_B = fine_tuned_final_S[rows_BS].mean(axis=1), scratch_final_S[rows_BS].mean(axis=1)
        return np.column_stack(
            [
                fine_tuned_BP[:, 0],
                fine_tuned_BP[:, 0] - scratch_BP[:, 0],
                steps_to_threshold(steps_P, fine_tuned_BP, scratch_BP[:, -1]),
                area_ratio(steps_P, fine_tuned_BP - random, scratch_BP - random),
                fine_tuned_B,
                scratch_B,
                fine_tuned_B - scratch_B,
            ]
        )

    # Infinities cannot be interpolated, so the ends are resampled values.
    return dict(zip(METRICS, estimates(statistic, (len(fine_tuned_SP),), method="nearest"), strict=True))
