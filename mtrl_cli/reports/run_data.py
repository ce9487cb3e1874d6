"""Read runs from their folders for reports. Folders may come from others: sizes are bounded, text is sanitised, links are not followed."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mtrl_cli.config import compose, safe_yaml
from mtrl_cli.errors import UserError, show
from mtrl_cli.files import atomic
from mtrl_cli.metric_names import EPSILON, EVAL_RETURN, EVAL_SCORE, TEST
from mtrl_cli.runs.run_dir import STATUSES
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.search_space import overrides_of

DEEPEST = 6
"""Depth of the search for runs below a folder."""
MOST_FOLDERS, MOST_RUNS, MOST_TASKS = 50_000, 10_000, 500
LARGEST_METRICS = 256 * 2**20
MAX_LENGTH = 2000  # characters of text from a run folder
POINTS = 10_000  # of all metrics of a run; longer series are thinned evenly
OF_ONE_RUN = re.compile(rb"^(?:seed|run_dir): .*\n", re.MULTILINE)
"""Lines that differ between the configurations of most trials."""
NO_RUNS_IN = {"checkpoints", "eval", "tensorboard", "videos", "report"}
SIGNS = ("config.yaml", "run.json", "metrics.jsonl")
"""A folder with one of these files is a run, though it may be unreadable."""
TRIAL = "trial.json"
"""Additional file of a sweep's trial."""
PASSED_OVER = ("train/", TEST, EPSILON, "eval/", "parameters/")
"""Prefixes of metrics that reports do not use, or read elsewhere."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `step` per task, `seconds` of work until then, mean return and normalised score by task, episodes that were cut."""

    step: int
    seconds: float
    returns: Mapping[str, float]
    scores: Mapping[str, float]
    cut: int = 0


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        path: the folder.
        name: short name, unique in a report.
        status: completed, running, stopped, failed, pruned, waiting, or unreadable (with the reason in `error`, and no other data).
        error: why the run failed or is unreadable; for a completed run, that its metrics end too early.
        command: the `mtrl train …` that repeats the run.
        config: configuration by dotted key (`compose.flat`); empty where unreadable.
        overrides: overrides of a trial in which it differs from the sweep's other trials.
        number: number of a trial.
        env, tasks, seed, steps_per_task: from the configuration.
        step, seconds: progress in steps per task and in time.
        evaluations: in order of their steps.
        final_returns, final_scores: results by task: of the last network's test where `is_tested`, else of the last evaluation.
        cut_episodes: test episodes that ended at eval.max_steps.
        parameters: parameter counts "total", "shared" and by task; empty where unknown.
        metrics: all other metrics by name as (step, value) in order: grad/cosine/a~b, routing/…, features/…, perf/….
    """

    path: Path
    name: str
    status: str
    error: str | None
    command: str
    config: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    number: int | None = None
    env: str = ""
    tasks: tuple[str, ...] = ()
    seed: int = 0
    steps_per_task: int = 0
    step: int = 0
    seconds: float = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    final_returns: Mapping[str, float] = field(default_factory=dict)
    final_scores: Mapping[str, float] = field(default_factory=dict)
    is_tested: bool = False
    cut_episodes: int = 0
    parameters: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration, which differ only in their seeds.

    Attributes:
        label: distinguishes the group in a report: `film`, `film, pcgrad`.
        values: keys that differ between groups, as text: {"network/sharing": "film"}.
        runs: in order of their seeds.
    """

    label: str
    values: Mapping[str, str]
    runs: tuple[RunData, ...]

    @property
    def first(self) -> RunData:
        """The first completed run, whose configuration has no open `auto`; where there is none, the first run."""
        return next((run for run in self.runs if run.status == "completed"), self.runs[0])


def read(paths: Sequence[Path]) -> list[RunData]:
    """Read the runs at or below some paths: each once, in the order of paths; in a folder by name, in a sweep by number.

    Args:
        paths: folders of runs, sweeps or studies, or folders that contain them.

    Raises:
        UserError: a path is not a folder, or contains too much.
    """
    check_folders(paths)
    found: dict[str, RunData] = {}
    for path in paths:
        for run in _read_below(path, [0]):
            found.setdefault(os.path.realpath(run.path), run)
            if len(found) > MOST_RUNS:
                raise UserError(f"more than {MOST_RUNS:,} runs in {', '.join(map(str, paths))}: give fewer folders")
    return _named(list(found.values()))


def check_folders(paths: Sequence[Path]) -> None:
    """Raise UserError unless all paths are folders."""
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give folders of runs or sweeps, or one that contains them")


def trial_folder(sweep: Path, number: int) -> Path:
    """Return the folder of a sweep's trial."""
    return sweep / "trials" / f"{number:04d}"


def is_sweep(path: Path) -> bool:
    """Return whether a folder is a sweep."""
    return os.path.lexists(path / sweep_plan.RECORD)


