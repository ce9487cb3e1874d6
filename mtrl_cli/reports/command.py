"""`mtrl report`: one page, and its files, of any set of runs."""

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
from mtrl_cli.reports import grouping, html, hyperparameters, run_data
from mtrl_cli.reports import scores as report_scores
from mtrl_cli.reports import sharing as report_sharing
from mtrl_cli.reports import transfer as report_transfer
from mtrl_cli.reports.elements import Cell, Section, Table
from mtrl_cli.reports.grouping import grouped
from mtrl_cli.reports.run_data import Group, Run
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.sweeps.plan import without_password

RECORD = "report.json"
"""In a report's folder: which files are the report's, and of what it was made."""
STATES = {
    "completed": "",
    "running": "still running, or killed; not in the comparisons",
    "stopped": "stopped before its end; mtrl resume goes on with it",
    "failed": "failed",
    "pruned": "ended early by the sweep's pruner",
    "waiting": "not begun",
    "unreadable": "cannot be read",
}
MOST_NAMED = 12
MOST_SWEEPS = 20  # whose searches are told of


def parse(words: Sequence[str]) -> tuple[list[Path], Path | None]:
    """The paths that a command line names, and `out=PATH`. Raises UserError where there is no path, or two of `out`."""
    outs = [word.partition("=")[2] for word in words if word.startswith("out=")]
    paths = [Path(word) for word in words if not word.startswith("out=")]
    for word in words:
        if "=" in word and not word.startswith("out=") and not os.path.lexists(word):
            raise UserError(unknown("key", word.partition("=")[0], ["out"], otherwise="mtrl report accepts folders and out=PATH"))
    if len(outs) > 1 or "" in outs:
        raise UserError("out=PATH: expected one folder for the report")
    if not paths:
        raise UserError("which runs? Give their folders, or a sweep's: mtrl report runs/sweeps/mine")
    return paths, Path(outs[0]) if outs else None


def run(paths: Sequence[Path], out: Path | None, command: Sequence[str]) -> None:
    """Make a report of all runs at, or below, some paths.

    Args:
        paths: folders of runs, sweeps or studies, or any with runs below.
        out: the report's folder: new, empty, or an earlier report's; None: `report` in the one path that was given, else in the folder that
            the command was given in.
        command: the command line, kept with the report.

    Raises:
        UserError: there is no such folder, matplotlib is missing, or `out` holds something else. Nothing was changed.
    """
    html.require()
    paths = [Path(path).expanduser() for path in paths]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give those of runs, of sweeps, or one with runs below")
    folder = (paths[0] / "report" if len(paths) == 1 else Path("report")) if out is None else Path(out).expanduser()
    earlier = _check(folder, is_default=out is None)
    runs = run_data.read(paths)
    if not runs:
        raise UserError(f"{', '.join(map(str, paths[:3]))}: no run lies there; a run is what mtrl train, sweep or study has made")
    groups = grouped(runs)
    told = without_password(shlex.join(command))  # a report is for others to read
    title, lead = _title(paths, runs), _lead(runs, groups, told)
    sections = [*_compared(groups), *_searches(runs), _all_runs(runs, groups)]
    made = html.render(title, lead, sections)
    record = {"format": 1, "command": told, "runs": [str(run.path) for run in runs], "files": sorted(made)}
    _write(folder, made, {RECORD: atomic.to_json(record).encode()}, earlier)
    _say_what_is_there(folder, runs, groups)


def _compared(groups: Sequence[Group]) -> list[Section]:
    """Return the sections on transfer, sharing and scores, in this order where structures were compared; else diagnostics come last."""
    scores, sharing = report_scores.sections(groups), report_sharing.sections(groups)
    has_structures = any(part.name == "sharing" for section in sharing for part in section.parts)
    return [*report_transfer.sections(groups), *([*sharing, *scores] if has_structures else [*scores, *sharing])]


def _searches(runs: Sequence[Run]) -> list[Section]:
    """What the searches of the sweeps told, a section each."""
    sweeps = list(dict.fromkeys(run.path.parent.parent for run in runs if run.number is not None))
    suffixes = [f"_{number}" if len(sweeps) > 1 else "" for number in range(1, len(sweeps) + 1)]
    return [
        section
        for sweep, suffix in zip(sweeps[:MOST_SWEEPS], suffixes, strict=False)
        for section in hyperparameters.sections(sweep, suffix)
    ]


# -- the page's words -----------------------------------------------------------------------------------------------------------


def _title(paths: Sequence[Path], runs: Sequence[Run]) -> str:
    envs = list(dict.fromkeys(run.env for run in runs if run.env))
    where = os.path.basename(os.path.abspath(paths[0])) if len(paths) == 1 else f"{len(paths)} folders"
    return f"Report: {', '.join(envs[:3]) or 'nothing known'} ({where})"


