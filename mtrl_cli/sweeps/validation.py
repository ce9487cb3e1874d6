"""What is checked of a sweep before anything is made: that its runs compose, and that what chooses and judges its trials makes sense."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mtrl_cli import metric_names
from mtrl_cli.config import compose as configuration
from mtrl_cli.config import validation
from mtrl_cli.envs.scores import scores
from mtrl_cli.errors import UserError, show
from mtrl_cli.machine import extras
from mtrl_cli.sweeps.search_space import Choices, NumberRange, Value, near_miss

MOST_TRIALS = 100_000
NEEDED = {"cmaes": "cmaes", "gp": "scipy"}
"""What samplers of Optuna's import."""

_EVALUATIONS = 10  # advised, where there are none before the end


@dataclass(frozen=True)
class Checked:
    """What was found: the axes, intervals of keys that take whole numbers as such; the packs' names and the largest budget."""

    axes: Mapping[str, Choices | NumberRange]
    envs: tuple[str, ...]
    steps_per_task: int


def check_runs(
    words: Sequence[str],
    axes: Mapping[str, Choices | NumberRange],
    trusted: Sequence[str],
    search: Mapping[str, Any],
    points: Sequence[Mapping[str, Value]] | None = None,
) -> Checked:
    """Compose the first combination, and every other value of an axis beside the first of the others: their sum, not their product.

    Of `points`, which a study has chosen, those are composed that hold a value that none before them has.

    Of numbers in a row only the first and the last are composed; all are checked for their type.

    Raises:
        UserError: one of them cannot be composed, or cannot be judged by what `search` says.
    """
    if points is not None:
        first_with = {value: point for point in reversed(points) for value in point.items()}
        needed = [point for point in points if any(point is other for other in first_with.values())]
        return _checked([compose(words, point, trusted) for point in needed], axes, search)
    first: dict[str, Value] = {key: axis.words[0] if isinstance(axis, Choices) else axis.low for key, axis in axes.items()}
    whole = {key: int(axis.low) for key, axis in axes.items() if isinstance(axis, NumberRange) and axis.low == int(axis.low)}
    composed = compose(words, first | whole, trusted)  # a whole number is also one where fractions may be
    annotations = validation.dotted_keys(composed, trusted=trusted)
    typed = {key: _typed(key, axis, annotations.get(key)) for key, axis in axes.items()}
    configs = [composed]
    for key, axis in typed.items():
        base = {other: typed_low(typed[other], value) for other, value in first.items()}
        configs += [_compose_with(words, base, key, value, trusted) for value in _others(key, axis, annotations.get(key))]
    return _checked(configs, typed, search)


def _checked(configs: Sequence[Mapping[str, Any]], axes: Mapping[str, Choices | NumberRange], search: Mapping[str, Any]) -> Checked:
    for config in configs:
        check_judged(config, search)
    envs = tuple(dict.fromkeys(str(config["env"]["name"]) for config in configs))
    return Checked(axes, envs, max(int(config["steps_per_task"]) for config in configs))


def compose(words: Sequence[str], values: Mapping[str, Value], trusted: Sequence[str]) -> dict[str, Any]:
    """The configuration of a run with these values.

    Raises:
        UserError: there is none.
    """
    named = [f"trusted_packages=[{','.join(trusted)}]"] if trusted else []
    overrides = [*words, *(f"{key}={value}" for key, value in values.items())]
    try:
        return configuration.compose_training([*overrides, *named])
    except UserError as error:
        raise UserError(near_miss(overrides) or str(error)) from None


def _compose_with(words: Sequence[str], base: Mapping[str, Value], key: str, value: Value, trusted: Sequence[str]) -> dict[str, Any]:
    try:
        return compose(words, {**base, key: value}, trusted)
    except UserError as error:
        told = str(error)
        raise UserError(told if str(value) in told else f"with {key}={show(value)}: {told}") from None


def typed_low(axis: Choices | NumberRange, value: Value) -> Value:
    """The first value of an axis, as its type has it."""
    return int(value) if isinstance(axis, NumberRange) and axis.is_integer else value


def _typed(key: str, axis: Choices | NumberRange, annotation: Any) -> Choices | NumberRange:
    """An interval of whole numbers where the key takes no others."""
    if not isinstance(axis, NumberRange) or annotation is None or axis.is_integer or not validation.takes_int(annotation):
        return axis
    if axis.low != int(axis.low) or axis.high != int(axis.high):
        raise UserError(f"{key}=interval({axis.low:g},{axis.high:g}): {key} takes whole numbers; expected whole ones at both ends")
    return replace(axis, low=int(axis.low), high=int(axis.high), is_integer=True)


def _others(key: str, axis: Choices | NumberRange, annotation: Any) -> Iterator[Value]:
    """The values of an axis to compose beside the first."""
    if isinstance(axis, NumberRange):
        yield axis.high
        return
    numbers = [_number(word) for word in axis.words] if annotation is not None else [None]
    if len(numbers) > 3 and None not in numbers:
        for number in numbers:
            validation.check_value(key, number, annotation)
        ends = min(range(len(numbers)), key=lambda at: numbers[at] or 0), max(range(len(numbers)), key=lambda at: numbers[at] or 0)
        yield from (axis.words[at] for at in dict.fromkeys(ends) if at != 0)
    else:
        yield from axis.words[1:]


