"""`mtrl compare`: differences of two runs in configuration, scores, speed and parameter counts, as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtrl_cli.errors import UserError, printable
from mtrl_cli.metric_names import STEPS_PER_SECOND
from mtrl_cli.reports import grouping, run_data
from mtrl_cli.reports.grouping import ABSENT
from mtrl_cli.reports.run_data import RunData
from mtrl_cli.reports.wording import clipped, word
from mtrl_cli.runs.terminal import as_text, duration, table
from mtrl_cli.sweeps.trial_run import trial_folder

NOT_COMPARED = ("run_dir", "trusted_packages")
LONGEST_CELL = 48
Row = tuple[str, ...]
"""A label, the values of both runs, and their difference."""


def compare(paths: Sequence[Path]) -> str:
    """Compare two runs in a table of plain text.

    Args:
        paths: the folders of two runs.

    Raises:
        UserError: a folder is not a run, or is unreadable.
    """
    runs = [_read(path) for path in paths]
    common = [task for task in runs[0].tasks if task in runs[1].tasks]
    scores, notes = _scores(runs, common), _notes(runs, common)
    sections = {
        "": _about(runs),
        "configuration": _differences(runs) or [("no difference", "", "", "")],
        "scores" + ("" if len(common) == len(runs[0].tasks) == len(runs[1].tasks) else ", of the common tasks"): scores,
        "speed": _speed(runs),
        "parameters": _parameters(runs, common),
    }
    lines: list[Row] = [("", *run_data.short_names([run.path for run in runs]), "")]
    for title, rows in sections.items():
        lines += [("", "", "", ""), (title, "", "", "")] if title and rows else []
        lines += [(f"  {first}", *others) for first, *others in rows]
    cells = [[clipped(cell, LONGEST_CELL) for cell in line] for line in lines]
    if any(" to " in cell for row in scores for cell in row[1:3]):
        notes.append("In brackets: 95% bootstrap intervals over the test episodes of one network. They do not show the spread over seeds.")
    return printable("\n".join([as_text(table(cells, ("", "", "", ""), show_header=False)), "", *notes]))


def _read(path: Path) -> RunData:
    path = Path(path).expanduser()
    if run_data.is_sweep(path):
        raise UserError(f"{path} is a sweep. Give two of its runs, such as {trial_folder(path, 0)}, or use mtrl report")
    runs = run_data.read([path])
    if len(runs) != 1 or runs[0].path != path:
        raise UserError(f"{path} is not a run. Give the folders of two runs, or use mtrl report for any number of runs")
    if runs[0].status == "unreadable":
        raise UserError(f"{path} cannot be read: {runs[0].error}")
    return runs[0]


# -- the rows -------------------------------------------------------------------------------------------------------------------


def _about(runs: Sequence[RunData]) -> list[Row]:
    return [
        ("status", *(run.status for run in runs), ""),
        ("steps per task", *(f"{run.step:,} of {run.steps_per_task:,}" for run in runs), ""),
        ("tasks", *(f"{run.env} ({len(run.tasks)})" for run in runs), ""),
    ]


def _differences(runs: Sequence[RunData]) -> list[Row]:
    """Return the keys with different values; for different classes, the names of the options."""
    rows: list[Row] = []
    with_other_class: list[str] = []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config.get(key, ABSENT) for run in runs]
        if key in NOT_COMPARED or values[0] == values[1] or "auto" in values:  # an unresolved `auto` is no difference
            continue
        section, _, last = key.rpartition(".")
        if last == "_target_" and section != "env":
            group = section.replace(".", "/")
            with_other_class.append(f"{section}.")
            rows.append((group, *(grouping.option(group, run) for run in runs), ""))
        elif last != "_target_" and not (ABSENT in values and key.startswith(tuple(with_other_class))):
            rows.append((key, *map(word, values), ""))
    return rows


def _scores(runs: Sequence[RunData], common: Sequence[str]) -> list[Row]:
    """Return the scores of each common task with intervals, returns where there are no scores, and the mean score."""
    rows: list[Row] = []
    pairs = []
    for task in common:
        scores = [run.final_scores[task] for run in runs if task in run.final_scores]
        if len(scores) == 2:
            rows.append((task, *(_cell(run, task, value, 3) for run, value in zip(runs, scores, strict=True)), _change(scores, 3)))
            pairs.append(scores)
        else:
            returns = [run.final_returns.get(task) for run in runs]
            cells = ("-" if value is None else _cell(run, task, value, 1) for run, value in zip(runs, returns, strict=True))
            rows.append((f"{task} (return)", *cells, _change(returns, 1)))
    if len(pairs) > 1:
        means = np.mean(pairs, axis=0).tolist()
        rows.append(("mean over tasks", *(f"{mean:.3f}" for mean in means), _change(means, 3)))
    return rows or [("none", "", "", "")]


def _change(values: Sequence[float | None], digits: int) -> str:
    before, after = values
    return "" if before is None or after is None else f"{after - before:+.{digits}f}"


def _cell(run: RunData, task: str, value: float, digits: int) -> str:
    """Format a score (three decimals) or a return (one decimal) with its interval over test episodes."""
    text = f"{value:.{digits}f}"
    result = run.test.tasks.get(task) if run.test is not None and run.test.episodes > 1 else None  # one episode has no spread
    if result is None or result.ci is None:
        return text
    ends = result.ci if digits == 1 else _in_scores(task, value, result.mean, result.ci)
    return text if ends is None else f"{text} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"


def _in_scores(task: str, score: float, mean: float, returns: Sequence[float]) -> list[float] | None:
    """Convert returns to scores with the reference scores that convert `mean` to `score`; None where these are unknown."""
    from mtrl_cli.envs.scores import scores

    for suite in ("atari", "minatar", "gymnasium"):
        random, reference = scores(suite, task)
        if random is not None and reference is not None:
            known, *others = [(value - random) / (reference - random) for value in (mean, *returns)]
            if math.isclose(known, score, rel_tol=1e-6, abs_tol=1e-6):
                return others
    return None


def _speed(runs: Sequence[RunData]) -> list[Row]:
    series = [[value for _, value in run.metrics.get(STEPS_PER_SECOND, ())] for run in runs]
    rates = [float(np.median(values)) if values else None for values in series]
    times = [run.seconds or None for run in runs]
    return [("steps per second, all tasks", *map(_count, rates), _ratio(*rates)), ("time", *map(duration, times), _ratio(*times))]


def _parameters(runs: Sequence[RunData], common: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for name, label in {"total": "total", "shared": "shared", **{task: f"only {task}" for task in common}}.items():
        counts = [run.parameters.get(name) for run in runs]
        if counts != [None, None] and (name in ("total", "shared") or len(set(counts)) > 1):
            rows.append((label, *map(_count, counts), _ratio(*counts)))
    return rows


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"x{theirs / ours:.2f}" if ours and theirs is not None else ""


# -- notes ----------------------------------------------------------------------------------------------------------------------


def _notes(runs: Sequence[RunData], common: Sequence[str]) -> list[str]:
    """Return notes on everything that limits the comparison."""
    notes = []
    ours, theirs = runs
    if ours.env != theirs.env or set(ours.tasks) != set(theirs.tasks):
        alone = [task for task in dict.fromkeys([*ours.tasks, *theirs.tasks]) if task not in common]
        notes.append(f"The runs have different tasks: {len(common)} in common; left out: {', '.join(alone[:12]) or 'none'}.")
    if ours.steps_per_task != theirs.steps_per_task:
        notes.append(f"Their budgets differ: {ours.steps_per_task:,} and {theirs.steps_per_task:,} steps per task.")
    for run, which in ((ours, "first"), (theirs, "second")):
        if run.status != "completed":
            notes.append(f"The {which} run is {run.status}{f' ({run.error})' if run.error else ''}: its scores are not final.")
        if run.test is None and run.evaluations:
            notes.append(f"The {which} run has no test: its last validation, at step {run.evaluations[-1].step:,}, is used.")
    episodes = [run.test.episodes for run in runs if run.test is not None]
    if len(set(episodes)) > 1:
        notes.append(f"Their tests have different numbers of episodes: {episodes[0]} and {episodes[1]} per task.")
    notes.append("One run each: other seeds may give other results. mtrl report compares several seeds.")
    return notes
