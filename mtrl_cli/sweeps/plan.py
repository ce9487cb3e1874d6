"""Plan of a sweep: its overrides, the values that differ between runs, how they are chosen, and the file `sweep.json`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtrl_cli.config import compose as configuration
from mtrl_cli.config import schema as sections
from mtrl_cli.config import validation
from mtrl_cli.errors import UserError, show
from mtrl_cli.files import atomic
from mtrl_cli.parallel import torchrun
from mtrl_cli.sweeps.search_space import MOST_CHOICES, Choices, NumberRange, Value, split_overrides
from mtrl_cli.sweeps.validation import MOST_TRIALS, check_judged, check_runs, compose, points_of, resolve_search

__all__ = ["Axes", "Choices", "NumberRange", "Plan", "Points", "Value", "check_same", "load", "make", "points_of", "read", "save"]

Axes = Mapping[str, Choices | NumberRange]
Points = Callable[[Axes], Sequence[Mapping[str, Value]]]
"""Chooses the trials of a study from the axes."""

RECORD = "sweep.json"
FORMAT = 1
LONGEST_OVERRIDE = 10_000
SAFE_LAUNCHER = "local"
"""The only launcher that is read from sweep.json. Other launchers run commands from the file, so the user must give them."""

_PASSWORD_KEY = re.compile(r"((?:password|passwd|pwd)=)[^&]*", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs.

    Attributes:
        shared: the overrides of all runs, as for `mtrl train`.
        axes: the values of the keys that differ between runs, in the given order.
        points: a grid's values of each trial, in order; None: an Optuna sampler chooses the values of `search["trials"]` trials.
        search: the section `sweep` of conf/sweep.yaml, validated, with `auto` resolved.
        launcher: the section `launcher`, validated. Two processes on one sweep may have different launchers.
        trusted_packages: named by the user.
        env: the environment pack's name, or several joined by +.
        steps_per_task: the largest budget of a run.
        run_dir: the sweep's folder; None: a new folder under runs/sweeps.
    """

    shared: tuple[str, ...]
    axes: Mapping[str, Choices | NumberRange]
    points: tuple[Mapping[str, Value], ...] | None
    search: Mapping[str, Any]
    launcher: Mapping[str, Any]
    trusted_packages: tuple[str, ...]
    env: str
    steps_per_task: int
    run_dir: Path | None

    @property
    def trials(self) -> int:
        """The number of trials."""
        return len(self.points) if self.points is not None else int(self.search["trials"])

    def overrides(self, values: Mapping[str, Value]) -> list[str]:
        """Return the overrides of a trial: `["network/sharing=film", "seed=3"]`."""
        return [f"{key}={value}" for key, value in values.items()]

    def steps(self, values: Mapping[str, Value]) -> int:
        """Return a trial's budget in steps per task."""
        given = values.get("steps_per_task", self.steps_per_task)
        try:
            return int(float(given))  # a budget may be written as 1e6
        except (ValueError, OverflowError):  # quoted text
            return self.steps_per_task

    def configuration(self, values: Mapping[str, Value], run_dir: Path) -> dict[str, Any]:
        """Compose and validate the configuration of a trial. Every `auto` is kept.

        Raises:
            UserError: the values are not a valid configuration.
        """
        config = compose(self.shared, values, self.trusted_packages)
        check_judged(config, self.search)
        source = config["init_from"]  # workers may run in another folder
        return config | {"run_dir": str(run_dir), "init_from": None if source is None else os.path.abspath(source)}

    def command(self, values: Mapping[str, Value]) -> str:
        """Return the command that trains this run alone."""
        trusted = [f"trusted_packages=[{','.join(self.trusted_packages)}]"] if self.trusted_packages else []
        return shlex.join(["mtrl", "train", *self.shared, *self.overrides(values), *trusted])


