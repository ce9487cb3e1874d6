"""`mtrl report`: a page with tables and plots of any set of runs."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mtrl_cli import __version__
from mtrl_cli.errors import UserError, show, unknown
from mtrl_cli.files import atomic
from mtrl_cli.reports import comparison, grouping, html, hyperparameters, run_data, scores, sharing, transfer
from mtrl_cli.reports.comparison import Benchmark
from mtrl_cli.reports.elements import Cell, Section, Table
from mtrl_cli.reports.grouping import grouped
from mtrl_cli.reports.run_data import RunData, RunGroup
from mtrl_cli.reports.wording import counted, some
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.sweeps.plan import without_password

RECORD = "report.json"
"""Lists the files of a report and the runs that were read for it."""
STATES = {
    "completed": "",
    "running": "still running, or killed",
    "stopped": "stopped before its end; mtrl resume continues it",
    "failed": "failed",
    "pruned": "ended early by the sweep's pruner",
    "waiting": "not started",
    "unreadable": "cannot be read",
}
MAX_NAMED = 12
MAX_SWEEPS = 20  # that have a section on hyper-parameters


def parse(arguments: Sequence[str]) -> tuple[list[Path], Path | None]:
    """Split the arguments into paths and `out=PATH`. Raises UserError without a path, or with several `out`."""
    outs = [argument.partition("=")[2] for argument in arguments if argument.startswith("out=")]
    paths = [Path(argument) for argument in arguments if not argument.startswith("out=")]
    for argument in arguments:
        if "=" in argument and not argument.startswith("out=") and not os.path.lexists(argument):
            raise UserError(unknown("key", argument.partition("=")[0], ["out"], otherwise="mtrl report accepts folders and out=PATH"))
    if len(outs) > 1 or "" in outs:
        raise UserError("out must be one folder")
    if not paths:
        raise UserError("no runs given. Give folders of runs or sweeps, such as mtrl report runs/sweeps/mine")
    return paths, Path(outs[0]) if outs else None


def run(paths: Sequence[Path], out: Path | None, command: Sequence[str]) -> None:
    """Write a report of all runs at or below some paths.

    Args:
        paths: folders of runs, sweeps or studies, or folders that contain them.
        out: the report's folder: new, empty, or an earlier report; None: `report` in a single path, else in the working directory.
        command: the command line, saved in the report.

    Raises:
        UserError: a path is not a folder, matplotlib is missing, or `out` contains other files. Nothing was changed.
    """
    html.require()
    paths = [Path(path).expanduser() for path in paths]
    run_data.check_folders(paths)
    folder = (paths[0] / "report" if len(paths) == 1 else Path("report")) if out is None else Path(out).expanduser()
    earlier = _check(folder, is_default=out is None)
    runs = run_data.read(paths)
    if not runs:
        raise UserError(f"no run in {', '.join(map(str, paths[:3]))}. Give folders that mtrl train, sweep or study created")
    groups = grouped(runs)
    benchmarks = comparison.benchmarks(groups)
    shown_command = without_password(shlex.join(command))
    made = html.render(
        _title(paths, runs),
        _lead(runs, groups, benchmarks, shown_command),
        [*_compared(groups, benchmarks), *_searches(runs), _all_runs(runs, groups)],
    )
    record = {"format": 1, "command": shown_command, "runs": [str(run.path) for run in runs], "files": sorted(made)}
    _write(folder, {RECORD: atomic.to_json(record).encode(), **made}, earlier)
    _print_summary(folder, runs, groups, benchmarks)


def _compared(groups: Sequence[RunGroup], benchmarks: Sequence[Benchmark]) -> list[Section]:
    """Return the sections on transfer, sharing and scores, in this order if structures were compared; else diagnostics come last."""
    on_scores, on_sharing = scores.sections(benchmarks), sharing.sections(groups)
    has_structures = any(part.name == "sharing" for section in on_sharing for part in section.parts)
    return [*transfer.sections(groups), *([*on_sharing, *on_scores] if has_structures else [*on_scores, *on_sharing])]


def _searches(runs: Sequence[RunData]) -> list[Section]:
    """Return a section on the hyper-parameters of each sweep."""
    sweeps = list(dict.fromkeys(run.path.parent.parent for run in runs if run.number is not None))
    found: list[Section] = []
    for number, sweep in enumerate(sweeps[:MAX_SWEEPS], 1):
        found += hyperparameters.sections(sweep, f"_{number}" if len(sweeps) > 1 else "")
    return found


# -- summary and runs -----------------------------------------------------------------------------------------------------------


def _title(paths: Sequence[Path], runs: Sequence[RunData]) -> str:
    envs = list(dict.fromkeys(run.env for run in runs if run.env))
    where = os.path.basename(os.path.abspath(paths[0])) if len(paths) == 1 else f"{len(paths)} folders"
    return f"Report: {', '.join(envs[:3]) or 'unknown'} ({where})"


def _lead(runs: Sequence[RunData], groups: Sequence[RunGroup], benchmarks: Sequence[Benchmark], command: str) -> list[str]:
    """Summarise the runs and their comparison."""
    made = f"Made on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by mtrl {__version__}: {command}"
    states = Counter(run.status for run in runs)
    lines = [f"{counted(len(runs), 'run')} ({_states(runs)}) of {counted(len(groups), 'configuration')}."]
    if not states["completed"]:
        lines.append("No run is completed yet, so nothing is compared.")
    for benchmark in benchmarks:
        seeds = [len(variant.runs) for variant in benchmark.compared]
        low, high = min(seeds, default=0), max(seeds, default=0)
        each = counted(high, "seed") if low == high else f"{low} to {high} seeds"
        compared = f"{counted(len(seeds), 'configuration')} with completed runs, {each} each" if seeds else "no completed run"
        lines.append(" ".join([f"{benchmark.name}: {compared}.", *benchmark.cautions()]))
    if len(benchmarks) > 1:
        lines.append("Runs with different packs, tasks or budgets cannot be compared; each combination has its own sections.")
    if keys := list(groups[0].values) if groups else []:
        lines.append(f"The configurations differ in {', '.join(keys)}; all other differences follow from these.")
    if len({grouping.option("init_from", group.first) for group in groups}) == 1:  # else the report is about transfer
        lines += sharing.summary(groups)
    bad = [run for run in runs if run.status in ("failed", "unreadable")]
    if bad:
        lines.append(f"Failed or unreadable (reasons in the last section): {some([run.name for run in bad], MAX_NAMED)}.")
    return [*lines, made]


def _states(runs: Sequence[RunData]) -> str:
    states = Counter(run.status for run in runs)
    return ", ".join(f"{states[state]:,} {state}" for state in STATES if states[state])


def _all_runs(runs: Sequence[RunData], groups: Sequence[RunGroup]) -> Section:
    """List every run with the command that repeats it, and runs that are not compared with the reason."""
    labels = {run.path: group.label for group in groups for run in group.runs}
    rows = [_row(run, labels.get(run.path)) for run in runs]
    lines = ["The command repeats the run. The score is the mean over tasks that have reference scores."]
    others = [run for run in runs if run.status != "completed"]
    header = ["run", "configuration", "status", "seed", "steps per task", "seconds", "score", "reason", "command"]
    parts = [Table("runs", "All runs", header, rows)]
    if others:
        reasons = [[run.name, run.status, _reason(run), str(run.path)] for run in others]
        parts.insert(0, Table("not_compared", "Runs that are not compared", ["run", "status", "reason", "folder"], reasons))
    return Section("runs", "All runs", lines, parts)


def _row(run: RunData, label: str | None) -> list[Cell]:
    score = sum(run.final_scores.values()) / len(run.final_scores) if run.final_scores else None
    numbers: list[Cell] = [str(run.seed), run.step, round(run.seconds, 1), score] if run.config else ["", None, None, None]
    return [run.name, label or " ".join(run.overrides), run.status, *numbers, _reason(run), run.command]


def _reason(run: RunData) -> str:
    return run.error or STATES.get(run.status, "")


# -- files ----------------------------------------------------------------------------------------------------------------------


def _check(folder: Path, *, is_default: bool) -> list[str]:
    """Return the files of an earlier report in the folder.

    Args:
        folder: of the report.
        is_default: whether it is the default folder.

    Raises:
        UserError: the folder contains other files, or is not writable.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"out={folder} is not a folder")
    if is_default and folder.is_symlink():
        raise UserError(f"{folder} is a link, and reports are not written through links. Give its target, out=PATH")
    made: list[str] = []
    if folder.is_dir() and os.listdir(folder):
        if not os.path.lexists(folder / RECORD):
            raise UserError(f"{folder} contains files that are not a report. Give another folder, out=PATH")
        made = atomic.read_json(folder / RECORD, folder).get("files", [None])
        if not isinstance(made, list) or not all(isinstance(name, str) for name in made):
            raise UserError(f"{folder / RECORD} is damaged. Give another folder, out=PATH, or remove {show(str(folder))}")
    existing = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=atomic.TEMPORARY, dir=existing))
    except OSError as error:
        raise UserError(f"{existing} is not writable ({error.strerror}). Give another folder, out=PATH") from None
    return made


def _write(folder: Path, made: dict[str, bytes], earlier: Sequence[str]) -> None:
    """Write each file atomically, and remove files that only the earlier report had."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        atomic.replace(folder / name, content)
    for name in set(earlier) - made.keys():
        if name == os.path.basename(name) and name not in ("", ".", "..") and name.isprintable():
            (folder / name).unlink(missing_ok=True)


def _print_summary(folder: Path, runs: Sequence[RunData], groups: Sequence[RunGroup], benchmarks: Sequence[Benchmark]) -> None:
    print_line(f"{_states(runs)}; {counted(len(groups), 'configuration')}")
    for benchmark in benchmarks:
        for place, variant in enumerate(benchmark.ranked[:5] if benchmark.scored else [], 1):
            print_line(f"  {place}. {variant.name}: {variant.iqm:.3f} (IQM, {counted(len(variant.runs), 'seed')})")
    print_line(f"report       {run_data.short(folder / 'index.html')}")
