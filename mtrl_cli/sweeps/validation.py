"""Validate a sweep before anything is created: its runs, metric, pruner, sampler and storage."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtrl_cli import metric_names
from mtrl_cli.config import compose as configuration
from mtrl_cli.config import validation
from mtrl_cli.config.overrides import parse
from mtrl_cli.envs.scores import scores
from mtrl_cli.errors import UserError, show
from mtrl_cli.machine import extras
from mtrl_cli.sweeps.search_space import Axes, Choices, NumberRange, Value, first_values, near_miss, overrides_of

MOST_TRIALS = 100_000
NEEDED = {"cmaes": "cmaes", "gp": "scipy"}
"""Packages that Optuna's samplers import."""

_EVALUATIONS = 10  # the number of evaluations that an error suggests


def check_runs(
    shared: Sequence[str], axes: Axes, trusted: Sequence[str], search: Mapping[str, Any], points: Sequence[Mapping[str, Value]] | None
) -> tuple[Axes, list[dict[str, Any]]]:
    """Compose and check a selection of the runs of a sweep.

    Without `points`, the selection is the first value of all axes, and every other value of one axis with the first values of the other
    axes. Of more than three numbers only the smallest and the largest are composed; the types of all are checked. Of the `points` of a
    study, those are composed that have a value of a key that no earlier point has.

    Returns:
        the axes, with intervals of integers for keys that accept only integers, and the configurations.

    Raises:
        UserError: a run cannot be composed, or its evaluations lack the metric of `search`.
    """
    if points is None:
        axes, configs = _compose_axes(shared, axes, trusted)
    else:
        first_with = {value: point for point in reversed(points) for value in point.items()}
        configs = [compose(shared, point, trusted) for point in points if any(point is other for other in first_with.values())]
    for config in configs:
        check_metric(config, search)
    return axes, configs


def _compose_axes(shared: Sequence[str], axes: Axes, trusted: Sequence[str]) -> tuple[Axes, list[dict[str, Any]]]:
    integers = {key: int(axis.low) for key, axis in axes.items() if isinstance(axis, NumberRange) and axis.low == int(axis.low)}
    composed = compose(shared, first_values(axes) | integers, trusted)  # an integer is valid for float keys, too
    annotations = validation.dotted_keys(composed, trusted=trusted)
    typed = {key: _typed(key, axis, annotations.get(key)) for key, axis in axes.items()}
    first = first_values(typed)
    configs = [composed]
    for key, axis in typed.items():
        for value in _others(key, axis, annotations.get(key)):
            try:
                configs.append(compose(shared, {**first, key: value}, trusted))
            except UserError as error:
                message = str(error)
                raise UserError(message if str(value) in message else f"with {key}={show(value)}: {message}") from None
    return typed, configs