def make(overrides: Sequence[str], choose: Points | None = None) -> Plan:
    """Make the plan of `mtrl sweep` from its overrides, and validate its runs.

    Args:
        overrides: as on the command line.
        choose: of a study, chooses the trials from the axes; None: all combinations, or those of a sampler.

    Raises:
        UserError: an override is wrong, no key has several values, or a run cannot be composed.
    """
    _refuse_ranks()
    split = split_overrides(overrides)
    section = configuration.compose_sweep(split.sweep)
    if not split.axes:
        configuration.compose_training(split.shared)  # raises an error of the run first
        raise UserError("no key has several values; give some, such as 'seed=range(5)' or network/sharing=hard,film")
    trusted = section["trusted_packages"]
    search = resolve_search(section["sweep"], split.axes)
    if choose is not None and (search["sampler"] != "grid" or section["sweep"]["trials"] is not None):
        raise UserError("sweep.sampler, sweep.trials: a study chooses its own trials; omit them")
    chosen = None if choose is None else tuple({key: point[key] for key in split.axes} for point in choose(split.axes))
    checked = check_runs(split.shared, split.axes, trusted, search, chosen)
    points = chosen or (points_of(checked.axes, search["trials"]) if search["sampler"] == "grid" else None)
    return Plan(
        shared=split.shared,
        axes=checked.axes,
        points=points,
        search=search if chosen is None else {**search, "trials": len(chosen)},
        launcher=section["launcher"],
        trusted_packages=tuple(trusted),
        env="+".join(checked.envs),
        steps_per_task=checked.steps_per_task,
        run_dir=None if section["run_dir"] is None else Path(section["run_dir"]),
    )


def _refuse_ranks() -> None:
    if torchrun.place().size > 1:
        raise UserError("mtrl sweep starts a process for each run; start it without torchrun")


# -- in the sweep's folder ------------------------------------------------------------------------------------------------------


def save(plan: Plan, folder: Path, command: Sequence[str]) -> None:
    """Write `sweep.json`, keeping the command of an earlier one. Raises OSError."""
    path = folder / RECORD
    before = atomic.read_json(path, folder) if os.path.lexists(path) else {}
    record = {
        "format": FORMAT,
        "command": before.get("command") or shlex.join(without_password(override) for override in command),
        "shared": list(plan.shared),
        "axes": {key: _as_json(axis) for key, axis in plan.axes.items()},
        "points": None if plan.points is None else [dict(point) for point in plan.points],
        "search": {**plan.search, "trials": plan.trials, "storage": without_password(plan.search["storage"])},
        "launcher": dict(plan.launcher),
        "env": plan.env,
        "steps_per_task": plan.steps_per_task,
    }
    atomic.replace(path, atomic.to_json(record).encode())


def without_password(text: Any) -> Any:
    """Hide the password in a URL or an override: `postgresql://me:***@host/sweeps`, `?password=***`. None stays None.

    Passwords may contain any character: everything up to the last @, or up to the next &, is hidden.
    """
    if text is None:
        return None
    return _PASSWORD_KEY.sub(r"\1***", re.sub(r"(://[^\s:/@]*):.*@", r"\1:***@", text, flags=re.DOTALL))


def _as_json(axis: Choices | NumberRange) -> dict[str, Any]:
    if isinstance(axis, Choices):
        return {"choices": list(axis.values)}
    return {"low": axis.low, "high": axis.high, "log": axis.log, "integer": axis.is_integer}


