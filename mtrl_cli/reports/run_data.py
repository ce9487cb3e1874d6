"""Read runs from their folders for reports. Folders may be untrusted: sizes are bounded, text is sanitised, links are not followed."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, NonNegativeInt

from mtrl_cli.config import compose, safe_yaml
from mtrl_cli.errors import UserError, show
from mtrl_cli.files import atomic
from mtrl_cli.metric_names import EPSILON, EVAL_RETURN, EVAL_SCORE, TEST
from mtrl_cli.reports.wording import clipped
from mtrl_cli.runs.run_dir import RunFolder, parse_row
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.search_space import overrides_of
from mtrl_cli.sweeps.trial_run import RECORD, TRIALS, parse_record, trial_folder

DEEPEST = 6
"""Depth of the search for runs below a folder."""
MOST_FOLDERS, MOST_RUNS, MOST_TASKS = 50_000, 10_000, 500
LARGEST_METRICS = 256 * 2**20
LARGEST_NUMBER = 1e30
MAX_LENGTH = 2000  # characters of text from a run folder
POINTS = 10_000  # of all metrics of a run; longer series are thinned evenly
OF_ONE_RUN = re.compile(rb"^(?:seed|run_dir): .*\n", re.MULTILINE)
"""Lines that differ between the configurations of most trials."""
NO_RUNS_IN = {"checkpoints", "eval", "tensorboard", "videos", "report"}
SIGNS = ("config.yaml", "run.json", "metrics.jsonl")
"""A folder with one of these files is a run, though it may be unreadable."""
PARAMETERS = "parameters/"
OTHER_METRICS = ("train/", TEST, EPSILON, "eval/", PARAMETERS)
"""Prefixes of metrics that reports do not use, or read elsewhere."""


def short(value: Any) -> str:
    """Put text from a run folder on one line of bounded length, without control characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(value)[: 10 * MAX_LENGTH].split()))
    return clipped(text, MAX_LENGTH)


Number = Annotated[float, Field(gt=-LARGEST_NUMBER, lt=LARGEST_NUMBER)]


class TaskResult(BaseModel):
    """The test of one task: mean return and score, the 95% bootstrap interval of the mean return, and the number of episodes cut at
    eval.max_steps.
    """

    mean: Number
    score: Number | None = None
    ci: tuple[Number, Number] | None = None
    cut: NonNegativeInt = 0


class FinalTest(BaseModel):
    """The test of the last network: its step, the number of episodes per task, and the results by task."""

    step: NonNegativeInt
    episodes: NonNegativeInt
    tasks: dict[Annotated[str, AfterValidator(short)], TaskResult]


class _TestFile(BaseModel):
    last: FinalTest


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `step` per task, `seconds` of work until then, mean return and normalised score by task."""

    step: int
    seconds: float
    returns: Mapping[str, float]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        path: the folder.
        status: completed, running, stopped, failed, pruned, waiting, or unreadable (with the reason in `error`, and no other data).
        name: short name, unique in a report.
        error: why the run failed or is unreadable; for a completed run, that its metrics end too early.
        command: the `mtrl train …` that repeats the run.
        config: configuration by dotted key (`compose.flat`); empty where unreadable.
        overrides: overrides of a trial in which it differs from the sweep's other trials.
        number: number of a trial.
        env, tasks, seed, steps_per_task: from the configuration.
        step, seconds: progress in steps per task and in time.
        evaluations: in order of their steps.
        test: test of the last network; None if it is missing or older than the last evaluation.
        final_returns, final_scores: results by task, of the test or else of the last evaluation.
        parameters: parameter counts "total", "shared" and by task; empty where unknown.
        metrics: all other metrics by name as (step, value) in order: grad/cosine/a~b, routing/…, features/…, perf/….
    """

    path: Path
    status: str
    name: str = ""
    error: str | None = None
    command: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    number: int | None = None
    env: str = ""
    tasks: tuple[str, ...] = ()
    seed: int = 0
    steps_per_task: int = 0
    step: int = 0
    seconds: float = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    test: FinalTest | None = None
    final_returns: Mapping[str, float] = field(default_factory=dict)
    final_scores: Mapping[str, float] = field(default_factory=dict)
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
        """The first completed run, whose configuration has no open `auto`; without one, the first run."""
        return first_completed(self.runs)


def first_completed(runs: Sequence[RunData]) -> RunData:
    """Return the first completed run; without one, the first run."""
    return next((run for run in runs if run.status == "completed"), runs[0])


