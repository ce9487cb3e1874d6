"""What a sweep is to do: the words of its runs, the values that these differ in, and how they are chosen."""

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
from mtrl_cli.sweeps.search_space import MOST_CHOICES, Choices, NumberRange, Value, take_apart
from mtrl_cli.sweeps.validation import MOST_TRIALS, check_judged, check_runs, compose, points_of, settle_search

__all__ = ["Axes", "Choices", "NumberRange", "Plan", "Points", "Value", "check_same", "load", "make", "points_of", "read", "save"]

Axes = Mapping[str, Choices | NumberRange]
Points = Callable[[Axes], Sequence[Mapping[str, Value]]]
"""Chooses the trials of a study from the axes."""

RECORD = "sweep.json"
FORMAT = 1
LONGEST_WORD = 10_000
SAFE_LAUNCHER = "local"
"""What a folder's own word may say of where its runs are worked on: others run what they are told to."""

_PASSWORD_KEY = re.compile(r"((?:password|passwd|pwd)=)[^&]*", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do.

    Attributes:
        words: the overrides that all runs have, as `mtrl train` takes them.
        axes: what they differ in, by key, in the order in which it was given.
        points: of a grid, the values of each trial, in order; None: an Optuna sampler chooses `search["trials"]` of them.
        search: the section `sweep` of conf/sweep.yaml, checked; its sampler is never auto.
        launcher: the section `launcher`, checked: of each worker its own, and no part of what makes two sweeps the same.
        trusted_packages: that the user named.
        env: the pack's name; of several, joined by +.
        steps_per_task: the budget of a run (the largest of them).
        run_dir: the sweep's folder; None: a new one under runs/sweeps.
    """

    words: tuple[str, ...]
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
        """How many trials the sweep has."""
        return len(self.points) if self.points is not None else int(self.search["trials"])

    def overrides(self, values: Mapping[str, Value]) -> list[str]:
        """The words in which one trial differs from others: `["network/sharing=film", "seed=3"]`."""
        return [f"{key}={value}" for key, value in values.items()]

    def steps(self, values: Mapping[str, Value]) -> int:
        """The budget of the trial with these values, in steps per task."""
        given = values.get("steps_per_task", self.steps_per_task)
        try:
            return int(float(given))  # 1e6 is how one writes a budget
        except (ValueError, OverflowError):  # text in quotes
            return self.steps_per_task

    def configuration(self, values: Mapping[str, Value], run_dir: Path) -> dict[str, Any]:
        """The configuration of the trial with these values, for its folder's config.yaml: checked, with `auto`s open.

        Raises:
            UserError: these values do not go together.
        """
        config = compose(self.words, values, self.trusted_packages)
        check_judged(config, self.search)
        source = config["init_from"]  # whoever works on the run may be in another folder
        return config | {"run_dir": str(run_dir), "init_from": None if source is None else os.path.abspath(source)}

    def command(self, values: Mapping[str, Value]) -> str:
        """The command that makes the same run by itself."""
        trusted = [f"trusted_packages=[{','.join(self.trusted_packages)}]"] if self.trusted_packages else []
        return shlex.join(["mtrl", "train", *self.words, *self.overrides(values), *trusted])


def make(overrides: Sequence[str], choose: Points | None = None) -> Plan:
    """What the words of `mtrl sweep` ask for, once all of it is known to make sense.

    Args:
        overrides: the words.
        choose: of a study, chooses the trials from the axes; None: all combinations, or those of a sampler.

    Raises:
        UserError: a word is wrong, nothing varies, or a run cannot be composed.
    """
    _refuse_ranks()
    words = take_apart(overrides)
    section = configuration.compose_sweep(words.sweep)
    if not words.axes:
        configuration.compose_training(words.shared)  # whatever is wrong with it is to be told first
        raise UserError("there is nothing to vary: give a key several values, such as 'seed=range(5)' or network/sharing=hard,film")
    trusted = section["trusted_packages"]
    search = settle_search(section["sweep"], words.axes)
    if choose is not None and (search["sampler"] != "grid" or section["sweep"]["trials"] is not None):
        raise UserError("sweep.sampler, sweep.trials: a study chooses its own trials; leave them out")
    chosen = None if choose is None else tuple({key: point[key] for key in words.axes} for point in choose(words.axes))
    checked = check_runs(words.shared, words.axes, trusted, search, chosen)
    points = chosen or (points_of(checked.axes, search["trials"]) if search["sampler"] == "grid" else None)
    return Plan(
        words=words.shared,
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
        raise UserError("mtrl sweep starts processes of its own, each of which trains a run: start it without torchrun")


# -- in the sweep's folder ------------------------------------------------------------------------------------------------------


def save(plan: Plan, folder: Path, command: Sequence[str]) -> None:
    """Write `sweep.json`: what makes a folder a sweep. Of one that is there the command that made it is kept. Raises OSError."""
    path = folder / RECORD
    before = atomic.read_json(path, folder) if os.path.lexists(path) else {}
    record = {
        "format": FORMAT,
        "command": before.get("command") or shlex.join(without_password(word) for word in command),
        "words": list(plan.words),
        "axes": {key: _as_json(axis) for key, axis in plan.axes.items()},
        "points": None if plan.points is None else [dict(point) for point in plan.points],
        "search": {**plan.search, "trials": plan.trials, "storage": without_password(plan.search["storage"])},
        "launcher": dict(plan.launcher),
        "env": plan.env,
        "steps_per_task": plan.steps_per_task,
    }
    atomic.replace(path, atomic.to_json(record).encode())


def without_password(text: Any) -> Any:
    """A URL, or a word with one, that shows no password: `postgresql://me:***@host/sweeps`, `?password=***`; None stays.

    Passwords may hold anything: all up to the last @ goes, and all up to the next &.
    """
    if text is None:
        return None
    return _PASSWORD_KEY.sub(r"\1***", re.sub(r"(://[^\s:/@]*):.*@", r"\1:***@", text, flags=re.DOTALL))


def _as_json(axis: Choices | NumberRange) -> dict[str, Any]:
    if isinstance(axis, Choices):
        return {"choices": list(axis.words)}
    return {"low": axis.low, "high": axis.high, "log": axis.log, "integer": axis.is_integer}


def load(folder: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a sweep's folder, which may come from a stranger: nothing that runs or reaches elsewhere is taken from it.

    Args:
        folder: the sweep's.
        overrides: `launcher=…` and `launcher.…`, `sweep.retries=…`, `sweep.trials=…` (no fewer than before), and what the folder's own
            word is not taken for: `trusted_packages=[…]`, `hydra.searchpath=[…]`, `sweep.storage=…`.

    Raises:
        UserError: it is no sweep, damaged, or an override is none of these.
    """
    _refuse_ranks()
    kept = read(folder)
    words = take_apart(overrides)
    _check_overrides(overrides, [*words.shared, *words.sweep], words.axes)
    given = {word.lstrip("+~").partition("=")[0] for word in words.sweep}
    launcher = [] if "launcher" in given else _launcher_words(folder, kept.launcher, given)
    section = configuration.compose_sweep([*launcher, *words.sweep])
    search = {**kept.search, "storage": section["sweep"]["storage"]}
    for key in ("retries", "trials"):
        if f"sweep.{key}" in given and section["sweep"][key] is not None:
            search[key] = section["sweep"][key]
    _check_named(folder, kept, words.sweep, section["sweep"]["storage"])
    trusted = section["trusted_packages"]
    plan = replace(kept, search=search, launcher=section["launcher"], trusted_packages=tuple(trusted), run_dir=folder)
    return _with_trials(plan, folder, kept.trials, search["trials"])


def check_same(plan: Plan, folder: Path) -> Plan:
    """The plan to go on with in a folder that holds a sweep already: the same one, with the larger number of trials of both.

    Raises:
        UserError: the folder is of another sweep, or is damaged.
    """
    kept = read(folder)
    elsewhere = "give these as they were, or another run_dir"
    if different := sorted(set(plan.words) ^ set(kept.words)):
        keys = ", ".join(dict.fromkeys(word.lstrip("+~").partition("=")[0] for word in different))
        raise UserError(f"run_dir={folder} holds a sweep with other words for {show(keys)}: {elsewhere}")
    if list(plan.axes) != list(kept.axes):
        was = ", ".join(kept.axes)
        raise UserError(f"run_dir={folder} holds a sweep over {show(was)}, in this order: {elsewhere}")
    for key, axis in plan.axes.items():
        if axis != kept.axes[key]:
            raise UserError(
                f"run_dir={folder} holds a sweep with other values of {key}: a sweep keeps its own; for more of them give another run_dir "
                "(mtrl report takes both)"
            )
    if (_is_chosen(plan) or _is_chosen(kept)) and plan.points != kept.points:
        raise UserError(f"run_dir={folder} holds a sweep of other trials with the same values, as a study has: {elsewhere}")
    for key, value in kept.search.items():
        mine = without_password(plan.search[key]) if key == "storage" else plan.search[key]
        if key not in ("trials", "retries") and mine != value:
            raise UserError(f"run_dir={folder} holds a sweep with another sweep.{key}: {elsewhere}")
    return _with_trials(plan, folder, min(kept.trials, plan.trials), max(kept.trials, plan.trials))


def _with_trials(plan: Plan, folder: Path, before: int, trials: int) -> Plan:
    if trials < before:
        raise UserError(f"sweep.trials={trials}: {folder} has {before} trials, and their number can only be raised")
    if _is_chosen(plan) and plan.points is not None:
        if trials != len(plan.points):
            raise UserError(f"sweep.trials={trials}: {folder} is of a study, which has trials of its own; leave it out")
        return replace(plan, search={**plan.search, "trials": trials})
    search = settle_search({**plan.search, "trials": trials}, plan.axes)
    return replace(plan, search=search, points=None if plan.points is None else points_of(plan.axes, trials))


def _is_chosen(plan: Plan) -> bool:
    """Whether the points of a plan are not simply the first of its grid."""
    return plan.points is not None and plan.points != points_of(plan.axes, len(plan.points))


def _check_overrides(overrides: Sequence[str], words: Sequence[str], axes: Mapping[str, Any]) -> None:
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        allowed = key in ("launcher", "sweep.retries", "sweep.trials", "sweep.storage", "trusted_packages", "hydra.searchpath")
        if word.startswith("~") or key in axes or not (allowed or key.startswith("launcher.")):
            raise UserError(
                f"{show(word)}: a sweep goes on as it was started; only launcher, launcher.*, sweep.retries and sweep.trials (raised) "
                "can be given"
            )


def _launcher_words(folder: Path, launcher: Mapping[str, Any], given: set[str]) -> list[str]:
    """Where a sweep's runs were worked on, as words; only of the launcher that does nothing but start processes here."""
    name = str(launcher["_target_"]).rpartition(".")[2].removesuffix("Launcher").lower()
    ours = f"mtrl_cli.launchers.{name}.{str(launcher['_target_']).rpartition('.')[2]}"
    if name != SAFE_LAUNCHER or launcher["_target_"] != ours:
        raise UserError(
            f"{folder} was worked on with launcher={show(name)}: say where to go on, with launcher={SAFE_LAUNCHER} for this machine, "
            f"or with launcher={show(name)} and its settings (they are in {folder / RECORD})"
        )
    plain = {key: str(value) for key, value in launcher.items() if isinstance(value, str | int | float) and key != "_target_"}
    return [
        f"launcher.{key}={value}"
        for key, value in plain.items()
        if f"launcher.{key}" not in given and re.fullmatch(r"\w+", key) and re.fullmatch(r"[\w.-]+", value)
    ]


def _check_named(folder: Path, kept: Plan, words: Sequence[str], storage: str | None) -> None:
    """Refuse what a folder asks for and only its user may: reading other folders, reaching a database."""
    needed = [word for word in kept.words if word.lstrip("+").startswith("hydra.searchpath=") and word not in words]
    if without_password(storage) != kept.search["storage"] and kept.search["storage"] is not None:
        needed.append(f"sweep.storage={kept.search['storage']}")
    if storage is not None and kept.search["storage"] is None:
        raise UserError(f"sweep.storage: {folder} keeps its trials in a journal of its own; leave it out")
    if needed:
        raise UserError(
            f"{folder} was made with {show(needed[0])}, which is not taken from a folder: if it is yours, go on with\n"
            + shlex.join(["mtrl", "resume", str(folder), *needed])
        )


def read(folder: Path) -> Plan:
    """What sweep.json holds, checked value by value, for whoever only looks; its launcher is not (see `load`). Raises UserError."""
    path = folder / RECORD
    if not os.path.lexists(path):
        raise UserError(f"{folder} is no sweep: it has no {RECORD}. Give a folder that mtrl sweep made.")
    record = atomic.read_json(path, folder)
    if isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise UserError(f"{path} is of a newer version of mtrl (format {record['format']}): it needs that one")
    try:
        return _plan_of(record, folder)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = f": {error}" if isinstance(error, UserError) else ""
        raise UserError(f"{path} is damaged, or none of ours{why}") from None


def _plan_of(record: Mapping[str, Any], folder: Path) -> Plan:
    annotations = sections.keys_of(sections.Search)
    search = {key: validation.check_value(f"sweep.{key}", record["search"][key], each.annotation) for key, each in annotations.items()}
    words = [_word(each) for each in record["words"]]
    axes = {_key(key): _axis(each) for key, each in record["axes"].items()}
    apart = take_apart(words)
    if apart.axes or any(not word.lstrip("+").startswith("hydra.searchpath=") for word in apart.sweep):
        raise UserError("its words are not those of one run")
    if not axes or search["sampler"] == "auto" or search["trials"] is None or search["trials"] > MOST_TRIALS:
        raise UserError("it does not say what its trials are")
    if not isinstance(record["env"], str) or not isinstance(record["launcher"]["_target_"], str):
        raise TypeError
    return Plan(
        words=tuple(words),
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
    """The points of a grid, which a study may have chosen otherwise than as all combinations."""
    words = {key: axis.words for key, axis in axes.items() if isinstance(axis, Choices)}
    for point in points:
        if list(point) != list(words) or not all(point[key] in words[key] for key in words):
            raise UserError("its points are not of its axes")
    if len(points) != trials:
        raise UserError("its points are more or fewer than its trials")
    return tuple(dict(point) for point in points)


def _word(word: Any) -> str:
    if not isinstance(word, str) or len(word) > LONGEST_WORD or "${" in word:
        raise UserError(f"{show(word)} is no word of a sweep")
    return word


def _key(key: Any) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w./-]{0,200}", key) or take_apart([f"{key}=choice(a,b)"]).axes.keys() != {key}:
        raise UserError(f"{show(key)} is no key that runs may differ in")
    return str(key)


def _axis(axis: Mapping[str, Any]) -> Choices | NumberRange:
    if "choices" in axis:
        words = tuple(_word(word) for word in axis["choices"])
        if not 0 < len(words) <= MOST_CHOICES:
            raise ValueError
        return Choices(words)
    low, high = axis["low"], axis["high"]
    if not all(type(each) in (int, float) for each in (low, high)) or not low < high or (axis["log"] and low <= 0):
        raise TypeError
    return NumberRange(low, high, log=axis["log"] is True, is_integer=axis["integer"] is True)