def _number(word: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return None


# -- what a trial is judged by --------------------------------------------------------------------------------------------------


def check_judged(config: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    """Refuse a run that does not have the metric it is to be judged by, or has it too late for a pruner.

    Raises:
        UserError: it names the keys and what to set.
    """
    steps, every = config["steps_per_task"], config["eval"]["every"]
    if search["pruner"] != "none" and not 0 < every < steps:
        raise UserError(
            f"sweep.pruner={search['pruner']} judges by evaluations before a run's end, and with eval.every={every} of "
            f"steps_per_task={steps} there is none; set eval.every={max(1, steps // _EVALUATIONS)}, for example"
        )
    names, is_scored = _metrics(config["env"])
    metric = search["metric"]
    if metric is None and not is_scored and len(config["env"].get("tasks") or [None]) > 1:
        raise UserError(
            f"sweep.metric: env={config['env']['name']} has several tasks and no reference scores, so that nothing says which trial is "
            f"better; name what to go by, such as sweep.metric={names[0]}"
        )
    if metric is not None and names and metric not in names:
        raise UserError(f"sweep.metric={show(metric)}: an evaluation of env={config['env']['name']} has {', '.join(_shortened(names))}")


def _metrics(env: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The names of the metrics that an evaluation has ([]: that cannot be told here), and whether tasks have scores (or may have)."""
    tasks = env.get("tasks")
    if not isinstance(tasks, list) or not tasks:
        return [], True
    *package, suite, _ = str(env["_target_"]).split(".")
    if package != ["mtrl_cli", "envs"]:
        return metric_names.of_evaluation(tasks, tasks), True  # a pack of a user's own, whose references are in its code
    scored = [task for task in tasks if None not in scores(suite, task)]
    return metric_names.of_evaluation(tasks, scored), bool(scored)


def _shortened(names: Sequence[str], most: int = 12) -> list[str]:
    return [*names[-(most // 2) :], *names[: most // 2], "…"] if len(names) > most else list(names)


# -- how trials are chosen ------------------------------------------------------------------------------------------------------


def settle_search(search: Mapping[str, Any], axes: Mapping[str, Choices | NumberRange]) -> dict[str, Any]:
    """The section `sweep` with a sampler that is not auto, once it is known to go with the axes.

    Raises:
        UserError: it does not, or its package is missing.
    """
    intervals = [key for key, axis in axes.items() if isinstance(axis, NumberRange)]
    sampler = search["sampler"] if search["sampler"] != "auto" else "tpe" if intervals else "grid"
    if sampler == "grid":
        if intervals:
            raise UserError(f"sweep.sampler=grid has no points in the interval of {intervals[0]}: give values, or sweep.sampler=tpe")
        size = 1
        for axis in axes.values():
            size *= len(axis.words) if isinstance(axis, Choices) else 1
        if (search["trials"] or size) > size:
            raise UserError(f"sweep.trials={search['trials']}: the grid has {size} points; expected at most as many")
        if (search["trials"] or size) > MOST_TRIALS:
            raise UserError(f"the grid has {size:,} points: expected at most {MOST_TRIALS:,}, or sweep.trials=N for the first N of them")
    elif search["trials"] is None:
        why = f"{intervals[0]} is an interval" if intervals else f"sweep.sampler={sampler} chooses as many as it is told"
        raise UserError(
            f"sweep.trials is missing: {why}, so that the number of trials is for you to say; give sweep.trials=50, for example"
        )
    elif search["trials"] > MOST_TRIALS:
        raise UserError(f"sweep.trials={search['trials']}: expected at most {MOST_TRIALS:,}")
    if sampler == "cmaes" and len(intervals) < 2:
        raise UserError("sweep.sampler=cmaes moves a cloud of numbers: expected two keys with intervals at least; for others take tpe")
    if sampler in NEEDED:
        extras.require(f"sweep.sampler={sampler}", NEEDED[sampler], "search")
    storage = search["storage"]
    if storage is not None and "://" not in storage and not re.fullmatch(r"env:\w+", storage):  # not told: it may be a password
        raise UserError(
            "sweep.storage: expected an Optuna storage's URL, such as sqlite:///sweep.db or postgresql://…, or env:NAME for one that the "
            "environment variable NAME holds"
        )
    return {**search, "sampler": sampler}


def points_of(axes: Mapping[str, Choices | NumberRange], trials: int | None) -> tuple[dict[str, Value], ...]:
    """The first so many points of a grid (None: all), the last key's values changing first."""
    words: Iterable[tuple[str, ...]] = itertools.product(*(axis.words for axis in axes.values() if isinstance(axis, Choices)))
    return tuple(dict(zip(axes, point, strict=True)) for point in itertools.islice(words, trials))
