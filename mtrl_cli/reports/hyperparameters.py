"""Report sections on hyper-parameter searches: importance of keys, slices, and the best trials."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtrl_cli.errors import UserError
from mtrl_cli.reports import plots
from mtrl_cli.reports.elements import Cell, GivenNumber, Picture, Section, Table
from mtrl_cli.reports.run_data import LARGEST_NUMBER, short
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Axes, Choices, NumberRange, Plan
from mtrl_cli.sweeps.trial_run import read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel
    from matplotlib.figure import Figure

OTHER_SECTIONS = ("seed", "network/sharing", "network.parameters", "task_weights", "init_from", "transfer.")
"""Keys that other sections of a report compare, and prefixes of keys."""
FEWEST = 10  # trials for an importance
FEWEST_BEST = 5  # trials that count as good, as the authors of the evaluator advise
BEST = 10  # trials in the table
MOST_KEYS = 24  # in the plot
COLUMNS = 3
MOST_TICKS = 4  # of a logarithmic axis


@dataclass(frozen=True)
class Trial:
    """A completed trial: number, values by key, metric, and the command that repeats it."""

    number: int
    values: Mapping[str, Any]
    value: float
    command: str


def sections(sweep: Path, suffix: str = "") -> list[Section]:
    """Return the section on a sweep's search; none where the sweep varies only keys that other sections compare.

    Args:
        sweep: its folder, which may be untrusted.
        suffix: of the names of its tables and plots, where a report has several sweeps.
    """
    try:
        plan = sweep_plan.read(sweep)
    except UserError as error:
        return [Section(f"search{suffix}", f"Hyper-parameters of {sweep.name}", [f"The sweep's plan cannot be read: {error}"])]
    keys = [key for key in plan.axes if key != "seed"]
    if all(key.startswith(OTHER_SECTIONS) for key in keys):
        return []
    trials, metric, others = _trials(sweep, plan)
    lines = [f"{len(trials):,} completed trials of {plan.trials:,}, ranked by {metric or 'no metric yet'}{others}."]
    title = f"Hyper-parameters of {sweep.name}" if suffix else "Hyper-parameters"
    if not trials:
        return [Section(f"search{suffix}", title, [*lines, "No completed trial has a metric."])]
    varied = [key for key in keys if len({trial.values[key] for trial in trials}) > 1]
    same = [key for key in keys if key not in varied]
    if same:
        lines.append(f"One value in all completed trials, so left out: {', '.join(same)}.")
    parts: list[Table | Picture] = []
    importance, reason = _importance(trials, varied, plan.axes)
    if importance:
        parts.append(_importance_table(importance, len(trials), f"importance{suffix}"))
    else:
        lines.append(reason)
    if varied:
        shown = varied[:MOST_KEYS]
        best = max(trials, key=lambda trial: trial.value)
        text = f"Each completed trial's metric against each key. The best has {', '.join(_as_overrides(best.values, shown))}."
        picture = Picture(f"slices{suffix}", "Slices", text, lambda: _draw(trials, shown, plan.axes, metric), ["The best is in red."])
        parts.append(picture)
    parts.append(_best(trials, keys, metric, suffix))
    return [Section(f"search{suffix}", title, lines, parts)]


def _trials(sweep: Path, plan: Plan) -> tuple[list[Trial], str, str]:
    """Return the completed trials with a metric, the metric's name, and a phrase that counts other trials."""
    found, names, states = [], set(), Counter[str]()
    for number in range(plan.trials):
        try:
            record = read_record(sweep, number)
        except UserError:
            continue  # the report's table of runs lists it
        if record is None:
            continue
        states[record.state] += 1
        values = _values(record.values, plan.axes)
        if record.state == "completed" and record.value is not None and abs(record.value) < LARGEST_NUMBER and values is not None:
            found.append(Trial(number, values, record.value, short(record.command)))
            names.add(short(record.metric or "no metric"))
    others = [f"{states[state]:,} {state}" for state in ("pruned", "failed") if states[state]]
    return found, ", ".join(sorted(names)[:3]), f"; {' and '.join(others)}" if others else ""


def _values(texts: Mapping[str, str], axes: Axes) -> dict[str, Any] | None:
    """Return a trial's values, as numbers where the axis is a range; None where they are not on the axes."""
    try:
        values = {key: texts[key] if isinstance(axis, Choices) else GivenNumber(texts[key]) for key, axis in axes.items()}
    except (KeyError, ValueError):
        return None
    return values if all(_is_on(axis, values[key]) for key, axis in axes.items()) else None


def _is_on(axis: Choices | NumberRange, value: Any) -> bool:
    return value in axis.values if isinstance(axis, Choices) else axis.low <= value <= axis.high


# -- importance -----------------------------------------------------------------------------------------------------------------


def _good(trials: int) -> float:
    """Return the share of trials that count as good."""
    return min(0.5, max(0.1, FEWEST_BEST / trials))


