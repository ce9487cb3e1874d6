"""Report sections on hyper-parameter searches: importance of keys, slices, and the best trials."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic
from mtrl_cli.reports import plots, run_data
from mtrl_cli.reports.elements import Cell, GivenNumber, Picture, Section, Table
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Choices, NumberRange, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OTHER_SECTIONS = ("seed", "network/sharing", "network.parameters", "task_weights", "init_from", "transfer.")
"""Keys that other sections of a report compare, and prefixes of keys."""
FEWEST = 10  # trials, of which an importance says anything
FEWEST_BEST = 5  # trials that count as good: what the authors of the evaluator advise
BEST = 10  # trials in the table
MOST_KEYS = 24  # in the picture
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
        sweep: its folder, which may come from a stranger.
        suffix: of the names of its tables and pictures, where a report has several sweeps.
    """
    try:
        plan = sweep_plan.read(sweep)
    except UserError as error:
        return [Section(f"search{suffix}", f"Hyper-parameters of {sweep.name}", [f"The sweep's plan cannot be read: {error}"])]
    keys = [key for key in plan.axes if key != "seed"]
    if all(key.startswith(OTHER_SECTIONS) for key in keys):
        return []
    trials, metric, others = _trials(sweep, plan)
    lines = [f"{len(trials):,} completed trials of {plan.trials:,}, judged by {metric or 'nothing yet'}{others}."]
    title = f"Hyper-parameters of {sweep.name}" if suffix else "Hyper-parameters"
    if not trials:
        return [Section(f"search{suffix}", title, [*lines, "None of them has a metric."])]
    varied = [key for key in keys if len({trial.values[key] for trial in trials}) > 1]
    same = [key for key in keys if key not in varied]
    if same:
        lines.append(f"One value in all completed trials, so left out: {', '.join(same)}.")
    parts: list[Table | Picture] = []
    importance, why_not = _importance(trials, varied, plan.axes)
    if importance:
        rows: list[list[Cell]] = [[key, value] for key, value in sorted(importance.items(), key=lambda item: -item[1])]
        notes = [
            "The share of the difference between good trials and all that each key explains by itself (PED-ANOVA, Watanabe et al. 2023, by "
            f"Optuna); good are the best {_good(len(trials)):.0%}.",
            "It says nothing of keys that matter only together, nor outside the values that were tried.",
        ]
        parts.append(Table(f"importance{suffix}", "Importance of hyper-parameters", ["key", "importance"], rows, notes))
    else:
        lines.append(why_not)
    if varied:
        shown = varied[:MOST_KEYS]
        best = max(trials, key=lambda trial: trial.value)
        text = f"Each completed trial's metric against each key. The best has {', '.join(_words(best.values, shown))}."
        picture = Picture(f"slices{suffix}", "Slices", text, lambda: _draw(trials, shown, plan.axes, metric), ["The best is in red."])
        parts.append(picture)
    parts.append(_best(trials, keys, metric, suffix))
    return [Section(f"search{suffix}", title, lines, parts)]


def _trials(sweep: Path, plan: Plan) -> tuple[list[Trial], str, str]:
    """Return the completed trials with a metric, the metric's name, and a phrase that counts other trials."""
    found, names, others = [], set(), {"pruned": 0, "failed": 0}
    for number in range(plan.trials):
        folder = run_data.trial_folder(sweep, number)
        if not os.path.lexists(folder / run_data.TRIAL):
            continue
        try:
            told = atomic.read_json(folder / run_data.TRIAL, folder)
        except UserError:
            continue  # the report's table of runs names it
        state, value = told.get("state"), told.get("value")
        if state in others:
            others[state] += 1
        if state == "completed" and isinstance(value, int | float) and abs(value) < 1e30:
            values = _values(told.get("values"), plan.axes)
            if values is not None:
                found.append(Trial(number, values, float(value), run_data.short(told.get("command"))))
                names.add(run_data.short(told.get("metric")))
    words = [f"{count:,} {state}" for state, count in others.items() if count]
    return found, ", ".join(sorted(names)[:3]), f"; {' and '.join(words)}" if words else ""


def _values(values: Any, axes: Mapping[str, Choices | NumberRange]) -> dict[str, Any] | None:
    """Return a trial's values, as numbers where the axis is a range; None where they are not on the axes."""
    if not isinstance(values, dict) or not values.keys() >= axes.keys():
        return None
    known: dict[str, Any] = {}
    for key, axis in axes.items():
        if isinstance(axis, Choices):
            known[key] = str(values[key])
            if known[key] not in axis.values:
                return None
            continue
        try:
            known[key] = GivenNumber(values[key])
        except (TypeError, ValueError):
            return None
        if not axis.low <= known[key] <= axis.high:
            return None
    return known


