"""`mtrl study sharing`: in one command, every sharing structure at the same size and over seeds as a sweep, then the report."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtrl_cli.config import compose, options
from mtrl_cli.errors import RunError, Stopped, UserError, show, unknown
from mtrl_cli.reports import command as report
from mtrl_cli.reports import html
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.studies import sharing_sizes
from mtrl_cli.studies.sharing_sizes import BASELINE
from mtrl_cli.sweeps import command as sweep
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Choices, Plan, Value
from mtrl_cli.sweeps.search_space import Words, take_apart

SHARING, SIZE = "network/sharing", "network.parameters"
SEEDS, MOST_SEEDS = 3, 1000
LOOKS = 10
"""At least so many evaluations, and looks at gradients and features, over the budget, unless the user says how often."""


@dataclass(frozen=True)
class Study:
    """What a study is to do: its sweep, and what is to be said of it before."""

    plan: Plan
    lines: tuple[str, ...]


def make(overrides: Sequence[str]) -> Study:
    """What the words of `mtrl study sharing` ask for, once all of it is known to make sense.

    Every structure is trained with as many parameters as hard sharing has at the widths of the words (or `network.parameters`); besides,
    networks that share nothing are trained at those widths themselves: a full network for each task.

    Raises:
        UserError: a word is wrong, or there is nothing to compare.
    """
    html.require()
    words, seeds = _seeds(overrides)
    apart = take_apart(words)
    structures = _structures(apart)
    parameters = _given(apart, SIZE)
    if "null" in parameters:
        raise UserError(f"{SIZE}=null: networks at their own widths are in a study of sharing anyway; give a number, or leave it out")
    others = {key: axis for key, axis in apart.axes.items() if key not in (SHARING, SIZE)}
    if any(not isinstance(axis, Choices) for axis in others.values()):
        raise UserError("mtrl study sharing trains every structure with the same values: give values, and search intervals with mtrl sweep")
    shared = [word for word in apart.shared if _key(word) not in (SHARING, SIZE)]
    first = [f"{key}={axis.words[0]}" for key, axis in others.items() if isinstance(axis, Choices)]
    trusted = [word for word in apart.sweep if _key(word) == "trusted_packages"]
    composed = compose.compose_training([*shared, *first, *trusted])
    _check(composed)
    sizes = sharing_sizes.measure([*shared, *first, *trusted], structures, parameters)
    found, lines = _fitting(structures, sizes)
    every = _how_often(composed, {_key(word) for word in words})
    axes = [
        f"{SHARING}={','.join(dict.fromkeys([BASELINE, *(name for name, _ in found)]))}",
        f"{SIZE}={','.join([*sizes['parameters'], 'null'])}",
    ]
    rest = [word for word in words if _key(word) not in (SHARING, SIZE)]
    plan = sweep_plan.make([*axes, *rest, *every, *seeds])
    if plan.points is None or plan.trials != len(sweep_plan.points_of(plan.axes, None)):
        raise UserError("sweep.sampler, sweep.trials: a study of sharing has trials of its own; leave them out")
    points = _points(found, plan)
    lines = [_about(composed, found, sizes, points, plan), *lines]
    folder = plan.run_dir or Path("runs/studies") / f"sharing_{plan.env}"
    return Study(replace(plan, points=points, search={**plan.search, "trials": len(points)}, run_dir=folder), tuple(lines))


def run(study: Study, *, command: Sequence[str]) -> None:
    """Train what is not trained yet, and make the report in the study's folder.

    Raises:
        UserError: the folder is of something else. RunError: a trial failed for good; the report, which names it, is made first.
        Stopped: by a signal, after saving; the same command goes on.
    """
    for line in study.lines:
        print_line(line)
    folder = study.plan.run_dir
    assert folder is not None
    failed = None
    try:
        sweep.sweep(study.plan, command=command)
    except RunError as error:
        failed = error
    except Stopped:
        print_line("or with the same command, which makes the report at the end")
        raise
    report.report([folder.expanduser()], None, command)
    if failed is not None:
        raise failed


# -- the words ------------------------------------------------------------------------------------------------------------------


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _seeds(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The other words, and those that say which seeds there are: `seeds=3` are as many from `seed` on."""
    words = [word for word in overrides if _key(word) != "seeds"]
    given = [word.partition("=")[2] for word in overrides if _key(word) == "seeds"]
    seed = [word.partition("=")[2] for word in words if _key(word) == "seed"]
    if len(given) > 1 or (given and not (given[0].isdecimal() and 0 < int(given[0]) <= MOST_SEEDS)):
        raise UserError(f"seeds={show(given[-1])}: expected how many seeds there are to be, a whole number from 1 to {MOST_SEEDS}")
    if seed and not re.fullmatch(r"\d{1,15}", seed[0]):
        if given:
            raise UserError(f"seed={show(seed[0])} and seeds={given[0]}: expected one of them to say which seeds there are")
        return words, []
    start, number = int(seed[0]) if seed else 0, int(given[0]) if given else SEEDS
    return [word for word in words if _key(word) != "seed"], [f"seed={','.join(str(start + index) for index in range(number))}"]


