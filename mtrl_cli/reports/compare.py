"""`mtrl compare`: differences of two runs in configuration, scores, speed and parameter counts, as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtrl_cli.errors import UserError, printable
from mtrl_cli.files import atomic
from mtrl_cli.metric_names import STEPS_PER_SECOND
from mtrl_cli.reports import grouping, run_data
from mtrl_cli.reports.run_data import RunData
from mtrl_cli.runs.terminal import as_text, duration, table

NOT_COMPARED = ("run_dir", "trusted_packages")
LONGEST_CELL = 48
Row = tuple[str, str, str, str]


def compare(paths: Sequence[Path]) -> str:
    """Compare two runs in a table of plain text.

    Args:
        paths: the folders of two runs.

    Raises:
        UserError: a folder is not a run, or is unreadable.
    """
    ours, theirs = (_read(path) for path in paths)
    tests = _test(ours), _test(theirs)
    common = [task for task in ours.tasks if task in theirs.tasks]
    rows = [_heading(paths), *_about(ours, theirs), *_differences(ours, theirs), *_scores(ours, theirs, tests, common)]
    rows += [*_speed(ours, theirs), *_parameters(ours, theirs, common)]
    notes = _notes(ours, theirs, tests, common)
    if any(" to " in cell for row in rows for cell in row[1:3]):
        notes.append(
            "In brackets: 95% bootstrap intervals over test episodes. They cover the episodes of one network, not the chance in training."
        )
    return printable("\n".join([_table(rows), *notes]))


def _read(path: Path) -> RunData:
    path = Path(path).expanduser()
    if run_data.is_sweep(path):
        raise UserError(f"{path} is a sweep: mtrl compare takes two runs, such as {path / 'trials' / '0000'}; mtrl report takes sweeps")
    runs = run_data.read([path])
    if len(runs) != 1 or runs[0].path != path:
        raise UserError(f"{path} is not a run: mtrl compare takes the folders of two runs; mtrl report takes any number")
    if runs[0].status == "unreadable":
        raise UserError(f"{path} cannot be read: {runs[0].error}")
    return runs[0]


def _test(run: RunData) -> Mapping[str, Any]:
    """Return the test of the last network, with intervals and returns by task; {} without a test."""
    if not run.is_tested:
        return {}
    last: Mapping[str, Any] = atomic.read_json(run.path / "eval" / "test.json", run.path)["last"]
    return last


# -- the rows -------------------------------------------------------------------------------------------------------------------


def _heading(paths: Sequence[Path]) -> Row:
    """Name each run by the shortest end of its path that differs from the other's."""
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    depth = next((depth for depth in range(1, max(map(len, parts)) + 1) if parts[0][-depth:] != parts[1][-depth:]), 1)
    return ("", *(str(Path(*each[-depth:])) for each in parts), "")  # type: ignore[return-value]


def _about(ours: RunData, theirs: RunData) -> list[Row]:
    return [
        ("status", ours.status, theirs.status, ""),
        ("steps per task", *(f"{run.step:,} of {run.steps_per_task:,}" for run in (ours, theirs)), ""),  # type: ignore[list-item]
        ("tasks", *(f"{run.env} ({len(run.tasks)})" for run in (ours, theirs)), ""),  # type: ignore[list-item]
    ]


def _differences(ours: RunData, theirs: RunData) -> list[Row]:
    """Return the keys with different values; for different classes, the names of the options."""
    keys = dict.fromkeys([*ours.config, *theirs.config])
    rows, classes = [], set()
    for key in keys:
        values = ours.config.get(key, math.nan), theirs.config.get(key, math.nan)
        if key in NOT_COMPARED or values[0] == values[1] or "auto" in values:  # an unresolved `auto` is no difference
            continue
        group, _, last = key.rpartition(".")
        if last == "_target_" and group != "env":
            group = group.replace(".", "/")
            classes.add(key.removesuffix("_target_"))
            rows.append((group, grouping.option(group, ours), grouping.option(group, theirs), ""))
        elif last != "_target_" and not any(key.startswith(prefix) for prefix in classes if math.nan in values):
            rows.append((key, _word(values[0]), _word(values[1]), ""))
    return [_title("configuration"), *(rows or [("no difference", "", "", "")])]