def compose(shared: Sequence[str], values: Mapping[str, Value], trusted: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration of a run. Raises UserError if it is not valid."""
    overrides = [*shared, *overrides_of(values)]
    try:
        return configuration.compose_training([*overrides, *configuration.trusting(trusted)])
    except UserError as error:
        raise UserError(near_miss(overrides) or str(error)) from None


def _typed(key: str, axis: Choices | NumberRange, annotation: Any) -> Choices | NumberRange:
    """Turn an interval into one of integers if the key accepts only integers."""
    if not isinstance(axis, NumberRange) or annotation is None or axis.is_integer or not validation.takes_int(annotation):
        return axis
    if axis.low != int(axis.low) or axis.high != int(axis.high):
        raise UserError(f"{key}=interval({axis.low:g},{axis.high:g}): {key} must be an integer. Give integers at both ends")
    return replace(axis, low=int(axis.low), high=int(axis.high), is_integer=True)


def _others(key: str, axis: Choices | NumberRange, annotation: Any) -> Sequence[Value]:
    """Return the values of an axis to compose, except the first."""
    if isinstance(axis, NumberRange):
        return [axis.high]
    values = axis.values
    numbers = [parse(f"{key}={value}").value for value in values] if annotation is not None else []
    if len(numbers) <= 3 or not all(type(number) in (int, float) for number in numbers):
        return values[1:]
    for number in numbers:
        validation.check_value(key, number, annotation)
    ends = numbers.index(min(numbers)), numbers.index(max(numbers))
    return [values[at] for at in ends if at != 0]


# -- objective of a trial -------------------------------------------------------------------------------------------------------


def check_metric(config: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    """Raise UserError if a run lacks the metric of the sweep, or lacks the evaluations before its end that a pruner needs."""
    steps, every = config["steps_per_task"], config["eval"]["every"]
    if search["pruner"] != "none" and not 0 < every < steps:
        raise UserError(
            f"sweep.pruner={search['pruner']} needs evaluations before a run's end, and eval.every={every} with steps_per_task={steps} has "
            f"none. Set eval.every={max(1, steps // _EVALUATIONS)}, for example"
        )
    names, is_scored = _metrics(config["env"])
    metric = search["metric"]
    if metric is None and not is_scored and len(config["env"].get("tasks") or [None]) > 1:
        raise UserError(
            f"sweep.metric is missing: env={config['env']['name']} has several tasks and no reference scores. Set sweep.metric, such as "
            f"sweep.metric={names[0]}"
        )
    if metric is not None and names and metric not in names:
        raise UserError(f"unknown sweep.metric={show(metric)}; env={config['env']['name']} has {', '.join(_shortened(names))}")


def _metrics(env: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the names of an evaluation's metrics ([] if unknown), and whether the tasks have scores (True if unknown)."""
    tasks = env.get("tasks")
    if not isinstance(tasks, list) or not tasks:
        return [], True
    *package, suite, _ = str(env["_target_"]).split(".")
    if package != ["mtrl_cli", "envs"]:
        return metric_names.of_evaluation(tasks, tasks), True  # the user's own pack: its code has the reference scores
    scored = [task for task in tasks if None not in scores(suite, task)]
    return metric_names.of_evaluation(tasks, scored), bool(scored)


def _shortened(names: Sequence[str], most: int = 12) -> list[str]:
    return [*names[-(most // 2) :], *names[: most // 2], "…"] if len(names) > most else list(names)


# -- sampler ---------------------------------------------------------------------------------------------------------------------


def resolve_search(search: Mapping[str, Any], axes: Axes) -> dict[str, Any]:
    """Resolve the sampler of the section `sweep`, and check it against the axes.

    Raises:
        UserError: the sampler does not fit the axes, or its package is missing.
    """
    intervals = [key for key, axis in axes.items() if isinstance(axis, NumberRange)]
    sampler = search["sampler"] if search["sampler"] != "auto" else "tpe" if intervals else "grid"
    if sampler == "grid":
        if intervals:
            raise UserError(f"sweep.sampler=grid does not support the interval of {intervals[0]}. Give values, or sweep.sampler=tpe")
        size = math.prod(len(axis.values) for axis in axes.values() if isinstance(axis, Choices))
        trials = search["trials"] or size
        if trials > size:
            raise UserError(f"sweep.trials must be at most the {size} points of the grid, got {trials}")
        if trials > MOST_TRIALS:
            raise UserError(
                f"the grid has {size:,} points, at most {MOST_TRIALS:,} are allowed. Give sweep.trials=N for the first N points"
            )
    elif search["trials"] is None:
        why = f"{intervals[0]} is an interval" if intervals else f"sweep.sampler={sampler} needs it"
        raise UserError(f"sweep.trials is missing: {why}. Give sweep.trials=50, for example")
    elif search["trials"] > MOST_TRIALS:
        raise UserError(f"sweep.trials must be at most {MOST_TRIALS:,}, got {search['trials']}")
    if sampler == "cmaes" and len(intervals) < 2:
        raise UserError("sweep.sampler=cmaes needs intervals of at least two keys. Give more intervals, or sweep.sampler=tpe")
    if sampler in NEEDED:
        extras.require(f"sweep.sampler={sampler}", NEEDED[sampler], "search")
    storage = search["storage"]
    if storage is not None and "://" not in storage and not re.fullmatch(r"env:\w+", storage):  # not printed: it may contain a password
        raise UserError(
            "sweep.storage must be the URL of an Optuna storage, such as sqlite:///sweep.db or postgresql://…, or env:NAME for "
            "the URL in the environment variable NAME"
        )
    return {**search, "sampler": sampler}


def points_of(axes: Axes, trials: int | None) -> tuple[dict[str, Value], ...]:
    """Return the first `trials` points of a grid (None: all). The last key varies fastest."""
    points: Iterable[tuple[str, ...]] = itertools.product(*(axis.values for axis in axes.values() if isinstance(axis, Choices)))
    return tuple(dict(zip(axes, point, strict=True)) for point in itertools.islice(points, trials))