def _read_below(path: Path, visited: list[int], depth: int = 0) -> Iterator[RunData]:
    if is_sweep(path):
        yield from _read_sweep(path)
        return
    if any(os.path.lexists(path / sign) for sign in SIGNS):
        yield _read_run(path, {})
        return
    visited[0] += 1
    if visited[0] > MOST_FOLDERS:
        raise UserError(f"more than {MOST_FOLDERS:,} folders to search for runs: give the folders of the runs themselves")
    if depth == DEEPEST:
        return
    for name in _folders(path):
        if name not in NO_RUNS_IN and not name.startswith("."):
            yield from _read_below(path / name, visited, depth + 1)


def _folders(path: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without links."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


# -- a sweep --------------------------------------------------------------------------------------------------------------------


def _read_sweep(path: Path) -> Iterator[RunData]:
    """Read a sweep's trials by number, including those that have not started and have no folder."""
    known: dict[bytes, dict[Any, Any]] = {}
    folders = {int(name): path / "trials" / name for name in _folders(path / "trials") if name.isdecimal() and len(name) < 10}
    planned = _planned(path)
    for number in sorted(folders.keys() | planned.keys()):
        # An empty folder is a trial that starts at this moment.
        if number in folders and (number not in planned or any(os.path.lexists(folders[number] / sign) for sign in (TRIAL, *SIGNS))):
            yield _read_run(folders[number], known, number)
        else:
            overrides = planned[number]
            yield RunData(
                path=trial_folder(path, number),
                name="",
                status="waiting",
                error=None,
                command="",
                config={},
                overrides=overrides,
                number=number,
            )


def _planned(path: Path) -> dict[int, tuple[str, ...]]:
    """Return the overrides of a sweep's trials by number, empty where a sampler has not chosen them; {} for an unreadable plan."""
    try:
        plan = sweep_plan.read(path)
    except UserError:
        return {}
    if plan.points is None:
        return dict.fromkeys(range(plan.trials), ())
    return {number: tuple(short(word) for word in overrides_of(point)) for number, point in enumerate(plan.points)}


# -- a run ----------------------------------------------------------------------------------------------------------------------


def _read_run(path: Path, known: dict[bytes, dict[Any, Any]], number: int | None = None) -> RunData:
    """Read one run; any fault of its folder makes it unreadable. `known` caches configurations that differ only in `OF_ONE_RUN`."""
    partial = RunData(path=path, name="", status="unreadable", error=None, command="", config={}, number=number)
    try:
        trial = atomic.read_json(path / TRIAL, path) if os.path.lexists(path / TRIAL) else {}
        partial = replace(partial, **_of_trial(trial))
        record = atomic.read_json(path / "run.json", path) if os.path.lexists(path / "run.json") else {}
        if trial and not os.path.lexists(path / "config.yaml"):  # just started, or its overrides give no valid configuration
            status, error = _status(trial, record)
            return replace(partial, status=status, error=error)
        config = _config(path / "config.yaml", known)
        run = replace(partial, **_about(path, config, trial, record))
        run = replace(run, **_measured(path, run))
        if run.status == "completed" and not record.get("stopped_early") and run.step < run.steps_per_task:
            run = replace(run, error=f"its metrics end at step {run.step:,} of {run.steps_per_task:,}")
        return run
    except UserError as error:
        return replace(partial, error=short(str(error)))


def _of_trial(trial: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a sweep records for a trial."""
    overrides = trial.get("overrides")
    return {
        "command": short(trial.get("command") or ""),
        "overrides": tuple(short(word) for word in overrides) if isinstance(overrides, list) else (),
    }


def _config(path: Path, known: dict[bytes, dict[Any, Any]]) -> dict[str, Any]:
    try:
        config = dict(compose.flat(safe_yaml.read_alike(path, OF_ONE_RUN, known)))
    except TypeError:
        raise UserError(f"{path}: keys must be text") from None
    if not all(map(str.isprintable, config)):
        raise UserError(f"{path}: keys must be printable")
    return config


def _about(path: Path, config: dict[str, Any], trial: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields from a run's configuration and records."""
    tasks = config.get("env.tasks")
    tasks = tasks if isinstance(tasks, list) and all(isinstance(task, str) for task in tasks) else []
    numbers = {key: config.get(key) for key in ("seed", "steps_per_task")}
    wrong = next((key for key, value in numbers.items() if type(value) is not int), None)
    if wrong is not None:
        raise UserError(f"{path / 'config.yaml'}: {wrong} must be a whole number, got {show(numbers[wrong])}")
    status, error = _status(trial, record)
    return {
        "status": status,
        "error": error,
        "command": short(trial.get("command") or record.get("command") or f"mtrl resume {shlex.quote(str(path))}"),
        "config": config,
        "env": short(config.get("env.name", "")),
        "tasks": tuple(short(task) for task in tasks[:MOST_TASKS]),
        **numbers,
        "seconds": _number(record.get("seconds")) or 0.0,
    }


def _status(trial: dict[str, Any], record: dict[str, Any]) -> tuple[str, str | None]:
    """Return a run's status and the reason. For trials that have ended, the sweep's record takes precedence."""
    of_trial, of_run = trial.get("state"), record.get("status")
    status = of_trial if of_trial in ("completed", "pruned", "failed") else of_run
    if status not in (*STATUSES, "pruned"):
        status = "running" if status is None else "unreadable"
    why = trial.get("why") or record.get("error")
    if status == "unreadable":
        why = f"status is none of {', '.join(STATUSES)}"
    return status, short(why) if why else None


def _measured(path: Path, run: RunData) -> dict[str, Any]:
    """Return the fields from a run's metrics."""
    rows = _rows(path)
    evaluations = [_evaluation(row) for row in rows if any(name.startswith(EVAL_RETURN) for name in row)]
    counts = {
        name.removeprefix("parameters/"): int(value) for row in rows[:3] for name, value in row.items() if name.startswith("parameters/")
    }
    last = evaluations[-1] if evaluations else Evaluation(0, 0.0, {}, {})
    test = _test(path, last.step)
    seen = dict.fromkeys(name for each in evaluations for name in each.returns)
    return {
        "tasks": run.tasks if not seen or set(run.tasks) & set(seen) else tuple(seen)[:MOST_TASKS],
        "step": int(rows[-1]["step"]) if rows else 0,
        "seconds": max(run.seconds, rows[-1].get("seconds", 0.0) if rows else 0.0),
        "evaluations": tuple(evaluations),
        "final_returns": last.returns if test is None else test.returns,
        "final_scores": last.scores if test is None else test.scores,
        "is_tested": test is not None,
        "cut_episodes": 0 if test is None else test.cut,
        "parameters": counts,
        "metrics": _metrics(rows),
    }


def _rows(path: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.jsonl with their finite numbers. Invalid lines, such as one that is being written, are skipped."""
    if not os.path.lexists(path / "metrics.jsonl"):
        return []
    rows = []
    for line in atomic.read_bytes(path / "metrics.jsonl", path, LARGEST_METRICS).splitlines():
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if isinstance(row, dict) and type(step) is int:
            numbers = ((name, value) for name, value in row.items() if type(value) in (float, int) and abs(value) < 1e30)
            rows.append({name: value for name, value in numbers if name.isprintable()})
    return [row for row in rows if "step" in row]


def _evaluation(row: Mapping[str, float]) -> Evaluation:
    returns = {name.removeprefix(EVAL_RETURN): value for name, value in row.items() if name.startswith(EVAL_RETURN)}
    scores = {task: row[EVAL_SCORE + task] for task in returns if EVAL_SCORE + task in row}
    return Evaluation(int(row["step"]), row.get("seconds", 0.0), returns, scores)


def _test(path: Path, step: int) -> Evaluation | None:
    """Read the test of the last network; None where it is missing, or older than the last evaluation."""
    if not os.path.lexists(path / "eval" / "test.json"):
        return None
    last = atomic.read_json(path / "eval" / "test.json", path).get("last")
    tasks = last.get("tasks") if isinstance(last, dict) else None
    if not isinstance(last, dict) or not isinstance(tasks, dict) or (_number(last.get("step")) or 0) < step:
        return None
    own = {short(task): of_task for task, of_task in tasks.items() if isinstance(of_task, dict)}
    metrics = {name: {task: _number(of_task.get(name)) for task, of_task in own.items()} for name in ("mean", "score")}
    known = {name: {task: value for task, value in of_name.items() if value is not None} for name, of_name in metrics.items()}
    cut = sum(_number(of_task.get("cut")) or 0 for of_task in own.values())
    return Evaluation(int(last["step"]), 0.0, known["mean"], known["score"], int(cut))


def _metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return the other metrics by name. Long series are thinned; their last value stays, as it is the end of training."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = int(row["step"])
        for name, value in row.items():
            if "/" in name and not name.startswith(PASSED_OVER):
                found.setdefault(name, []).append((step, value))
    most = max(8, POINTS // max(1, len(found)))
    return {name: tuple(_thinned(points, math.ceil(len(points) / most))) for name, points in found.items()}


def _thinned(points: list[tuple[int, float]], stride: int) -> list[tuple[int, float]]:
    return points[(len(points) - 1) % stride :: stride]


# -- text and numbers ---------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else None


def short(value: Any) -> str:
    """Put text from a run folder on one line of bounded length, without control characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(value)[: 10 * MAX_LENGTH].split()))
    return text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH] + "…"


def _named(runs: list[RunData]) -> list[RunData]:
    """Name runs: each by the shortest unique end of its path, in printable characters."""
    parts = [Path(os.path.abspath(run.path)).parts for run in runs]
    lengths = [1] * len(runs)
    for length in range(1, max(map(len, parts), default=0) + 1):
        ends: dict[tuple[str, ...], list[int]] = {}
        for index, own in enumerate(parts):
            if lengths[index] == length:
                ends.setdefault(own[-length:], []).append(index)
        for same in ends.values():
            for index in same if len(same) > 1 else []:
                lengths[index] = length + 1
    return [replace(run, name=short("/".join(own[-length:]))) for run, own, length in zip(runs, parts, lengths, strict=True)]