def _lead(runs: Sequence[Run], groups: Sequence[Group], command: str) -> list[str]:
    """What was compared, in a few lines."""
    made = f"Made on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by mtrl {__version__}: {command}"
    states = Counter(run.status for run in runs)
    told = ", ".join(f"{states[state]:,} {state}" for state in STATES if states[state])
    lines = [f"{len(runs):,} {_plural('run', len(runs))} ({told}) of {len(groups):,} {_plural('configuration', len(groups))}."]
    if not states["completed"]:
        lines.append("No run is completed yet: nothing was compared.")
    arenas = report_scores.arenas(groups)
    for arena in arenas:
        seeds = [len(entry.runs) for entry in arena.entries]
        of_seeds = (
            f"{min(seeds)} to {max(seeds)} seeds each" if seeds and min(seeds) < max(seeds) else f"{max(seeds, default=0)} seeds each"
        )
        of_seeds = "one seed each" if set(seeds) == {1} else of_seeds
        compared = f"{len(seeds):,} {_plural('configuration', len(seeds))} with completed runs, {of_seeds}" if seeds else "no completed run"
        lines.append(f"{arena.name}: {compared}.{_caution(seeds)}")
    if len(arenas) > 1:
        lines.append("Runs of different packs, tasks or budgets cannot be compared with each other; each kind has sections of its own.")
    lines += _differences(groups)
    if len({grouping.option("init_from", group.first) for group in groups}) == 1:  # else the report is about transfer
        lines += report_sharing.summary(groups)
    bad = [run for run in runs if run.status in ("failed", "unreadable")]
    if bad:
        named = ", ".join(run.name for run in bad[:MOST_NAMED]) + (f" and {len(bad) - MOST_NAMED:,} more" if len(bad) > MOST_NAMED else "")
        lines.append(f"Failed or unreadable, with their reasons in the last table: {named}.")
    return [*lines, made]


def _caution(seeds: Sequence[int]) -> str:
    """What is to be known of few seeds before any metric."""
    if not seeds or min(seeds) >= report_scores.FEW_SEEDS:
        return ""
    if max(seeds) == 1:
        return " Of one seed each, a difference may be chance alone."
    return f" {report_scores.few_seeds(min(count for count in seeds if count > 1))}"


def _differences(groups: Sequence[Group]) -> list[str]:
    if len(groups) < 2:
        return []
    keys = list(groups[0].values)
    return [f"The configurations differ in {', '.join(keys)}; what else is different follows from these."] if keys else []


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _all_runs(runs: Sequence[Run], groups: Sequence[Group]) -> Section:
    """Every run, with the command that repeats it, and what became of those that are in no comparison."""
    labels = {run.path: group.label for group in groups for run in group.runs}
    rows = [_row(run, labels.get(run.path)) for run in runs]
    lines = ["Every run that was found. The command repeats the run; its score is the mean over tasks that have a reference."]
    others = [run for run in runs if run.status != "completed"]
    parts = [
        Table("runs", "All runs", ["run", "configuration", "status", "seed", "steps per task", "seconds", "score", "why", "command"], rows)
    ]
    if others:
        reasons = [[run.name, run.status, _reason(run), str(run.path)] for run in others]
        parts.insert(0, Table("not_compared", "Runs that are in no comparison", ["run", "status", "why", "folder"], reasons))
    return Section("runs", "All runs", lines, parts)


def _row(run: Run, label: str | None) -> list[Cell]:
    known = bool(run.config)
    score = sum(run.final_scores.values()) / len(run.final_scores) if run.final_scores else None
    about = label or " ".join(run.overrides)
    numbers: list[Cell] = [str(run.seed), run.step, round(run.seconds, 1), score] if known else ["", None, None, None]
    return [run.name, about, run.status, *numbers, _reason(run), run.command]


def _reason(run: Run) -> str:
    return run.error or STATES.get(run.status, "")


# -- its folder -----------------------------------------------------------------------------------------------------------------


def _check(folder: Path, *, is_default: bool) -> list[str]:
    """The files of the report that is there; `is_default`: nobody named the folder.

    Raises UserError where anything else is, or nothing can be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"out={folder} is not a folder")
    if is_default and folder.is_symlink():
        raise UserError(f"{folder} is a link; nothing is written through it: give the folder itself, out=PATH")
    if folder.is_dir() and os.listdir(folder):
        if not os.path.lexists(folder / RECORD):
            raise UserError(f"{folder} holds something other than a report: give another folder, out=PATH")
        made = atomic.read_json(folder / RECORD, folder).get("files")
        if not isinstance(made, list) or not all(isinstance(name, str) for name in made):
            raise UserError(f"{folder / RECORD} is damaged: give another folder, out=PATH, or remove {show(str(folder))}")
        _try_to_write(folder)
        return made
    above = folder
    while not os.path.lexists(above):
        above = above.absolute().parent
    _try_to_write(above)
    return []


def _try_to_write(folder: Path) -> None:
    """Make a folder in a folder and remove it. Raises UserError where that cannot be done, whatever permissions say."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=atomic.TEMPORARY, dir=folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give another folder, out=PATH") from None


def _write(folder: Path, made: dict[str, bytes], last: dict[str, bytes], earlier: Sequence[str]) -> None:
    """Put the files in their places, each in one move, the page last; what only an earlier report had goes."""
    folder.mkdir(parents=True, exist_ok=True)
    page = {name: made[name] for name in made if name == "index.html"}
    for name, content in ({name: made[name] for name in made if name not in page} | last | page).items():
        atomic.replace(folder / name, content)
    for name in set(earlier) - set(made):
        if name == os.path.basename(name) and name not in ("", ".", "..") and name.isprintable():
            (folder / name).unlink(missing_ok=True)


def _say_what_is_there(folder: Path, runs: Sequence[Run], groups: Sequence[Group]) -> None:
    states = Counter(run.status for run in runs)
    told = ", ".join(f"{states[state]:,} {state}" for state in STATES if states[state])
    print_line(f"{told}; {len(groups):,} {_plural('configuration', len(groups))}")
    for arena in report_scores.arenas(groups):
        for place, entry in enumerate(arena.entries[:5] if arena.scored else [], 1):
            print_line(
                f"  {place}. {entry.label}: {entry.aggregates['iqm'].value:.3f} (IQM, {len(entry.runs)} {_plural('seed', len(entry.runs))})"
            )
    print_line(f"report       {run_data.short(folder / 'index.html')}")
