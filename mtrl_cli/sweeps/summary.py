"""What came out of a sweep: its best configuration, as a command to paste, and the trials that did not come so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from mtrl_cli.metric_names import MEAN_SCORE
from mtrl_cli.runs.terminal import fixed, table
from mtrl_cli.sweeps.display import TrialRow
from mtrl_cli.sweeps.plan import Plan, Value

TOP = 5
NAMED = 10  # failed trials, by their numbers and reasons


@dataclass(frozen=True)
class Standing:
    """One configuration of a sweep, its seeds averaged.

    Attributes:
        values: the keys that configurations differ in, without the seed.
        mean: of the metric, over its trials.
        low, high: the least and the largest.
        trials: how many were averaged.
    """

    values: Mapping[str, Value]
    mean: float
    low: float
    high: float
    trials: int

    def command(self, plan: Plan) -> str:
        """The command that trains it, with the seed that a run has by default."""
        return plan.command(self.values)


def standings(plan: Plan, finished: Iterable[tuple[Mapping[str, Value], float]]) -> list[Standing]:
    """The configurations of trials that were completed, the best first: of trials that differ in `seed` alone, the mean.

    Of a grid, a configuration that lacks some of its seeds comes after those that have all: one lucky seed is no better configuration.
    """
    by_values: dict[tuple[tuple[str, Value], ...], list[float]] = {}
    for values, metric in finished:
        by_values.setdefault(tuple((key, value) for key, value in values.items() if key != "seed"), []).append(metric)
    found = [
        Standing(dict(values), sum(metrics) / len(metrics), min(metrics), max(metrics), len(metrics))
        for values, metrics in by_values.items()
    ]
    whole = max((each.trials for each in found), default=0) if plan.points is not None else 1
    return sorted(found, key=lambda each: (each.trials < whole, -each.mean))


def best(plan: Plan, finished: Iterable[tuple[Mapping[str, Value], float]]) -> Standing | None:
    """The best configuration of the trials that were completed, each given as its values and its metric; None if there is none."""
    found = standings(plan, finished)
    return found[0] if found else None


def metric_of(plan: Plan) -> str:
    """What a sweep's trials are judged by, in words."""
    return plan.search["metric"] or f"{MEAN_SCORE} (or a lone task's return)"


def ending(plan: Plan, rows: Sequence[TrialRow]) -> RenderableType:
    """What is said at a sweep's end before the best configuration: the top few, how many trials were pruned or failed, and why."""
    found = _found(plan, rows)
    lines: list[RenderableType] = []
    if found:
        lines += [Text(f"The best by the last {metric_of(plan)}:", style="bold"), _table(plan, found[:TOP])]
        if len(found) > TOP:
            lines.append(Text(f"and {len(found) - TOP} more"))
    return Group(*lines, *(Text(line) for line in _others(rows)))


def best_as_command(plan: Plan, rows: Sequence[TrialRow]) -> str:
    """The best configuration as a command to paste, on a line of its own: to be printed without wrapping."""
    found = _found(plan, rows)
    if not found:
        return "no trial was completed with a metric, so that there is no best configuration"
    seeds = f" ({_over(plan, found[0])})" if found[0].trials > 1 or "seed" in plan.axes else ""
    return f"the best configuration, {fixed(found[0].mean)}{seeds}:\n{found[0].command(plan)}"


def _found(plan: Plan, rows: Sequence[TrialRow]) -> list[Standing]:
    return standings(plan, ((values_of(row), row.score) for row in rows if row.state == "completed" and row.score is not None))


def _table(plan: Plan, top: Sequence[Standing]) -> RenderableType:
    averaged = any(each.trials > 1 for each in top) or "seed" in plan.axes
    header = ["mean", "lowest to highest", "trials", "overrides"] if averaged else ["metric", "overrides"]
    rows = []
    for each in top:
        spread = [f"{fixed(each.low)} to {fixed(each.high)}", str(each.trials)] if averaged else []
        rows.append([fixed(each.mean), *spread, " ".join(plan.overrides(each.values)) or "-"])
    return table(rows, header, right=["mean", "metric", "trials"], fold=["overrides"])


def _over(plan: Plan, standing: Standing) -> str:
    of = "seed" if "seed" in plan.axes else "trial"
    return f"the mean of {standing.trials} {of}s" if standing.trials > 1 else f"of 1 {of}"


def _others(rows: Sequence[TrialRow]) -> list[str]:
    """Lines on the trials that were not completed, or without a metric."""
    lines = []
    for state in ("failed", "pruned", "elsewhere", "waiting", "running", "queued"):
        numbers = [row.number for row in rows if row.state == state]
        if numbers:
            lines.append(f"{state}: {len(numbers)} of {len(rows)} trials ({in_short(numbers)})")
        if state == "failed":
            named = [row for row in rows if row.state == state]
            lines += [f"  trial {row.number}: {' '.join(row.overrides)}: {row.note or 'no reason was told'}" for row in named[:NAMED]]
            lines += [f"  and {len(named) - NAMED} more"] if len(named) > NAMED else []
    without = [row.number for row in rows if row.state == "completed" and row.score is None]
    return [*lines, *([f"completed without a metric: trials {in_short(without)}"] if without else [])]


def in_short(numbers: Sequence[int], most: int = 20) -> str:
    """Numbers in order, those in a row as one: 1-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return ", ".join([*shown[:most], *(["…"] if len(shown) > most else [])])


def values_of(row: TrialRow) -> dict[str, Value]:
    """A trial's values by key, as words."""
    return {key: value for key, _, value in (word.partition("=") for word in row.overrides)}
