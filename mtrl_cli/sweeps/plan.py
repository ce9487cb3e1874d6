"""Plan of a sweep: its overrides, axes, sampler and launcher, and the file `sweep.json`."""

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
from mtrl_cli.sweeps.search_space import MOST_CHOICES, Axes, Choices, NumberRange, Value, key_of, overrides_of, split_overrides
from mtrl_cli.sweeps.validation import MOST_TRIALS, check_metric, check_runs, compose, points_of, resolve_search

__all__ = ["Axes", "Choices", "NumberRange", "Plan", "Points", "Value", "check_same", "load", "make", "points_of", "read", "save"]

Points = Callable[[Axes], Sequence[Mapping[str, Value]]]
"""A function that chooses the trials of a study from the axes."""

RECORD = "sweep.json"
FORMAT = 1
LONGEST_OVERRIDE = 10_000
SAFE_LAUNCHER = "local"
"""The only launcher that is read from sweep.json. The settings of other launchers may contain commands, so the user must give them."""

_PASSWORD_KEY = re.compile(r"((?:password|passwd|pwd)=)[^&]*", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs.

    Attributes:
        shared: the overrides of all runs, as for `mtrl train`.
        axes: the values of the keys that differ between runs, in the given order.
        points: the values of each trial of a grid, in order; None: an Optuna sampler chooses the values of `search["trials"]` trials.
        search: the section `sweep` of conf/sweep.yaml, validated, with `auto` resolved.
        launcher: the section `launcher`, validated. Two processes that work on one sweep may have different launchers.
        trusted_packages: the packages that the user trusts to run code.
        env: the environment pack's name, or several joined by +.
        steps_per_task: the largest budget of a run.
        run_dir: the sweep's folder; None: a new folder under runs/sweeps.
    """

    shared: tuple[str, ...]
    axes: Axes
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
        check_metric(config, self.search)
        source = config["init_from"]  # workers may run in another folder
        return config | {"run_dir": str(run_dir), "init_from": None if source is None else os.path.abspath(source)}

    def command(self, values: Mapping[str, Value]) -> str:
        """Return the command that trains a trial without the sweep."""
        return shlex.join(["mtrl", "train", *self.shared, *overrides_of(values), *configuration.trusting(self.trusted_packages)])


def make(overrides: Sequence[str], choose: Points | None = None) -> Plan:
    """Make the plan of `mtrl sweep` from its overrides, and validate its runs.

    Args:
        overrides: as on the command line.
        choose: the function that chooses the trials of a study; None: the grid of all combinations, or the trials of a sampler.

    Raises:
        UserError: an override is not valid, no key has several values, or a run cannot be composed.
    """
    _refuse_ranks()
    split = split_overrides(overrides)
    section = configuration.compose_sweep(split.sweep)
    if not split.axes:
        configuration.compose_training(split.shared)  # an error of the run has priority
        raise UserError("no key has several values. Give several values, such as 'seed=range(5)' or network/sharing=hard,film")
    trusted = section["trusted_packages"]
    search = resolve_search(section["sweep"], split.axes)
    if choose is not None and (search["sampler"] != "grid" or section["sweep"]["trials"] is not None):
        raise UserError("sweep.sampler, sweep.trials: a study chooses the trials. Omit sweep.sampler and sweep.trials")
    chosen = None if choose is None else tuple({key: point[key] for key in split.axes} for point in choose(split.axes))
    axes, configs = check_runs(split.shared, split.axes, trusted, search, chosen)
    points = chosen or (points_of(axes, search["trials"]) if search["sampler"] == "grid" else None)
    return Plan(
        shared=split.shared,
        axes=axes,
        points=points,
        search=search if chosen is None else {**search, "trials": len(chosen)},
        launcher=section["launcher"],
        trusted_packages=tuple(trusted),
        env="+".join(dict.fromkeys(str(config["env"]["name"]) for config in configs)),
        steps_per_task=max(int(config["steps_per_task"]) for config in configs),
        run_dir=None if section["run_dir"] is None else Path(section["run_dir"]),
    )


def _refuse_ranks() -> None:
    if torchrun.place().size > 1:
        raise UserError("mtrl sweep starts a process for each run. Start mtrl sweep without torchrun")


# -- in the sweep's folder ------------------------------------------------------------------------------------------------------


def save(plan: Plan, folder: Path, command: Sequence[str]) -> None:
    """Write `sweep.json`. The command in an existing file is kept. Raises OSError."""
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
    """Read the plan of a sweep's folder, to resume the sweep. The folder may be untrusted: no code or address in it is used.

    Args:
        folder: the sweep's folder.
        overrides: overrides of `launcher`, `launcher.*`, `sweep.retries` and `sweep.trials` (no fewer than before), and of the keys that
            are not read from the folder: `trusted_packages`, `hydra.searchpath` and `sweep.storage`.

    Raises:
        UserError: the folder is not a sweep, sweep.json is damaged, or another key is overridden.
    """
    _refuse_ranks()
    kept = read(folder)
    split = split_overrides(overrides)
    _check_overrides(overrides, split.axes)
    given = {key_of(override) for override in split.sweep}
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
    """Check that a folder contains the sweep of a plan, and return the plan with the larger number of trials of both.

    Raises:
        UserError: the folder contains another sweep, or sweep.json is damaged.
    """
    kept = read(folder)
    difference = _difference(plan, kept)
    if difference is not None:
        advice = "Repeat the original command, or use another run_dir (mtrl report accepts several sweeps)"
        raise UserError(f"run_dir={folder} contains a sweep {difference}. {advice}")
    return _with_trials(plan, folder, min(kept.trials, plan.trials), max(kept.trials, plan.trials))


def _difference(plan: Plan, kept: Plan) -> str | None:
    """Describe the first difference between a plan and the plan in a folder; None if they describe the same sweep."""
    if different := sorted(set(plan.shared) ^ set(kept.shared)):
        return f"with other overrides of {show(', '.join(dict.fromkeys(map(key_of, different))))}"
    if list(plan.axes) != list(kept.axes):
        return f"over {show(', '.join(kept.axes))}, in this order"
    for key, axis in plan.axes.items():
        if axis != kept.axes[key]:
            return f"with other values of {key}"
    if (_is_chosen(plan) or _is_chosen(kept)) and plan.points != kept.points:
        return "of other combinations of the same values, such as those of a study"
    search = {**plan.search, "storage": without_password(plan.search["storage"])}
    for key, value in kept.search.items():
        if key not in ("trials", "retries") and search[key] != value:
            return f"with another sweep.{key}"
    return None


def _with_trials(plan: Plan, folder: Path, before: int, trials: int) -> Plan:
    if trials < before:
        raise UserError(f"sweep.trials={trials} is less than the {before} trials of {folder}; the number can only be raised")
    if _is_chosen(plan) and plan.points is not None:
        if trials != len(plan.points):
            raise UserError(f"sweep.trials={trials}: {folder} contains a study, whose number of trials is fixed. Omit sweep.trials")
        return replace(plan, search={**plan.search, "trials": trials})
    search = resolve_search({**plan.search, "trials": trials}, plan.axes)
    return replace(plan, search=search, points=None if plan.points is None else points_of(plan.axes, trials))


def _is_chosen(plan: Plan) -> bool:
    """Return whether the points were chosen by a study, rather than being the first points of the grid."""
    return plan.points is not None and plan.points != points_of(plan.axes, len(plan.points))


def _check_overrides(overrides: Sequence[str], axes: Mapping[str, Any]) -> None:
    for override in overrides:
        key = key_of(override)
        allowed = key in ("launcher", "sweep.retries", "sweep.trials", "sweep.storage", "trusted_packages", "hydra.searchpath")
        if override.startswith("~") or key in axes or not (allowed or key.startswith("launcher.")):
            raise UserError(
                f"{show(override)} cannot be changed on resume; only launcher, launcher.*, sweep.retries and sweep.trials (raised) can"
            )


def _launcher_overrides(folder: Path, launcher: Mapping[str, Any], given: set[str]) -> list[str]:
    """Return the overrides of a local launcher. Raises UserError for other launchers (see `SAFE_LAUNCHER`)."""
    name = str(launcher["_target_"]).rpartition(".")[2].removesuffix("Launcher").lower()
    ours = f"mtrl_cli.launchers.{name}.{str(launcher['_target_']).rpartition('.')[2]}"
    if name != SAFE_LAUNCHER or launcher["_target_"] != ours:
        raise UserError(
            f"{folder} was started with launcher={show(name)}. Give launcher={SAFE_LAUNCHER} to resume on this machine, "
            f"or launcher={show(name)} with its settings from {folder / RECORD}"
        )
    plain = {f"launcher.{key}": value for key, value in launcher.items() if isinstance(value, str | int | float) and key != "_target_"}
    kept = (override for override in overrides_of(plain) if key_of(override) not in given)
    return [override for override in kept if re.fullmatch(r"launcher\.\w+=[\w.-]+", override)]


def _check_named(folder: Path, kept: Plan, given: Sequence[str], storage: str | None) -> None:
    """Raise UserError if sweep.json has configuration folders or a database that the user has not given as well."""
    needed = [override for override in kept.shared if key_of(override) == "hydra.searchpath" and override not in given]
    if without_password(storage) != kept.search["storage"] and kept.search["storage"] is not None:
        needed.append(f"sweep.storage={kept.search['storage']}")
    if storage is not None and kept.search["storage"] is None:
        raise UserError(f"sweep.storage: {folder} stores its trials in a journal in the folder. Omit sweep.storage")
    if needed:
        raise UserError(
            f"{folder} was started with {show(needed[0])}, which is not read from a folder; if you trust it, resume with\n"
            + shlex.join(["mtrl", "resume", str(folder), *needed])
        )


def read(folder: Path) -> Plan:
    """Read and validate sweep.json, except its launcher, which `load` validates. Raises UserError."""
    path = folder / RECORD
    if not os.path.lexists(path):
        raise UserError(f"{folder} is not a sweep: {RECORD} is missing. Give a folder that mtrl sweep created")
    record = atomic.read_json(path, folder)
    if record.get("format") != FORMAT:
        raise UserError(f"{path} has format {show(record.get('format'))}; this version of mtrl reads only format {FORMAT}")
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
    split = split_overrides(shared)
    if split.axes or any(key_of(override) != "hydra.searchpath" for override in split.sweep):
        raise UserError("shared must contain only overrides of a single run")
    if not axes or search["sampler"] == "auto" or search["trials"] is None or search["trials"] > MOST_TRIALS:
        raise UserError(f"expected at least one key in axes, a sampler other than auto, and at most {MOST_TRIALS:,} trials")
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


def _points(points: Any, axes: Axes, trials: int) -> tuple[dict[str, Value], ...]:
    """Return the points of a grid, after checking that each is a combination of values on the axes."""
    texts = {key: axis.values for key, axis in axes.items() if isinstance(axis, Choices)}
    for point in points:
        if list(point) != list(texts) or not all(point[key] in texts[key] for key in texts):
            raise UserError("points must be combinations of the values in axes")
    if len(points) != trials:
        raise UserError(f"search.trials must be the number of points, {len(points)}, got {trials}")
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
