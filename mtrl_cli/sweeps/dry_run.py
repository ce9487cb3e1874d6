"""`mtrl sweep --dry-run`: what would run, and of a sweep that has begun how far it is and how long that took. Makes nothing."""

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
    """Each trial of a plan with its overrides and, where its folder holds it already, its state, its metric and the time that it took.

    Raises:
        UserError: its folder holds something else.
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
    chosen = "a grid" if plan.points is not None else f"chosen by {search['sampler']}, seed {search['seed']}"
    pruned = "" if search["pruner"] == "none" else f", pruned by {search['pruner']}"
    lines = [
        f"{plan.trials} trials, {chosen}{pruned}; judged by {metric_of(plan)}",
        f"in {folder or 'a new folder under runs/sweeps'}, launcher={launcher_name(plan)}",
        f"all have: {shlex.join(plan.words) or 'the defaults'}",
    ]
    if plan.points is None:
        for key, axis in plan.axes.items():
            if isinstance(axis, Choices):
                lines.append(f"  {key}: one of {', '.join(axis.words)}")
            else:
                kinds = [*(["whole"] if axis.is_integer else []), *(["even on a logarithmic scale"] if axis.log else [])]
                lines.append(f"  {key}: from {axis.low:g} to {axis.high:g}{' (' + ', '.join(kinds) + ')' if kinds else ''}")
    return lines


def launcher_name(plan: Plan) -> str:
    """The launcher as one would write it: local, slurm."""
    return str(plan.launcher["_target_"]).split(".")[-2]


def _times(plan: Plan, rows: Sequence[TrialRow]) -> list[str]:
    """How long the trials took that were worked on, and what the rest would take at their mean time of a step."""
    timed = [row for row in rows if row.seconds]
    if not timed:
        return ["how long it takes is not known: no trial was worked on yet"]
    spent, steps = sum(row.seconds or 0.0 for row in timed), sum(row.step for row in timed)
    lines = [f"worked on so far: {len(timed)} trials, {duration(spent)} in all"]
    left = sum(max(0, row.steps - row.step) for row in rows if row.state not in ENDED)
    if left and steps:
        jobs = plan.launcher.get("jobs")
        at_a_time = jobs if isinstance(jobs, int) and jobs > 0 else 1
        lines.append(f"the rest: about {duration(left * spent / steps / at_a_time)}, {at_a_time} at a time")
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
