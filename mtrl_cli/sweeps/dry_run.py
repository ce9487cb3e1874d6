"""`mtrl sweep --dry-run`: list the trials of a sweep, with their progress if it has started. Creates nothing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtrl_cli.errors import UserError, printable
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.terminal import as_text, duration, table
from mtrl_cli.sweeps.display import TrialRow, cell, seconds_left
from mtrl_cli.sweeps.plan import RECORD, Choices, Plan, check_same
from mtrl_cli.sweeps.summary import metric_of
from mtrl_cli.sweeps.trial_run import read_record, trial_folder


def list_sweep(plan: Plan) -> str:
    """List each trial with its overrides, and with its state, score and time if the sweep has started.

    Raises:
        UserError: the plan's folder contains other files or another sweep.
    """
    folder = plan.run_dir
    if folder is not None and os.path.lexists(folder / RECORD):
        plan = check_same(plan, folder)
    elif folder is not None:
        RunFolder.check_new(folder)
    rows = [read_row(plan, number, folder) for number in range(plan.trials)]
    lines = _head(plan, folder)
    has_started = any(row.state != "waiting" for row in rows)
    if has_started or plan.points is not None:
        header = ["trial", *(("state", "score", "time") if has_started else ()), "overrides"]
        cells = [[cell(row, title, "(chosen when it starts)") for title in header] for row in rows]
        lines.append(as_text(table(cells, header)))
    lines += [f"trial {row.number}: {row.note}" for row in rows if row.note]
    return printable("\n".join([*lines, *_times(plan, rows)]))


def _head(plan: Plan, folder: Path | None) -> list[str]:
    search = plan.search
    sampler = "a grid" if plan.points is not None else f"sampled by {search['sampler']}, seed {search['seed']}"
    launcher = str(plan.launcher["_target_"]).split(".")[-2]  # such as local or slurm
    pruned = "" if search["pruner"] == "none" else f", pruned by {search['pruner']}"
    lines = [
        f"{plan.trials} trials, {sampler}{pruned}; ranked by {metric_of(plan)}",
        f"in {folder or 'a new folder under runs/sweeps'}, launcher={launcher}",
        f"shared overrides: {shlex.join(plan.shared) or 'none'}",
    ]
    if plan.points is None:
        for key, axis in plan.axes.items():
            if isinstance(axis, Choices):
                lines.append(f"  {key}: one of {', '.join(axis.values)}")
            else:
                kinds = [*(["integers"] if axis.is_integer else []), *(["logarithmic"] if axis.log else [])]
                lines.append(f"  {key}: from {axis.low:g} to {axis.high:g}{' (' + ', '.join(kinds) + ')' if kinds else ''}")
    return lines


def _times(plan: Plan, rows: Sequence[TrialRow]) -> list[str]:
    """Describe the time so far and the remaining time."""
    times = [row.seconds for row in rows if row.seconds]
    if not times:
        return ["time: unknown, no trial has started yet"]
    jobs = int(plan.launcher.get("jobs") or 1)
    left = seconds_left(rows, jobs)
    remaining = [f"remaining: about {duration(left)} with {jobs} at a time"] if left else []
    return [f"time: {duration(sum(times))} for {len(times)} trials so far", *remaining]


def read_row(plan: Plan, number: int, sweep: Path | None) -> TrialRow:
    """Read the state of a trial from a sweep's folder; None: the sweep has no folder yet."""
    values = {key: str(value) for key, value in plan.points[number].items()} if plan.points is not None else {}
    waiting = TrialRow(number, values, "waiting", steps=plan.steps(values))
    try:
        record = read_record(sweep, number) if sweep is not None else None
        if sweep is None or record is None:
            return waiting
        run = RunFolder(trial_folder(sweep, number)).read_record()
    except UserError as error:
        return replace(waiting, state="unreadable", note=str(error))
    row = record.row(plan)
    seconds = run.get("seconds")
    return replace(
        row,
        state="stopped" if row.state == "running" and run.get("status") == "stopped" else row.state,
        seconds=row.seconds or (float(seconds) if isinstance(seconds, int | float) and seconds else None),
    )
