"""Results of a sweep: the best configurations, the command of the best one, and the trials that were not completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from mtrl_cli.metric_names import MEAN_SCORE
from mtrl_cli.runs.terminal import fixed, table
from mtrl_cli.sweeps.display import TrialRow
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.search_space import overrides_of

TOP = 5  # configurations in the table
NAMED = 10  # failed trials that are listed with their reasons


@dataclass(frozen=True)
class Standing:
    """The result of one configuration, averaged over seeds.

    Attributes:
        values: by key, without the seed.
        mean, low, high: the mean, lowest and highest metric of the trials.
        trials: the number of trials.
    """

    values: Mapping[str, str]
    mean: float
    low: float
    high: float
    trials: int


def standings(plan: Plan, rows: Sequence[TrialRow]) -> list[Standing]:
    """Rank the configurations of completed trials, the best first. Trials that differ only in `seed` are averaged.

    In a grid, configurations with missing seeds come last: a high score of a single seed is no evidence for a configuration.
    """
    by_values: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for row in rows:
        if row.state == "completed" and row.score is not None:
            by_values.setdefault(tuple((key, value) for key, value in row.values.items() if key != "seed"), []).append(row.score)
    found = [
        Standing(dict(values), sum(metrics) / len(metrics), min(metrics), max(metrics), len(metrics))
        for values, metrics in by_values.items()
    ]
    whole = max((each.trials for each in found), default=0) if plan.points is not None else 1
    return sorted(found, key=lambda each: (each.trials < whole, -each.mean))


def metric_of(plan: Plan) -> str:
    """Describe the metric that ranks trials."""
    return plan.search["metric"] or f"{MEAN_SCORE} (or a single task's return)"


def ending(plan: Plan, rows: Sequence[TrialRow]) -> RenderableType:
    """Render the best configurations, and the numbers of pruned and failed trials with the reasons of failures."""
    found = standings(plan, rows)
    lines: list[RenderableType] = []
    if found:
        lines += [Text(f"Best configurations by the last {metric_of(plan)}:", style="bold"), _table(plan, found[:TOP])]
        if len(found) > TOP:
            lines.append(Text(f"and {len(found) - TOP} more"))
    return Group(*lines, *(Text(line) for line in _others(rows)))


def best_as_command(plan: Plan, rows: Sequence[TrialRow]) -> str:
    """Format the best configuration as a command on a separate line, to be printed without wrapping. The command has the default seed."""
    found = standings(plan, rows)
    if not found:
        return "no best configuration: no trial was completed with a metric"
    seeds = f" ({_over(plan, found[0])})" if found[0].trials > 1 or "seed" in plan.axes else ""
    return f"the best configuration, {fixed(found[0].mean)}{seeds}:\n{plan.command(found[0].values)}"


def _table(plan: Plan, top: Sequence[Standing]) -> RenderableType:
    averaged = any(each.trials > 1 for each in top) or "seed" in plan.axes
    header = ["mean", "lowest to highest", "trials", "overrides"] if averaged else ["metric", "overrides"]
    rows = []
    for each in top:
        spread = [f"{fixed(each.low)} to {fixed(each.high)}", str(each.trials)] if averaged else []
        rows.append([fixed(each.mean), *spread, " ".join(overrides_of(each.values)) or "-"])
    return table(rows, header, right=["mean", "metric", "trials"], fold=["overrides"])


def _over(plan: Plan, standing: Standing) -> str:
    of = "seed" if "seed" in plan.axes else "trial"
    return f"the mean of {standing.trials} {of}s" if standing.trials > 1 else f"of 1 {of}"


def _others(rows: Sequence[TrialRow]) -> list[str]:
    """Describe the trials that were not completed or have no metric."""
    lines = []
    for state in ("failed", "pruned", "elsewhere", "waiting", "running", "queued"):
        numbers = [row.number for row in rows if row.state == state]
        if numbers:
            lines.append(f"{state}: {len(numbers)} of {len(rows)} trials ({in_short(numbers)})")
        if state == "failed":
            named = [row for row in rows if row.state == state]
            lines += [f"  trial {row.number}: {row.overrides}: {row.note or 'unknown reason'}" for row in named[:NAMED]]
            lines += [f"  and {len(named) - NAMED} more"] if len(named) > NAMED else []
    without = [row.number for row in rows if row.state == "completed" and row.score is None]
    return [*lines, *([f"completed without a metric: trials {in_short(without)}"] if without else [])]


def in_short(numbers: Sequence[int], most: int = 20) -> str:
    """Format numbers in order, with ranges: 1-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return ", ".join([*shown[:most], *(["…"] if len(shown) > most else [])])
