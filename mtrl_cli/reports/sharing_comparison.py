"""Which groups of runs may be compared in one thing, such as their sharing structure, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtrl_cli.metric_names import STEPS_PER_SECOND
from mtrl_cli.reports import grouping
from mtrl_cli.reports.run_data import Group, Run
from mtrl_cli.stats import sharing as sharing_stats
from mtrl_cli.stats.bootstrap import Estimate, Floats


@dataclass(frozen=True)
class Way:
    """The runs of one choice of what is compared, all else being equal.

    Attributes:
        name: unique within its setting, such as film, or `independent (30k)`.
        option: the choice alone: film.
        runs: those that were completed, in order of their seeds.
        left_out: in words, the others, and why: `seed 2 (failed)`.
        total, shared, own: numbers of parameters, of the last the mean over tasks; None where no run tells.
        scores_SK: what the completed runs' tests, or else their last evaluations, came to, in each task's own unit.
        is_tested: whether all of them were tests.
    """

    name: str
    option: str
    runs: tuple[Run, ...]
    left_out: tuple[str, ...]
    total: int | None
    shared: int | None
    own: float | None
    scores_SK: Floats
    is_tested: bool


@dataclass(frozen=True)
class Setting:
    """What may be compared: the same pack, tasks, budget and every other value.

    Attributes:
        about: the values in which it differs from other settings of the report; empty where there is one.
        env, steps: the pack and the budget in steps per task.
        tasks: in order.
        scored: which of them have a normalised score; the others are told by their return.
        ways: in the order of their groups.
    """

    about: str
    env: str
    steps: int
    tasks: tuple[str, ...]
    scored: tuple[bool, ...]
    ways: tuple[Way, ...]


@dataclass(frozen=True)
class Comparison:
    """One way beside a baseline.

    Attributes:
        mean, iqm: differences of scores over tasks, ours less the baseline's; None where no task has a score.
        tasks: of each task, in its own unit.
        efficiency: times fewer steps to what the baseline ends with; None where curves have no steps in common.
        time, cost: seconds of a step while training, and of the whole budget, over the baseline's; None where unknown.
    """

    way: Way
    baseline: Way
    mean: Estimate | None
    iqm: Estimate | None
    tasks: tuple[Estimate, ...]
    efficiency: Estimate | None
    time: float | None
    cost: float | None


# -- what may be compared -------------------------------------------------------------------------------------------------------


def settings(groups: Sequence[Group], kind: str, sizes: bool) -> list[Setting]:
    """The groups put together by everything but what is compared, in their order.

    Args:
        kind: the group of the configuration that is compared: `network/sharing`, `task_weights`.
        sizes: whether the width of the network is no other value, either.
    """
    counted = grouping.counting([run for group in groups for run in group.runs])
    others = [_all_else(group.first, counted(group.first), kind, sizes) for group in groups]
    together: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group, values in zip(groups, others, strict=True):
        together.setdefault(tuple(sorted(values.items())), []).append(group)
    own = [dict(values) for values in together]
    abouts = _abouts(list(together.values()), own)
    return [_setting(of, kind, about) for of, about in zip(together.values(), abouts, strict=True)]


def _all_else(run: Run, values: Mapping[str, str], kind: str, sizes: bool) -> dict[str, str]:
    """A run's values of everything but what is compared."""
    section = kind.replace("/", ".") + "."
    widths = {"network.parameters", *grouping.widths(run)} if sizes else set()
    return {key: value for key, value in values.items() if key not in widths and not key.startswith(section)}


def _abouts(settings: Sequence[Sequence[Group]], own: Sequence[Mapping[str, str]]) -> list[str]:
    """What sets the settings apart, in words: each group's values but those that are compared, or else the keys that differ."""
    if len(settings) == 1:
        return [""]
    keys = dict.fromkeys(key for of_setting in own for key in of_setting)
    differing = [key for key in keys if len({of_setting.get(key) for of_setting in own}) > 1]
    words = []
    for groups, of_setting in zip(settings, own, strict=True):
        told = {key: value for key, value in groups[0].values.items() if any(_is_of(each, key) for each in differing)}
        words.append(told or {key: of_setting.get(key, "-").strip("'") for key in differing[:3]})
    return [", ".join(f"{key}={value}" for key, value in of_setting.items()) for of_setting in words]


def _is_of(key: str, chosen: str) -> bool:
    """Whether a dotted key lies in what is chosen by a word: `task_weights._target_` in `task_weights`."""
    section = chosen.replace("/", ".")
    return key == section or key.startswith(section + ".")


def _setting(groups: Sequence[Group], kind: str, about: str) -> Setting:
    first = next((group.first for group in groups if group.first.status == "completed"), groups[0].first)
    chosen = [grouping.chosen(group, first.tasks) for group in groups]
    told = [run for own in chosen for run in own.runs]
    scored = tuple(bool(told) and all(task in run.final_scores for run in told) for task in first.tasks)
    options = [grouping.option(kind, group.first) for group in groups]
    sizes = [_size(group.runs) for group in groups]
    names = _names(groups, options, sizes)
    ways = []
    for group, own, name, option, size in zip(groups, chosen, names, options, sizes, strict=True):
        scores = [
            [run.final_scores[t] if known else run.final_returns[t] for t, known in zip(first.tasks, scored, strict=True)]
            for run in own.runs
        ]
        ways.append(
            Way(
                name=name,
                option=option,
                runs=own.runs,
                left_out=_left_out(group, own),
                **size,
                scores_SK=np.array(scores, float).reshape(len(own.runs), len(first.tasks)),
                is_tested=all(run.is_tested for run in own.runs),
            )
        )
    return Setting(about, first.env, first.steps_per_task, first.tasks, scored, tuple(ways))