def _word(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "-"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _scores(ours: RunData, theirs: RunData, tests: Sequence[Mapping[str, Any]], common: Sequence[str]) -> list[Row]:
    """Return the scores of each common task with intervals, returns where there are no scores, and the mean score."""
    rows = [_title("scores" + ("" if len(common) == len(ours.tasks) == len(theirs.tasks) else ", of the common tasks"))]
    pairs = []
    for task in common:
        scores = [run.final_scores.get(task) for run in (ours, theirs)]
        returns = [run.final_returns.get(task) for run in (ours, theirs)]
        if None not in scores:
            pairs.append(scores)
        values, unit, digits = (scores, "", 3) if None not in scores else (returns, " (return)", 1)
        cells = []
        for value, mean, test in zip(values, returns, tests, strict=True):
            cells.append("-" if value is None else f"{value:.{digits}f}{_ends(task, value, mean, test, digits)}")
        difference = "" if values[0] is None or values[1] is None else f"{values[1] - values[0]:+.{digits}f}"
        rows.append((f"{task}{unit}", *cells, difference))  # type: ignore[arg-type]
    if len(pairs) > 1:
        means = np.mean(np.array(pairs, float), axis=0)
        rows.append(("mean over tasks", f"{means[0]:.3f}", f"{means[1]:.3f}", f"{means[1] - means[0]:+.3f}"))
    return rows if len(rows) > 1 else [*rows, ("none", "", "", "")]


def _ends(task: str, value: float, mean: float | None, test: Mapping[str, Any], digits: int) -> str:
    """Format the interval over test episodes, which is saved for returns, in units of the value."""
    own = test.get("tasks", {}).get(task, {}) if isinstance(test.get("tasks"), dict) else {}
    ends = own.get("ci") if isinstance(own, dict) else None
    returns = own.get("returns") if isinstance(own, dict) else None
    if not (isinstance(ends, list) and len(ends) == 2 and all(_is_number(each) for each in ends)):
        return ""
    if mean is None or not isinstance(returns, list) or len(returns) < 2:
        return ""  # one episode has no spread
    if digits == 1:
        return f" ({ends[0]:.1f} to {ends[1]:.1f})"
    scale = _scale(task, value, mean, test)
    return "" if scale is None else f" ({value + (ends[0] - mean) * scale:.3f} to {value + (ends[1] - mean) * scale:.3f})"


def _scale(task: str, value: float, mean: float, test: Mapping[str, Any]) -> float | None:
    """Return scores per return, from the reference scores of the run's suite; None where they are unknown."""
    from mtrl_cli.envs.scores import normalised, scores

    for suite in ("atari", "minatar", "gymnasium"):
        random, reference = scores(suite, task)
        known = normalised(mean, random, reference)
        if random is not None and reference is not None and known is not None and abs(known - value) < 1e-6 * max(1.0, abs(value)):
            return 1 / (reference - random)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _speed(ours: RunData, theirs: RunData) -> list[Row]:
    rates = []
    for run in (ours, theirs):
        values = [value for _, value in run.metrics.get(STEPS_PER_SECOND, ())]
        rates.append(float(np.median(values)) if values else None)
    times = [run.seconds or None for run in (ours, theirs)]
    return [
        _title("speed"),
        ("steps per second, all tasks", *("-" if rate is None else f"{rate:,.0f}" for rate in rates), _ratio(*rates)),  # type: ignore[list-item]
        ("time", *("-" if time is None else duration(time) for time in times), _ratio(*times)),  # type: ignore[list-item]
    ]


def _parameters(ours: RunData, theirs: RunData, common: Sequence[str]) -> list[Row]:
    names = {"total": "total", "shared": "shared"} | {task: f"only {task}" for task in common}
    rows = []
    for name, label in names.items():
        counts = [run.parameters.get(name) for run in (ours, theirs)]
        if any(count is not None for count in counts) and (name in ("total", "shared") or len(set(counts)) > 1):
            rows.append((label, *("-" if count is None else f"{count:,}" for count in counts), _ratio(*counts)))
    return [_title("parameters"), *rows] if rows else []  # type: ignore[list-item]


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"x{theirs / ours:.2f}" if ours and theirs is not None else ""


def _title(text: str) -> Row:
    return (f"\n{text}", "", "", "")


# -- notes ----------------------------------------------------------------------------------------------------------------------


def _notes(ours: RunData, theirs: RunData, tests: Sequence[Mapping[str, Any]], common: Sequence[str]) -> list[str]:
    """Return what limits the comparison, and how to read the table."""
    notes = []
    if ours.env != theirs.env or set(ours.tasks) != set(theirs.tasks):
        alone = [task for task in dict.fromkeys([*ours.tasks, *theirs.tasks]) if task not in common]
        notes.append(f"The runs have different tasks: {len(common)} in common; left out: {', '.join(alone[:12]) or 'none'}.")
    if ours.steps_per_task != theirs.steps_per_task:
        notes.append(f"Their budgets differ: {ours.steps_per_task:,} and {theirs.steps_per_task:,} steps per task.")
    for run, which in ((ours, "first"), (theirs, "second")):
        if run.status != "completed":
            notes.append(f"The {which} run is {run.status}{f' ({run.error})' if run.error else ''}: its scores are not final.")
        if not run.is_tested and run.evaluations:
            notes.append(f"The {which} run has no test: its last validation, at step {run.evaluations[-1].step:,}, is used.")
    episodes = [test.get("episodes") for test in tests]
    if None not in episodes and episodes[0] != episodes[1]:
        notes.append(f"Their tests have different numbers of episodes: {episodes[0]} and {episodes[1]} per task.")
    notes.append("One run each: other seeds may give other results. mtrl report compares several seeds.")
    return ["", *notes]


def _table(rows: Sequence[Row]) -> str:
    lines: list[Sequence[str]] = []
    for row in rows:
        if row[0].startswith("\n"):
            lines += [("", "", "", ""), (row[0].strip(), "", "", "")]
        else:
            first = f"  {row[0]}" if lines and row[0] else row[0]
            lines.append([cell if len(cell) <= LONGEST_CELL else cell[: LONGEST_CELL - 1] + "…" for cell in (first, *row[1:])])
    return as_text(table(lines, ("", "", "", ""), show_header=False))
