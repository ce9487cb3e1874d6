"""`mtrl study sharing`: compare sharing structures at equal parameter count, with independent networks as the baseline."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mtrl_cli.config import compose, options
from mtrl_cli.errors import UserError, show, unknown
from mtrl_cli.studies import engine, sharing_sizes
from mtrl_cli.studies.engine import Study
from mtrl_cli.studies.sharing_sizes import BASELINE
from mtrl_cli.sweeps.plan import Axes, Plan, Value
from mtrl_cli.sweeps.search_space import SplitOverrides, key_of

SHARING, SIZE = "network/sharing", "network.parameters"


def make(overrides: Sequence[str]) -> Study:
    """Plan the study of `mtrl study sharing` from its overrides.

    Every structure is trained with the parameter count of hard sharing at the given widths, or with `network.parameters`. In addition,
    independent networks are trained at the given widths: one full network per task.

    Raises:
        UserError: an override is wrong, or there is nothing to compare.
    """
    others, split, seeds = engine.parse(overrides)
    structures = _structures(split)
    parameters = engine.values_of(split, SIZE)
    if "null" in parameters:
        raise UserError(f"{SIZE}=null: independent networks of full width are always trained. Give a number, or omit {SIZE}")
    base = engine.first_trial(split, without=(SHARING, SIZE))
    config = compose.compose_training(base)
    _check(config)
    sizes = sharing_sizes.measure(base, structures, parameters)
    feasible, lines = _feasible(structures, sizes)
    axes = [
        f"{SHARING}={','.join(dict.fromkeys([BASELINE, *(name for name, _ in feasible)]))}",
        f"{SIZE}={','.join([*sizes['parameters'], 'null'])}",
    ]
    rest = [override for override in others if key_of(override) not in (SHARING, SIZE)]
    intervals = engine.evaluation_overrides(config, {key_of(override) for override in others}, ("eval.every", "log.diagnostics"))
    plan = engine.plan([*axes, *rest, *intervals, *seeds], lambda found: _points(feasible, found), "sharing_{env}")
    return Study(plan, (_description(config, feasible, sizes, plan), *lines))


def _structures(split: SplitOverrides) -> list[str]:
    """Return the structures to compare, all by default; the baseline comes first."""
    known = list(options.options(SHARING, compose.search_path(split.sweep)))
    given = engine.values_of(split, SHARING)
    for name in given:
        if name not in known:
            raise UserError(unknown("option", name, known, prefix=f"{SHARING}="))
    if set(given) == {BASELINE}:
        raise UserError(f"{SHARING}={BASELINE} is the baseline of the comparison. Give other structures, or omit {SHARING} for all")
    return list(dict.fromkeys([BASELINE, *(given or known)]))


def _check(config: Mapping[str, Any]) -> None:
    """Raise UserError for incomparable runs, or for a single task."""
    tasks = config["env"].get("tasks")
    if isinstance(tasks, list) and len(tasks) < 2:
        raise UserError(f"env.tasks must name at least two tasks for a study of sharing, got {show(tasks[0] if tasks else '')}")
    engine.refuse_early_stopping(config)


def _feasible(structures: Sequence[str], sizes: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return each structure with its possible sizes, and a line for each impossible size.

    Raises:
        UserError: no structure is left to compare.
    """
    found, lines = [], []
    for size, name in itertools.product(sizes["parameters"], structures):
        count = sizes["sizes"][name][size]
        if isinstance(count, int):
            found.append((name, size))
        else:
            lines.append(f"left out: {name} with {SIZE}={size}: {count}")
    if not any(name != BASELINE for name, _ in found):
        raise UserError("no structure can be trained at that size: " + lines[-1].partition(": ")[2])
    return found, lines


def _points(feasible: Sequence[tuple[str, str]], axes: Axes) -> list[dict[str, Value]]:
    """Return the trials: each structure at its sizes and the full independent networks, for each combination of the other values.

    The seed varies slowest, so that a study that is stopped early has a full comparison with the first seeds.
    """
    points: list[dict[str, Value]] = []
    for rest in engine.combinations(axes, without=(SHARING, SIZE)):
        points += [{SHARING: name, SIZE: size, **rest} for name, size in [*feasible, (BASELINE, "null")]]
    return points


def _description(config: Mapping[str, Any], feasible: Sequence[tuple[str, str]], sizes: Mapping[str, Any], plan: Plan) -> str:
    names = ", ".join(dict.fromkeys(name for name, _ in feasible))
    at = " and ".join(f"{int(size):,}" if size.isdecimal() else size for size in sizes["parameters"])
    return (
        f"sharing on {config['env']['name']}: {engine.extent(plan)}; {names} with {at} parameters each, "
        f"and {BASELINE} with {sizes['full']:,}"
    )