def _left_out(group: Group, chosen: grouping.Chosen) -> tuple[str, ...]:
    others = [(run, run.status) for run in group.runs if run.status != "completed"]
    others += [(run, "no results of all tasks") for run in chosen.untold] + [(run, "another run of it counts") for run in chosen.again]
    return tuple(f"seed {run.seed} ({why})" for run, why in sorted(others, key=lambda other: other[0].seed))


def _size(runs: Sequence[Run]) -> dict[str, Any]:
    counts: Mapping[str, int] = next((run.parameters for run in runs if run.parameters.get("total")), {})
    own = [value for name, value in counts.items() if name not in ("total", "shared")]
    return {"total": counts.get("total"), "shared": counts.get("shared"), "own": sum(own) / len(own) if own else None}


def _names(groups: Sequence[Group], options: Sequence[str], sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each option's own name where it is of one group; its size beside it where this tells it from others, or else the group's label."""
    with_size = grouping.sized(options, [size["total"] for size in sizes])
    return [name if with_size.count(name) == 1 else group.label for name, group in zip(with_size, groups, strict=True)]


# -- what comes out of it -------------------------------------------------------------------------------------------------------


def compare(setting: Setting, way: Way, baseline: Way) -> Comparison:
    """One way beside another, both with completed runs."""
    scored = np.array(setting.scored, bool)
    over_tasks = sharing_stats.gain(way.scores_SK[:, scored], baseline.scores_SK[:, scored]) if scored.any() else None
    ours, theirs = curve(setting, way), curve(setting, baseline)
    reached = None
    if ours is not None and theirs is not None:
        reached = sharing_stats.data_efficiency(ours, theirs)
    return Comparison(
        way=way,
        baseline=baseline,
        mean=None if over_tasks is None else over_tasks.mean,
        iqm=None if over_tasks is None else over_tasks.iqm,
        tasks=sharing_stats.gain(way.scores_SK, baseline.scores_SK).tasks,
        efficiency=reached,
        time=_ratio(step_seconds(way), step_seconds(baseline)),
        cost=_ratio(budget_seconds(way), budget_seconds(baseline)),
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def curve(setting: Setting, way: Way) -> tuple[Floats, Floats] | None:
    """Steps `[P]` and mean scores over the scored tasks `[S, P]` at the evaluations that all runs have; of a single task without a score
    its return. None where there are no such."""
    tasks = [task for task, known in zip(setting.tasks, setting.scored, strict=True) if known]
    unit: Callable[[Any], Mapping[str, float]] = (lambda each: each.scores) if tasks else (lambda each: each.returns)
    tasks = tasks or (list(setting.tasks) if len(setting.tasks) == 1 else [])
    of_runs = [
        {
            each.step: float(np.mean([unit(each)[task] for task in tasks]))
            for each in run.evaluations
            if tasks and unit(each).keys() >= set(tasks)
        }
        for run in way.runs
    ]
    steps = sorted(set.intersection(*(set(each) for each in of_runs))) if of_runs else []
    return (np.array(steps, float), np.array([[each[step] for step in steps] for each in of_runs])) if steps else None


def step_seconds(way: Way) -> float | None:
    """Seconds of a step in one task's environment while training, without evaluating and saving: the mean over runs."""
    rates = [[value for _, value in run.metrics.get(STEPS_PER_SECOND, ()) if value > 0] for run in way.runs]
    return float(np.mean([1 / np.median(of_run) for of_run in rates if of_run])) if any(rates) else None


def budget_seconds(way: Way) -> float | None:
    """Seconds of the whole budget, with evaluating and saving: the mean over runs."""
    known = [run.seconds for run in way.runs if run.seconds > 0]
    return float(np.mean(known)) if known else None


def at_the_end(way: Way, name: str) -> float | None:
    """A metric's last value, the mean over the runs that have it."""
    found = [run.metrics[name][-1][1] for run in way.runs if run.metrics.get(name)]
    return float(np.mean(found)) if found else None


def over_training(way: Way, name: str) -> float | None:
    """A metric's mean over training, the mean over the runs that have it."""
    found = [np.mean([value for _, value in run.metrics[name]]) for run in way.runs if run.metrics.get(name)]
    return float(np.mean(found)) if found else None


def between_tasks(setting: Setting, way: Way, name: str) -> Floats | None:
    """A metric of each pair of tasks at the end, `[K, K]`, 1 on the diagonal, NaN where there is none; None where there is none at all."""
    tasks = setting.tasks
    table = np.full((len(tasks), len(tasks)), np.nan)
    for a, one in enumerate(tasks):
        for b, other in enumerate(tasks[a + 1 :], a + 1):
            value = at_the_end(way, f"{name}/{one}~{other}")
            if value is not None:
                table[a, b] = table[b, a] = value
    if np.isnan(table).all():
        return None
    np.fill_diagonal(table, 1.0)
    return table


def routings(setting: Setting, way: Way) -> dict[str, Floats]:
    """How the structure spreads each task over its choices at the end: by name, `[K, choices]`."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for name in dict.fromkeys(name for run in way.runs for name in run.metrics if name.startswith("routing/")):
        before, _, choice = name.removeprefix("routing/").rpartition("/")
        row = next((k for k, task in enumerate(setting.tasks) if before.endswith(f"/{task}")), None)
        value = at_the_end(way, name)
        if row is not None and choice.isdecimal() and len(choice) < 4 and value is not None:
            found.setdefault(before[: -len(setting.tasks[row]) - 1], {})[row, int(choice)] = value
    tables = {}
    for name, shares in found.items():
        tables[name] = np.full((len(setting.tasks), 1 + max(choice for _, choice in shares)), np.nan)
        for place, value in shares.items():
            tables[name][place] = value
    return tables
