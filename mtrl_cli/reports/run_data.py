"""Runs as a report sees them: read from their folders, which may come from strangers, and put together by configuration."""

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

DEEPEST = 6
"""So far below a folder runs are looked for."""
MOST_FOLDERS, MOST_RUNS, MOST_TASKS = 50_000, 10_000, 500
LARGEST_METRICS = 256 * 2**20
LONGEST = 2000  # letters of what a stranger may have written
POINTS = 10_000  # of a run's metrics in all: of those of many rows some are left out, evenly
OF_ONE_RUN = re.compile(rb"^(?:seed|run_dir): .*\n", re.MULTILINE)
"""The lines in which the configurations of a sweep's trials mostly differ."""
NO_RUNS_IN = {"checkpoints", "eval", "tensorboard", "videos", "report"}
SIGNS = ("config.yaml", "run.json", "metrics.jsonl")
"""One of these makes a folder a run, if perhaps one that cannot be read."""
TRIAL = "trial.json"
"""Beside these, in a sweep's trial."""
PASSED_OVER = ("train/", TEST, EPSILON, "eval/", "parameters/")
"""Metrics that reports do not need, or keep elsewhere."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `step` per task, `seconds` of work until then, mean return and normalised score by task, episodes that were cut."""

    step: int
    seconds: float
    returns: Mapping[str, float]
    scores: Mapping[str, float]
    cut: int = 0


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: its folder.
        name: short, and unique among the runs of a report.
        status: completed, running, stopped, failed, pruned, waiting; or unreadable: `error` says why, and nothing else is known.
        error: why it failed, or cannot be read; of a completed run, that its metrics end before it did.
        command: the `mtrl train …` that repeats it.
        config: its configuration by dotted key (`configuration.flat`); empty where unreadable.
        overrides: of a sweep's trial, the words in which it differs from the others.
        number: of a sweep's trial.
        env, tasks, seed, steps_per_task: of its configuration.
        step: per task, that it has reached; `seconds` of work until then.
        evaluations: in order of their steps.
        final_returns, final_scores: by task, of the test of the last network, or else of the last evaluation; `is_tested` says which.
        cut_episodes: of the test, those that ended at eval.max_steps.
        parameters: "total", "shared" and each task's own; empty where a run does not tell.
        metrics: all others by name as (step, value) in order: grad/cosine/a~b, routing/…, features/…, perf/….
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
class Group:
    """The runs of one configuration, which differ in their seeds alone.

    Attributes:
        label: what sets it apart from the other groups of a report, in a few words: `film`, `film, pcgrad`.
        values: the keys that differ between groups, as words: {"network/sharing": "film"}.
        runs: in order of their seeds.
    """

    label: str
    values: Mapping[str, str]
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The first that is completed, whose configuration is settled; where none is, the first."""
        return next((run for run in self.runs if run.status == "completed"), self.runs[0])


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs at, or below, some paths: each once, in the order of the paths, those of a folder by their names, of a sweep by number.

    Args:
        paths: folders of runs, of sweeps, of studies, or any with runs below.

    Raises:
        UserError: there is no such folder, or too much in it.
    """
    found: dict[str, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give those of runs, of sweeps, or one with runs below")
        for run in _read_below(path, [0]):
            found.setdefault(os.path.realpath(run.path), run)
            if len(found) > MOST_RUNS:
                raise UserError(f"there are more than {MOST_RUNS:,} runs in {', '.join(map(str, paths))}: give fewer folders")
    return _named(list(found.values()))


def trial_folder(sweep: Path, number: int) -> Path:
    """Where a sweep's trial lies."""
    return sweep / "trials" / f"{number:04d}"


def is_sweep(path: Path) -> bool:
    """Whether a folder is a sweep's."""
    return os.path.lexists(path / sweep_plan.RECORD)


def _read_below(path: Path, visited: list[int], depth: int = 0) -> Iterator[Run]:
    if is_sweep(path):
        yield from _read_sweep(path)
        return
    if any(os.path.lexists(path / sign) for sign in SIGNS):
        yield _read_run(path, {})
        return
    visited[0] += 1
    if visited[0] > MOST_FOLDERS:
        raise UserError(f"there are more than {MOST_FOLDERS:,} folders to look for runs in: give those of the runs themselves")
    if depth == DEEPEST:
        return
    for name in _folders(path):
        if name not in NO_RUNS_IN and not name.startswith("."):
            yield from _read_below(path / name, visited, depth + 1)


def _folders(path: Path) -> list[str]:
    """The names of the folders in a folder, in order; links are no folders."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


# -- a sweep --------------------------------------------------------------------------------------------------------------------


def _read_sweep(path: Path) -> Iterator[Run]:
    """A sweep's trials, by number; those that wait for their turn have no folder yet."""
    known: dict[bytes, dict[Any, Any]] = {}
    folders = {int(name): path / "trials" / name for name in _folders(path / "trials") if name.isdecimal() and len(name) < 10}
    planned = _planned(path)
    for number in sorted(folders.keys() | planned.keys()):
        # A folder in which there is nothing yet was made this moment.
        if number in folders and (number not in planned or any(os.path.lexists(folders[number] / sign) for sign in (TRIAL, *SIGNS))):
            yield _read_run(folders[number], known, number)
        else:
            overrides = planned[number]
            yield Run(
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
    """The overrides of a sweep's trials by number, none where a sampler has yet to choose them; {} for a plan that cannot be read."""
    try:
        plan = sweep_plan.read(path)
    except UserError:
        return {}
    if plan.points is None:
        return dict.fromkeys(range(plan.trials), ())
    return {number: tuple(short(word) for word in plan.overrides(point)) for number, point in enumerate(plan.points)}


# -- a run ----------------------------------------------------------------------------------------------------------------------


def _read_run(path: Path, known: dict[bytes, dict[Any, Any]], number: int | None = None) -> Run:
    """One run; whatever is wrong with its folder makes it unreadable, and is told. `known`: configurations, but for `OF_ONE_RUN`."""
    known_of_it = Run(path=path, name="", status="unreadable", error=None, command="", config={}, number=number)
    try:
        trial = atomic.read_json(path / TRIAL, path) if os.path.lexists(path / TRIAL) else {}
        known_of_it = replace(known_of_it, **_of_trial(trial))
        record = atomic.read_json(path / "run.json", path) if os.path.lexists(path / "run.json") else {}
        if trial and not os.path.lexists(path / "config.yaml"):  # just begun, or its words make no valid configuration
            status, error = _status(trial, record)
            return replace(known_of_it, status=status, error=error)
        config = _config(path / "config.yaml", known)
        run = replace(known_of_it, **_about(path, config, trial, record))
        run = replace(run, **_measured(path, run))
        if run.status == "completed" and not record.get("stopped_early") and run.step < run.steps_per_task:
            run = replace(run, error=f"its metrics end at step {run.step:,} of {run.steps_per_task:,}")
        return run
    except UserError as error:
        return replace(known_of_it, error=short(str(error)))


def _of_trial(trial: dict[str, Any]) -> dict[str, Any]:
    """What a sweep says of a trial of its own, whatever its run says."""
    overrides = trial.get("overrides")
    return {
        "command": short(trial.get("command") or ""),
        "overrides": tuple(short(word) for word in overrides) if isinstance(overrides, list) else (),
    }


def _config(path: Path, known: dict[bytes, dict[Any, Any]]) -> dict[str, Any]:
    try:
        config = dict(compose.flat(safe_yaml.read_alike(path, OF_ONE_RUN, known)))
    except TypeError:
        raise UserError(f"{path}: expected keys that are words") from None
    if not all(map(str.isprintable, config)):
        raise UserError(f"{path}: expected keys that can be printed")
    return config


def _about(path: Path, config: dict[str, Any], trial: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What a run's configuration and records say of it."""
    tasks = config.get("env.tasks")
    tasks = tasks if isinstance(tasks, list) and all(isinstance(task, str) for task in tasks) else []
    numbers = {key: config.get(key) for key in ("seed", "steps_per_task")}
    wrong = next((key for key, value in numbers.items() if type(value) is not int), None)
    if wrong is not None:
        raise UserError(f"{path / 'config.yaml'}: {wrong}={show(numbers[wrong])}: expected a whole number")
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
    """What has become of a run, and why. The sweep has the last word on its trials but for those that it has not heard the end of."""
    of_trial, of_run = trial.get("state"), record.get("status")
    status = of_trial if of_trial in ("completed", "pruned", "failed") else of_run
    if status not in (*STATUSES, "pruned"):
        status = "running" if status is None else "unreadable"
    why = trial.get("why") or record.get("error")
    if status == "unreadable":
        why = f"its status is none of {', '.join(STATUSES)}"
    return status, short(why) if why else None


def _measured(path: Path, run: Run) -> dict[str, Any]:
    """What a run's metrics say of it."""
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
    """The rows of metrics.jsonl, each with its finite numbers; lines that are no rows, as one that is being written, are passed over."""
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
    """The test of the last network; None where there is none, or the run has been trained on since."""
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
    """The other metrics by name, thinned where they are many; the last of each stays, as it is the end of training."""
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


# -- small things ---------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else None


def short(value: Any) -> str:
    """A stranger's words, on one line and of bounded length."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(value)[: 10 * LONGEST].split()))
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _named(runs: list[Run]) -> list[Run]:
    """Runs with names: each the shortest end of its path that no other has, in letters that can be written."""
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