def _importance(trials: Sequence[Trial], keys: Sequence[str], axes: Axes) -> tuple[dict[str, float], str]:
    """Compute each key's importance, with sum 1; or {}, and the reason."""
    if len(keys) < 2:
        return {}, f"Importance needs several keys that vary; {f'only {keys[0]} does' if keys else 'none does'}."
    if len(trials) < FEWEST:
        return {}, f"Importance needs at least {FEWEST} completed trials."
    if len({trial.value for trial in trials}) == 1:
        return {}, "All completed trials have the same metric, so no key matters."
    import optuna

    spaces = {key: _distribution(axes[key]) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize")
        for trial in trials:
            params = {key: trial.values[key] for key in keys}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=trial.value))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_good(len(trials)), region_quantile=1.0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(value) for key, value in found.items() if np.isfinite(value)}, "Importance cannot be computed from these trials."


def _importance_table(importance: Mapping[str, float], trials: int, name: str) -> Table:
    rows: list[list[Cell]] = [[key, value] for key, value in sorted(importance.items(), key=lambda item: -item[1])]
    notes = [
        "The share of the difference between good trials and all trials that each key explains alone (PED-ANOVA, Watanabe et al. 2023, by "
        f"Optuna). The best {_good(trials):.0%} are good.",
        "Effects of keys in combination, and values outside the trials, are not measured.",
    ]
    return Table(name, "Importance of hyper-parameters", ["key", "importance"], rows, notes)


def _distribution(axis: Choices | NumberRange) -> Any:
    from optuna import distributions

    if isinstance(axis, Choices):
        return distributions.CategoricalDistribution(axis.values)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


# -- the table and the picture --------------------------------------------------------------------------------------------------


def _best(trials: Sequence[Trial], keys: Sequence[str], metric: str, suffix: str) -> Table:
    ranked = sorted(trials, key=lambda trial: -trial.value)[:BEST]
    rows: list[list[Cell]] = [[trial.number, trial.value, *(trial.values[key] for key in keys), trial.command] for trial in ranked]
    notes = ["The metric of the best of many trials is biased upwards by chance. Train the best again with other seeds."]
    return Table(f"best_trials{suffix}", "The best trials", ["trial", metric, *keys, "command"], rows, notes)


def _as_overrides(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    known = ((key, values[key]) for key in keys)
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in known]


def _draw(trials: Sequence[Trial], keys: Sequence[str], axes: Axes, metric: str) -> Figure:
    """Draw each trial's metric against each key, a panel for each key; choices as strips with medians."""
    figure, panels = plots.grid(len(keys), COLUMNS, sharey=True)
    rows, columns = panels.shape
    figure.set_size_inches(3.6 * columns + 0.4, 2.9 * rows)
    for panel, key in zip(panels.flat, keys, strict=False):
        axis = axes[key]
        if isinstance(axis, Choices):
            _draw_strips(panel, trials, key, axis)
        else:
            values = [trial.values[key] for trial in trials]
            _draw_points(panel, values, trials)
            if axis.log:
                _log_axis(panel, values)
            else:
                panel.locator_params(axis="x", nbins=4)
        panel.set_xlabel(key, fontsize=9)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    figure.supylabel(metric, fontsize=9)
    return figure


def _draw_points(panel: Panel, places: Sequence[float], trials: Sequence[Trial]) -> None:
    best = max(range(len(trials)), key=lambda index: trials[index].value)
    values = [trial.value for trial in trials]
    panel.plot(places, values, "o", color=plots.COLOURS[0], alpha=0.8, markersize=6, markeredgewidth=0)
    panel.plot([places[best]], [values[best]], "o", color=plots.COLOURS[4], markersize=9)


def _log_axis(panel: Panel, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with few ticks such as `1e-4`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), max(values)
    powers = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    ticks = powers[:: 1 + (len(powers) - 1) // MOST_TICKS] if len(powers) > 1 else np.geomspace(low, high, 3)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(list(ticks)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _plain(value: float) -> str:
    """Format a number with two digits, and an exponent where it is far from 1: `0.05`, `1e-4`, `3.2e-5`."""
    if 0.01 <= value < 10_000:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _draw_strips(panel: Panel, trials: Sequence[Trial], key: str, axis: Choices) -> None:
    import matplotlib

    choices = [choice for choice in axis.values if any(trial.values[key] == choice for trial in trials)]
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(trials))  # separates points with equal metrics
    _draw_points(panel, [choices.index(trial.values[key]) + aside for trial, aside in zip(trials, spread, strict=True)], trials)
    for place, choice in enumerate(choices):
        middle = float(np.median([trial.value for trial in trials if trial.values[key] == choice]))
        panel.plot([place - 0.3, place + 0.3], [middle, middle], color=matplotlib.rcParams["text.color"], linewidth=1.5)
    panel.set_xlim(-0.6, len(choices) - 0.4)
    is_long = max(map(len, choices)) > 6
    shown = [short(choice) for choice in choices]
    panel.set_xticks(range(len(choices)), shown, rotation=35 if is_long else 0, ha="right" if is_long else "center")
