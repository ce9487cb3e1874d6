"""Names of metrics in metrics.jsonl, TensorBoard and the live display. Scripts and dashboards rely on them.

A name that ends with a slash is a prefix: a task, a score aggregate or a part of the program follows.
"""

from __future__ import annotations

from collections.abc import Sequence

TRAIN_RETURN = "train/return/"
TRAIN_LENGTH = "train/length/"
TRAIN_SCORE = "train/score/"
EVAL_RETURN = "eval/return/"
EVAL_RETURNS = "eval/returns/"  # histograms of episode returns
EVAL_SCORE = "eval/score/"
MEAN_SCORE = f"{EVAL_SCORE}mean"
LOSS = "loss/"
WEIGHT = "weight/"
EPSILON = "epsilon/"
Q_MEAN = "q/mean/"
GRAD_NORM = "grad/norm"
GRAD_CONFLICT = "grad/conflict"
GRAD_COSINE = "grad/cosine"
PERF = "perf/"
STEPS_PER_SECOND = "perf/steps_per_second"
FRAMES_PER_SECOND = "perf/frames_per_second"
UPDATES_PER_SECOND = "perf/updates_per_second"
MEMORY = "perf/memory"
SECONDS = "perf/seconds/"
TEST = "test/"
FINAL = "final/"

AGGREGATES = ("mean", "median", "iqm", "min")
"""Aggregates of normalised scores over tasks, as `eval/score/<aggregate>`."""


def of_evaluation(tasks: Sequence[str], scored: Sequence[str]) -> list[str]:
    """List the metrics of an evaluation: returns of all tasks, scores of tasks with reference scores, and aggregates of scores."""
    return [*(EVAL_RETURN + task for task in tasks), *(EVAL_SCORE + name for name in (*scored, *(AGGREGATES if scored else ())))]
