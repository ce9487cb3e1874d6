"""`mtrl sweep --dry-run`: list the trials of a sweep, with their progress if it has started. Creates nothing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtrl_cli.errors import UserError, printable
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.terminal import as_text, duration, fixed, table
from mtrl_cli.sweeps.display import ENDED, TrialRow
from mtrl_cli.sweeps.plan import RECORD, Choices, Plan, check_same
from mtrl_cli.sweeps.summary import metric_of
from mtrl_cli.sweeps.trial_run import read_record, trial_folder


def list_sweep(plan: Plan) -> str:
    """List each trial with its overrides, and with its state, score and time if the sweep has started.

    Raises:
        UserError: the plan's folder holds something else.
    """
    folder = plan.run_dir
    if folder is not None and os.path.lexists(folder / RECORD):
        plan = check_same(plan, folder)
    elif folder is not None:
        RunFolder.check_new(folder)
    rows = read_rows(plan, folder)
    lines = _head(plan, folder)
    known = any(row.state != "waiting" for row in rows)
    if known or plan.points is not None:
        header = ["trial", *(("state", "score", "time") if known else ()), "overrides"]
        cells = []
        for row in rows:
            progress = (row.state, fixed(row.score), duration(row.seconds)) if known else ()
            cells.append([str(row.number), *progress, " ".join(row.overrides) or "(chosen when it starts)"])
        lines.append(as_text(table(cells, header)))
    lines += [f"trial {row.number}: {row.note}" for row in rows if row.note]
    return printable("\n".join([*lines, *_times(plan, rows)]))


def _head(plan: Plan, folder: Path | None) -> list[str]:
    search = plan.search
    sampler = "a grid" if plan.points is not None else f"sampled by {search['sampler']}, seed {search['seed']}"
    pruned = "" if search["pruner"] == "none" else f", pruned by {search['pruner']}"
    lines = [
        f"{plan.trials} trials, {sampler}{pruned}; ranked by {metric_of(plan)}",
        f"in {folder or 'a new folder under runs/sweeps'}, launcher={launcher_name(plan)}",
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


def launcher_name(plan: Plan) -> str:
    """Return the launcher's name, such as local or slurm."""
    return str(plan.launcher["_target_"]).split(".")[-2]


def _times(plan: Plan, rows: Sequence[TrialRow]) -> list[str]:
    """Describe the time of the trials so far, and estimate the rest from their mean time per step."""
    timed = [row for row in rows if row.seconds]
    if not timed:
        return ["time: unknown, no trial has started yet"]
    spent, steps = sum(row.seconds or 0.0 for row in timed), sum(row.step for row in timed)
    lines = [f"time: {duration(spent)} for {len(timed)} trials so far"]
    left = sum(max(0, row.steps - row.step) for row in rows if row.state not in ENDED)
    if left and steps:
        jobs = plan.launcher.get("jobs")
        at_a_time = jobs if isinstance(jobs, int) and jobs > 0 else 1
        lines.append(f"remaining: about {duration(left * spent / steps / at_a_time)} with {at_a_time} at a time")
    return lines


def read_rows(plan: Plan, sweep: Path | None) -> list[TrialRow]:
    """Read the state of all trials from a sweep's folder; None: nothing has started."""
    return [_read_row(plan, number, sweep) for number in range(plan.trials)]


def _read_row(plan: Plan, number: int, sweep: Path | None) -> TrialRow:
    values = plan.points[number] if plan.points is not None else {}
    waiting = TrialRow(number, tuple(plan.overrides(values)), "waiting", steps=plan.steps(values))
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