def _given(words: Words, key: str) -> list[str]:
    """The values of a key, as words: one, several, or none where it is not given."""
    axis = words.axes.get(key)
    if axis is None:
        return [word.partition("=")[2] for word in words.shared if _key(word) == key]
    if not isinstance(axis, Choices):
        raise UserError(f"{key}: expected values between commas, not an interval")
    return list(axis.words)


def _structures(words: Words) -> list[str]:
    """The structures to compare: those that are given, else all; networks that share nothing first, as they are the baseline."""
    folders = compose.search_path(words.sweep)
    known = list(options.options(SHARING, folders))
    given = _given(words, SHARING)
    for name in given:
        if name not in known:
            raise UserError(unknown("option", name, known, prefix=f"{SHARING}="))
    if given == [BASELINE]:
        raise UserError(f"{SHARING}={BASELINE}: that is what structures are compared with; name others, or leave it out for all")
    return list(dict.fromkeys([BASELINE, *(given or known)]))


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what would make the runs of a study incomparable, or leave nothing to compare."""
    tasks = config["env"].get("tasks")
    if isinstance(tasks, list) and len(tasks) < 2:
        raise UserError(
            f"env.tasks: {show(tasks[0] if tasks else '')} alone shares with nobody; a study of sharing needs two tasks at least"
        )
    if config["early_stopping"]["metric"] is not None:
        raise UserError("early_stopping.metric: a study of sharing compares runs of the same budget; leave early stopping out")


def _how_often(config: Mapping[str, Any], given: set[str]) -> list[str]:
    """Words with which runs are evaluated and looked into often enough for curves, where the user has not said how often."""
    often = max(1, config["steps_per_task"] // LOOKS)
    words = []
    for section, key in (("eval", "every"), ("log", "diagnostics")):
        every = config[section][key]
        if f"{section}.{key}" not in given and not 0 < every <= often:
            words.append(f"{section}.{key}={often}")
    return words


# -- the trials -----------------------------------------------------------------------------------------------------------------


def _fitting(structures: Sequence[str], sizes: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Each structure with the sizes that it can have, and what is to be said of the others, which are left out.

    Raises:
        UserError: none is left to compare.
    """
    found, lines = [], []
    for size, name in itertools.product(sizes["parameters"], structures):
        came_to = sizes["sizes"][name][size]
        if isinstance(came_to, int):
            found.append((name, size))
        else:
            lines.append(f"left out: {name} with {SIZE}={size}: {came_to}")
    if not any(name != BASELINE for name, _ in found):
        raise UserError("no structure can be trained at that size: " + (lines[-1].partition(": ")[2] if lines else "none is given"))
    return found, lines


def _points(found: Sequence[tuple[str, str]], plan: Plan) -> tuple[dict[str, Value], ...]:
    """The trials: for each seed, and each of the other values, every structure at its size and the full networks that share nothing.

    Seeds come last, so that a study that is stopped early has compared everything with the first.
    """
    others = {key: axis.words for key, axis in plan.axes.items() if key not in (SHARING, SIZE) and isinstance(axis, Choices)}
    slowest_first = sorted(others, key=lambda key: key != "seed")
    points: list[dict[str, Value]] = []
    for values in itertools.product(*(others[key] for key in slowest_first)):
        rest = dict(zip(slowest_first, values, strict=True))
        for name, size in [*found, (BASELINE, "null")]:
            point: dict[str, Value] = {SHARING: name, SIZE: size, **rest}
            points.append({key: point[key] for key in plan.axes})
    return tuple(points)


def _about(config: Mapping[str, Any], found: Sequence[tuple[str, str]], sizes: Mapping[str, Any], points: Sequence[Any], plan: Plan) -> str:
    """In a line, what is compared."""
    names = list(dict.fromkeys(name for name, _ in found))
    seeds = plan.axes.get("seed")
    of_seeds = f"{len(seeds.words)} seeds" if isinstance(seeds, Choices) else "one seed"
    at = " and ".join(f"{int(size):,}" if size.isdecimal() else size for size in sizes["parameters"])
    return (
        f"sharing on {config['env']['name']}: {len(points)} runs of {plan.steps_per_task:,} steps per task; {', '.join(names)} with {at} "
        f"parameters each, and {BASELINE} with {sizes['full']:,}; {of_seeds}"
    )