def load(folder: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read the plan of a sweep's folder, to resume it. The folder may be untrusted: code and addresses in it are not used.

    Args:
        folder: the sweep's folder.
        overrides: of `launcher`, `launcher.*`, `sweep.retries` and `sweep.trials` (no fewer than before), and of the keys that are not
            taken from the folder: `trusted_packages`, `hydra.searchpath` and `sweep.storage`.

    Raises:
        UserError: the folder is not a sweep, sweep.json is damaged, or another key is overridden.
    """
    _refuse_ranks()
    kept = read(folder)
    split = split_overrides(overrides)
    _check_overrides(overrides, split.axes)
    given = {override.lstrip("+~").partition("=")[0] for override in split.sweep}
    launcher = [] if "launcher" in given else _launcher_overrides(folder, kept.launcher, given)
    section = configuration.compose_sweep([*launcher, *split.sweep])
    search = {**kept.search, "storage": section["sweep"]["storage"]}
    for key in ("retries", "trials"):
        if f"sweep.{key}" in given and section["sweep"][key] is not None:
            search[key] = section["sweep"][key]
    _check_named(folder, kept, split.sweep, section["sweep"]["storage"])
    trusted = section["trusted_packages"]
    plan = replace(kept, search=search, launcher=section["launcher"], trusted_packages=tuple(trusted), run_dir=folder)
    return _with_trials(plan, folder, kept.trials, search["trials"])


def check_same(plan: Plan, folder: Path) -> Plan:
    """Check that a folder holds the sweep of a plan, and return the plan with the larger number of trials of both.

    Raises:
        UserError: the folder holds another sweep, or sweep.json is damaged.
    """
    kept = read(folder)
    elsewhere = "give the same values, or another run_dir"
    if different := sorted(set(plan.shared) ^ set(kept.shared)):
        keys = ", ".join(dict.fromkeys(override.lstrip("+~").partition("=")[0] for override in different))
        raise UserError(f"run_dir={folder} holds a sweep with other overrides of {show(keys)}: {elsewhere}")
    if list(plan.axes) != list(kept.axes):
        was = ", ".join(kept.axes)
        raise UserError(f"run_dir={folder} holds a sweep over {show(was)}, in this order: {elsewhere}")
    for key, axis in plan.axes.items():
        if axis != kept.axes[key]:
            raise UserError(
                f"run_dir={folder} holds a sweep with other values of {key}; for more values give another run_dir "
                "(mtrl report accepts several sweeps)"
            )
    if (_is_chosen(plan) or _is_chosen(kept)) and plan.points != kept.points:
        raise UserError(f"run_dir={folder} holds a sweep of other combinations of the same values, such as a study's: {elsewhere}")
    for key, value in kept.search.items():
        mine = without_password(plan.search[key]) if key == "storage" else plan.search[key]
        if key not in ("trials", "retries") and mine != value:
            raise UserError(f"run_dir={folder} holds a sweep with another sweep.{key}: {elsewhere}")
    return _with_trials(plan, folder, min(kept.trials, plan.trials), max(kept.trials, plan.trials))


def _with_trials(plan: Plan, folder: Path, before: int, trials: int) -> Plan:
    if trials < before:
        raise UserError(f"sweep.trials={trials} is less than the {before} trials of {folder}; the number can only be raised")
    if _is_chosen(plan) and plan.points is not None:
        if trials != len(plan.points):
            raise UserError(f"sweep.trials={trials}: {folder} holds a study, whose number of trials is fixed; omit it")
        return replace(plan, search={**plan.search, "trials": trials})
    search = resolve_search({**plan.search, "trials": trials}, plan.axes)
    return replace(plan, search=search, points=None if plan.points is None else points_of(plan.axes, trials))


def _is_chosen(plan: Plan) -> bool:
    """Whether a plan's points are a selection, such as a study's, rather than the first of its grid."""
    return plan.points is not None and plan.points != points_of(plan.axes, len(plan.points))


def _check_overrides(overrides: Sequence[str], axes: Mapping[str, Any]) -> None:
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        allowed = key in ("launcher", "sweep.retries", "sweep.trials", "sweep.storage", "trusted_packages", "hydra.searchpath")
        if override.startswith("~") or key in axes or not (allowed or key.startswith("launcher.")):
            raise UserError(
                f"{show(override)} cannot be changed on resume; only launcher, launcher.*, sweep.retries and sweep.trials (raised) can"
            )


def _launcher_overrides(folder: Path, launcher: Mapping[str, Any], given: set[str]) -> list[str]:
    """Return the overrides of a local launcher. Other launchers run commands from the file, so the user must give them."""
    name = str(launcher["_target_"]).rpartition(".")[2].removesuffix("Launcher").lower()
    ours = f"mtrl_cli.launchers.{name}.{str(launcher['_target_']).rpartition('.')[2]}"
    if name != SAFE_LAUNCHER or launcher["_target_"] != ours:
        raise UserError(
            f"{folder} was started with launcher={show(name)}; give launcher={SAFE_LAUNCHER} to resume on this machine, "
            f"or launcher={show(name)} with its settings from {folder / RECORD}"
        )
    plain = {key: str(value) for key, value in launcher.items() if isinstance(value, str | int | float) and key != "_target_"}
    return [
        f"launcher.{key}={value}"
        for key, value in plain.items()
        if f"launcher.{key}" not in given and re.fullmatch(r"\w+", key) and re.fullmatch(r"[\w.-]+", value)
    ]


def _check_named(folder: Path, kept: Plan, given: Sequence[str], storage: str | None) -> None:
    """Raise UserError if the folder names configuration folders or a database that the user has not given, too."""
    needed = [override for override in kept.shared if override.lstrip("+").startswith("hydra.searchpath=") and override not in given]
    if without_password(storage) != kept.search["storage"] and kept.search["storage"] is not None:
        needed.append(f"sweep.storage={kept.search['storage']}")
    if storage is not None and kept.search["storage"] is None:
        raise UserError(f"sweep.storage: {folder} stores its trials in a journal in the folder; omit it")
    if needed:
        raise UserError(
            f"{folder} was started with {show(needed[0])}, which is not read from a folder; if you trust it, resume with\n"
            + shlex.join(["mtrl", "resume", str(folder), *needed])
        )


def read(folder: Path) -> Plan:
    """Read and validate sweep.json, except its launcher (see `load`). Raises UserError."""
    path = folder / RECORD
    if not os.path.lexists(path):
        raise UserError(f"{folder} is not a sweep: it has no {RECORD}; give a folder that mtrl sweep created")
    record = atomic.read_json(path, folder)
    if record.get("format") != FORMAT:
        raise UserError(f"{path} has format {show(record.get('format'))}, expected {FORMAT}: another version of mtrl wrote it")
    try:
        return _plan_of(record, folder)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = f": {error}" if isinstance(error, UserError) else ""
        raise UserError(f"{path} is damaged{why}") from None


def _plan_of(record: Mapping[str, Any], folder: Path) -> Plan:
    annotations = sections.keys_of(sections.Search)
    search = {key: validation.check_value(f"sweep.{key}", record["search"][key], each.annotation) for key, each in annotations.items()}
    shared = [_override(each) for each in record["shared"]]
    axes = {_key(key): _axis(each) for key, each in record["axes"].items()}
    apart = split_overrides(shared)
    if apart.axes or any(not override.lstrip("+").startswith("hydra.searchpath=") for override in apart.sweep):
        raise UserError("its shared overrides are not those of one run")
    if not axes or search["sampler"] == "auto" or search["trials"] is None or search["trials"] > MOST_TRIALS:
        raise UserError("it has no axes, sampler or number of trials")
    if not isinstance(record["env"], str) or not isinstance(record["launcher"]["_target_"], str):
        raise TypeError
    return Plan(
        shared=tuple(shared),
        axes=axes,
        points=_points(record["points"], axes, search["trials"]) if search["sampler"] == "grid" else None,
        search=search,
        launcher=record["launcher"],
        trusted_packages=(),
        env=record["env"],
        steps_per_task=validation.check_value("steps_per_task", record["steps_per_task"], int),
        run_dir=folder,
    )


def _points(points: Any, axes: Mapping[str, Choices | NumberRange], trials: int) -> tuple[dict[str, Value], ...]:
    """The points of a grid, which may be any selection of its combinations."""
    texts = {key: axis.values for key, axis in axes.items() if isinstance(axis, Choices)}
    for point in points:
        if list(point) != list(texts) or not all(point[key] in texts[key] for key in texts):
            raise UserError("its points are not on its axes")
    if len(points) != trials:
        raise UserError(f"it has {len(points)} points and {trials} trials")
    return tuple(dict(point) for point in points)


def _override(override: Any) -> str:
    if not isinstance(override, str) or len(override) > LONGEST_OVERRIDE or "${" in override:
        raise UserError(f"{show(override)} is not an override of a sweep")
    return override


def _key(key: Any) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w./-]{0,200}", key) or split_overrides([f"{key}=choice(a,b)"]).axes.keys() != {key}:
        raise UserError(f"{show(key)} is not a key that may differ between runs")
    return str(key)


def _axis(axis: Mapping[str, Any]) -> Choices | NumberRange:
    if "choices" in axis:
        choices = tuple(_override(each) for each in axis["choices"])
        if not 0 < len(choices) <= MOST_CHOICES:
            raise ValueError
        return Choices(choices)
    low, high = axis["low"], axis["high"]
    if not all(type(each) in (int, float) for each in (low, high)) or not low < high or (axis["log"] and low <= 0):
        raise TypeError
    return NumberRange(low, high, log=axis["log"] is True, is_integer=axis["integer"] is True)