def read(paths: Sequence[Path]) -> list[RunData]:
    """Read each run at or below the paths once, in the order of the paths. Runs of a folder are ordered by name, runs of a sweep by number.

    Args:
        paths: folders of runs, sweeps or studies, or folders that contain them.

    Raises:
        UserError: a path is not a folder, or contains more than MOST_RUNS runs or MOST_FOLDERS folders.
    """
    check_folders(paths)
    found: dict[str, RunData] = {}
    for path in paths:
        for run in _read_below(path):
            found.setdefault(os.path.realpath(run.path), run)
            if len(found) > MOST_RUNS:
                raise UserError(f"{', '.join(map(str, paths))}: more than {MOST_RUNS:,} runs. Give fewer folders")
    runs = list(found.values())
    return [replace(run, name=name) for run, name in zip(runs, short_names([run.path for run in runs]), strict=True)]


def check_folders(paths: Sequence[Path]) -> None:
    """Raise UserError unless all paths are folders."""
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder. Give folders of runs or sweeps, or a folder that contains them")


def is_sweep(path: Path) -> bool:
    """Return whether a folder is a sweep."""
    return os.path.lexists(path / sweep_plan.RECORD)


def _read_below(path: Path) -> Iterator[RunData]:
    for visited, (place, names, _) in enumerate(os.walk(path), 1):
        if visited > MOST_FOLDERS:
            raise UserError(f"{path}: more than {MOST_FOLDERS:,} folders to search for runs. Give the run folders directly")
        folder, inner = Path(place), []
        if is_sweep(folder):
            yield from _read_sweep(folder)
        elif _has_any(folder, SIGNS):
            yield _read_run(folder, {})
        elif len(folder.parts) - len(path.parts) < DEEPEST:
            inner = [name for name in sorted(names) if name not in NO_RUNS_IN and not name.startswith(".")]
        names[:] = inner  # the folders that os.walk visits next


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any(os.path.lexists(folder / name) for name in names)


# -- a sweep --------------------------------------------------------------------------------------------------------------------


def _read_sweep(path: Path) -> Iterator[RunData]:
    """Read a sweep's trials by number, including those that have not started and have no folder."""
    known: dict[bytes, dict[Any, Any]] = {}
    _, names, _ = next(os.walk(path / TRIALS), ("", [], []))
    started = {int(name) for name in names if re.fullmatch("[0-9]{4,9}", name) and not (path / TRIALS / name).is_symlink()}
    planned = _planned(path)
    for number in sorted(started | planned.keys()):
        folder = trial_folder(path, number)
        # An empty folder is a trial that starts at this moment.
        if number in started and (number not in planned or _has_any(folder, (RECORD, *SIGNS))):
            yield _read_run(folder, known, number)
        else:
            yield RunData(folder, "waiting", overrides=planned[number], number=number)


def _planned(path: Path) -> dict[int, tuple[str, ...]]:
    """Return the overrides of a sweep's trials by number, empty where a sampler has not chosen them; {} for an unreadable plan."""
    try:
        plan = sweep_plan.read(path)
    except UserError:
        return {}
    if plan.points is None:
        return dict.fromkeys(range(plan.trials), ())
    return {number: tuple(map(short, overrides_of(point))) for number, point in enumerate(plan.points)}


# -- a run ----------------------------------------------------------------------------------------------------------------------


def _read_run(path: Path, known: dict[bytes, dict[Any, Any]], number: int | None = None) -> RunData:
    """Read one run; a damaged file makes it unreadable. `known` caches configurations that differ only in `OF_ONE_RUN`."""
    partial = RunData(path, "unreadable", number=number)
    try:
        trial = parse_record(path / RECORD, path)
        if trial is not None:
            partial = replace(partial, command=short(trial.command), overrides=tuple(map(short, trial.overrides)))
        record = RunFolder(path).read_record()
        status, reason = record.get("status", "running"), record.get("error")
        if trial is not None:
            status = status if trial.state == "running" else trial.state  # the sweep's record of a trial that has ended
            reason = trial.why or reason
        run = replace(partial, status=status, error=short(reason) if reason else None)
        if trial is not None and not os.path.lexists(path / "config.yaml"):  # just started, or its overrides give no valid configuration
            return run
        run = replace(run, **_configured(path / "config.yaml", known))
        run = replace(run, **_measured(run, record.get("seconds")))
        if not run.command:
            run = replace(run, command=short(record.get("command") or f"mtrl resume {shlex.quote(str(path))}"))
        if status == "completed" and not record.get("stopped_early") and run.step < run.steps_per_task:
            run = replace(run, error=f"its metrics end at step {run.step:,} of {run.steps_per_task:,}")
        return run
    except UserError as error:
        return replace(partial, error=short(str(error)))