# -- importance -----------------------------------------------------------------------------------------------------------------


def _good(trials: int) -> float:
    """Return the share of trials that count as good."""
    return min(0.5, max(0.1, FEWEST_BEST / trials))


def _importance(trials: Sequence[Trial], keys: Sequence[str], axes: Mapping[str, Choices | NumberRange]) -> tuple[dict[str, float], str]:
    """Compute each key's importance, with sum 1, from the trials' values alone; or none, and the reason."""
    if len(keys) < 2:
        return {}, f"Importance needs several keys that vary; {f'only {keys[0]} does' if keys else 'none does'}."
    if len(trials) < FEWEST:
        return {}, f"Importance needs at least {FEWEST} completed trials."
    if len({trial.value for trial in trials}) == 1:
        return {}, "All completed trials have the same metric, so no key matters."
    if importlib.util.find_spec("optuna") is None:
        return {}, "Importance needs Optuna, which is not installed."
    import optuna

    spaces = {key: _distribution(axes[key]) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(direction="maximize")
            study.add_trials(
                [
                    optuna.trial.create_trial(params={key: trial.values[key] for key in keys}, distributions=spaces, value=trial.value)
                    for trial in trials
                ]
            )
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_good(len(trials)), region_quantile=1.0)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        finally:
            optuna.logging.set_verbosity(level)
    return {key: float(value) for key, value in found.items() if np.isfinite(value)}, "Importance cannot be told of these trials."


def _distribution(axis: Choices | NumberRange) -> Any:
    from optuna import distributions

    if isinstance(axis, Choices):
        return distributions.CategoricalDistribution(axis.values)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


# -- the table and the picture --------------------------------------------------------------------------------------------------


def _best(trials: Sequence[Trial], keys: Sequence[str], metric: str, suffix: str) -> Table:
    ranked = sorted(trials, key=lambda trial: -trial.value)[:BEST]
    rows: list[list[Cell]] = [[trial.number, trial.value, *(trial.values[key] for key in keys), trial.command] for trial in ranked]
    notes = ["The metric of the best of many trials is optimistic, as the best are also the luckiest. Train it again with other seeds."]
    return Table(f"best_trials{suffix}", "The best trials", ["trial", metric, *keys, "command"], rows, notes)


def _words(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    known = ((key, values[key]) for key in keys)
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in known]


def _draw(trials: Sequence[Trial], keys: Sequence[str], axes: Mapping[str, Choices | NumberRange], metric: str) -> Figure:
    """Draw each trial's metric against each key, a panel for each key; choices as strips with medians."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(keys))
    rows = -(-len(keys) // columns)
    drawing = Figure(figsize=(3.6 * columns + 0.4, 2.9 * rows), layout="constrained")
    panels = drawing.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, key in zip(panels.flat, keys, strict=False):
        axis = axes[key]
        if isinstance(axis, Choices):
            _draw_strips(panel, trials, key, axis)
        else:
            _draw_points(panel, [trial.values[key] for trial in trials], trials)
            if axis.log:
                _log_axis(panel, [trial.values[key] for trial in trials])
            else:
                panel.locator_params(axis="x", nbins=4)
        panel.set_xlabel(key, fontsize=9)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    for panel in list(panels.flat)[len(keys) :]:
        panel.set_visible(False)
    drawing.supylabel(metric, fontsize=9)
    return drawing


def _draw_points(panel: Axes, places: Sequence[float], trials: Sequence[Trial]) -> None:
    best = max(range(len(trials)), key=lambda index: trials[index].value)
    values = [trial.value for trial in trials]
    panel.plot(places, values, "o", color=plots.COLOURS[0], alpha=0.8, markersize=6, markeredgewidth=0)
    panel.plot([places[best]], [values[best]], "o", color=plots.COLOURS[4], markersize=9)


def _log_axis(panel: Axes, values: Sequence[float]) -> None:
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


def _draw_strips(panel: Axes, trials: Sequence[Trial], key: str, axis: Choices) -> None:
    import matplotlib

    words = [word for word in axis.values if any(trial.values[key] == word for trial in trials)]
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(trials))  # so that equal metrics are seen as several
    _draw_points(panel, [words.index(trial.values[key]) + aside for trial, aside in zip(trials, spread, strict=True)], trials)
    for place, word in enumerate(words):
        middle = float(np.median([trial.value for trial in trials if trial.values[key] == word]))
        panel.plot([place - 0.3, place + 0.3], [middle, middle], color=matplotlib.rcParams["text.color"], linewidth=1.5)
    panel.set_xlim(-0.6, len(words) - 0.4)
    is_long = max(map(len, words)) > 6
    shown = [run_data.short(word) for word in words]
    panel.set_xticks(range(len(words)), shown, rotation=35 if is_long else 0, ha="right" if is_long else "center")