def _configured(path: Path, known: dict[bytes, dict[Any, Any]]) -> dict[str, Any]:
    """Return the fields from a run's configuration."""
    try:
        config = dict(compose.flat(safe_yaml.read_alike(path, OF_ONE_RUN, known)))
    except TypeError:
        raise UserError(f"{path}: keys must be text") from None
    if not all(map(str.isprintable, config)):
        raise UserError(f"{path}: keys must be printable")
    for key in ("seed", "steps_per_task"):
        if type(config.get(key)) is not int:
            raise UserError(f"{path}: {key} must be an integer, got {show(config.get(key))}")
    tasks = config.get("env.tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        tasks = []
    return {
        "config": config,
        "env": short(config.get("env.name", "")),
        "tasks": tuple(map(short, tasks[:MOST_TASKS])),
        "seed": config["seed"],
        "steps_per_task": config["steps_per_task"],
    }


def _measured(run: RunData, seconds: Any) -> dict[str, Any]:
    """Return the fields from a run's metrics and its test. `seconds` is the time in run.json."""
    rows = _rows(run.path)
    end = rows[-1] if rows else {"step": 0}
    evaluations = tuple(_evaluation(row) for row in rows if any(name.startswith(EVAL_RETURN) for name in row))
    last = evaluations[-1] if evaluations else Evaluation(0, 0.0, {}, {})
    test = _test(run.path, last.step)
    seen = dict.fromkeys(name for each in evaluations for name in each.returns)
    counts = {name.removeprefix(PARAMETERS): int(value) for row in rows[:3] for name, value in row.items() if name.startswith(PARAMETERS)}
    return {
        "tasks": run.tasks if not seen or set(run.tasks) & set(seen) else tuple(seen)[:MOST_TASKS],
        "step": int(end["step"]),
        "seconds": max(float(seconds) if _is_number(seconds) else 0.0, end.get("seconds", 0.0)),
        "evaluations": evaluations,
        "test": test,
        "final_returns": last.returns if test is None else {task: own.mean for task, own in test.tasks.items()},
        "final_scores": last.scores if test is None else {task: own.score for task, own in test.tasks.items() if own.score is not None},
        "parameters": counts,
        "metrics": _metrics(rows),
    }


def _rows(path: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.jsonl with their finite numbers. Invalid lines, such as one that is being written, are skipped."""
    if not os.path.lexists(path / "metrics.jsonl"):
        return []
    lines = atomic.read_bytes(path / "metrics.jsonl", path, LARGEST_METRICS).splitlines()
    rows = [
        {name: value for name, value in row.items() if _is_number(value) and name.isprintable()}
        for row in map(parse_row, lines)
        if row is not None
    ]
    return [row for row in rows if "step" in row]


def _is_number(value: Any) -> bool:
    return type(value) in (float, int) and abs(value) < LARGEST_NUMBER


def _evaluation(row: Mapping[str, float]) -> Evaluation:
    returns = {name.removeprefix(EVAL_RETURN): value for name, value in row.items() if name.startswith(EVAL_RETURN)}
    scores = {task: row[EVAL_SCORE + task] for task in returns if EVAL_SCORE + task in row}
    return Evaluation(int(row["step"]), row.get("seconds", 0.0), returns, scores)


def _test(path: Path, step: int) -> FinalTest | None:
    """Read the test of the last network; None if it is missing, or older than the last evaluation at `step`."""
    file = path / "eval" / "test.json"
    if not os.path.lexists(file):
        return None
    test = atomic.read_model(_TestFile, file, path).last
    return test if test.step >= step else None


def _metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return the other metrics by name. Long series are thinned; their last value stays, as it is the end of training."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = int(row["step"])
        for name, value in row.items():
            if "/" in name and not name.startswith(OTHER_METRICS):
                found.setdefault(name, []).append((step, value))
    most = max(8, POINTS // max(1, len(found)))
    return {name: tuple(points[:: -math.ceil(len(points) / most)][::-1]) for name, points in found.items()}


def short_names(paths: Sequence[Path]) -> list[str]:
    """Name each path by its shortest unique end, in printable characters. A path that occurs twice has only its last part."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    lengths = range(1, max(map(len, parts), default=0) + 1)
    ends = [Counter(own[-length:] for own in parts) for length in lengths]
    unique = [next((own[-n:] for n, count in zip(lengths, ends, strict=True) if count[own[-n:]] == 1), own[-1:]) for own in parts]
    return [short("/".join(own)) for own in unique]
