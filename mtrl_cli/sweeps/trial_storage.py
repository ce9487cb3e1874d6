"""Storage of a sweep's trials in an Optuna study: their values, states and owners.

A trial is identified by its number, from 0, and is added to the study when a process takes it. Its values follow from the sweep's seed,
its number and the trials that have ended before. A resumed sweep therefore has the same trials as an uninterrupted one.

Optuna has no public function to continue a trial of another process. A trial whose process has died is therefore closed as failed and
added again with the same values and reports, as in Optuna's RetryHeartbeatStaleTrialCallback. The study then contains several Optuna
trials for one trial of the sweep, of which the last counts. Optuna's trial numbers are used only in this module.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mtrl_cli.build.instantiate import derived_seed
from mtrl_cli.errors import UserError, show
from mtrl_cli.files import atomic, file_lock
from mtrl_cli.files.file_lock import FileLock
from mtrl_cli.sweeps.display import TrialRow
from mtrl_cli.sweeps.optuna_storage import open_storage, reached, storage_url
from mtrl_cli.sweeps.plan import Choices, NumberRange, Plan

WORKERS = "workers"
"""Folder of locks in the sweep's folder. A held lock marks a trial as running, for all processes that share the folder."""

UNCLAIMED_SECONDS = 60.0
"""Time after which a running trial without a place counts as abandoned: its process died before it wrote its place. A process writes
its place within milliseconds, or within a minute if the database is busy. The time starts when this process first reads the trial,
because the clocks of machines differ."""

PLAN = "plan"
"""User attribute of the study: identifies the sweep."""

# User attributes of Optuna trials.
TRIAL = "trial"  # of a retry: the trial's number in the sweep
PLACE = "place"  # in a database: the folder in which the trial is worked on
FAILED = "failed"  # the trial ended as failed; a failed Optuna trial without this attribute was interrupted

STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_NAMES = {state: name for name, state in STATES.items()} | {TrialState.WAITING: "waiting", TrialState.RUNNING: "running"}


@dataclass(frozen=True)
class Assignment:
    """A trial that this process has taken.

    Attributes:
        number: from 0.
        values: by key, as text.
        is_retry: whether another process took the trial before, and then died or released the trial.
    """

    number: int
    values: Mapping[str, str]
    is_retry: bool


@dataclass
class _Held:
    trial: Trial
    lock: FileLock
    reported: set[int]


_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "grid": lambda seed: optuna.samplers.RandomSampler(seed=seed),  # draws nothing: the plan has the points
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
}


class _SeededSampler(BaseSampler):
    """An Optuna sampler with separate seeds for each trial: one for the joint draw, and one for each key that is drawn alone.

    A trial whose process died between two draws continues with the same draws.

    Args:
        make: returns the sampler for a seed.
        seed: the sweep's seed.
        number_of: returns the number in the sweep of an Optuna trial.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, number_of: Callable[[FrozenTrial], int]):
        self._make, self._seed, self._number_of = make, seed, number_of
        self._joint = make(0)

    def _seeded(self, trial: FrozenTrial, key: str) -> BaseSampler:
        return self._make(derived_seed(self._seed, f"trial/{self._number_of(trial)}/{key}") % 2**32)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self._joint = self._seeded(trial, "")
        return self._joint.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._joint.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._seeded(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


class TrialStorage:
    """The trials of a sweep. Several processes may open one storage in a shared folder or a database.

    Args:
        folder: the sweep's folder, which exists.
        plan: the sweep's plan.
        first: step per task of a run's first evaluation. Pruners stop no trial earlier.

    Raises:
        UserError: the storage cannot be reached, is a link, or contains another sweep of the same name.
        RunError: the journal is damaged.
    """

    def __init__(self, folder: Path, plan: Plan, *, first: int):
        self._plan, self._first, self._url = plan, first, storage_url(plan.search["storage"])
        self._locks = folder / WORKERS
        atomic.refuse_link(self._locks)
        self._locks.mkdir(exist_ok=True)
        self._mutex = FileLock(self._locks / "storage.lock")
        self._held: dict[int, _Held] = {}
        self._unclaimed: dict[int, float] = {}  # when a running trial without a place was first read
        self._distributions = {} if plan.points is not None else {key: _distribution(axis) for key, axis in plan.axes.items()}
        storage = open_storage(folder, self._url)
        with self._mutex, reached(self._url):
            self._place = _place(self._locks) if self._url else None
            self._study = optuna.create_study(
                study_name=_study_name(folder, self._url),
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                sampler=_SeededSampler(_SAMPLERS[plan.search["sampler"]], plan.search["seed"], self._number),
                pruner=_pruner(plan, first),
            )
            if PLAN not in self._study.user_attrs:
                self._study.set_user_attr(PLAN, _digest(plan))
            _check_digest(self._study.study_name, self._study.user_attrs, plan)

    def _number(self, trial: FrozenTrial) -> int:
        """Return an Optuna trial's number in the sweep: the number of the retried trial, or its position among the first attempts."""
        if TRIAL in trial.user_attrs:
            return int(trial.user_attrs[TRIAL])
        earlier = self._study.get_trials(deepcopy=False)[: trial.number]
        return sum(TRIAL not in each.user_attrs for each in earlier)

    def _current(self) -> dict[int, FrozenTrial]:
        """Return the last Optuna trial of each trial that was taken, by number."""
        found: dict[int, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            found[trial.user_attrs.get(TRIAL, len(found))] = trial
        return found

    # -- owners -------------------------------------------------------------------------------------------------------------------

    def take(self) -> Assignment | None:
        """Take a trial for this process: a trial whose process has died, or else the next new trial. Returns None if neither exists.

        Raises:
            RunError: the storage cannot be reached.
        """
        with self._mutex, reached(self._url):
            current = self._current()
            if all(trial.state != TrialState.WAITING for trial in current.values()):  # else a process died during `_retry`
                interrupted = [number for number, trial in current.items() if self._is_interrupted(number, trial)]
                if not interrupted and len(current) >= self._plan.trials:
                    return None
                if interrupted and not self._retry(interrupted[0], current[interrupted[0]]):
                    return None
            return self._hold(self._study.ask(self._distributions))

    def _is_interrupted(self, number: int, trial: FrozenTrial) -> bool:
        """Return whether a trial's process has died or released the trial, and processes with this folder may retry the trial."""
        if number >= self._plan.trials or number in self._held:
            return False
        if trial.state != TrialState.RUNNING and not (trial.state == TrialState.FAIL and FAILED not in trial.user_attrs):
            return False
        if PLACE in trial.user_attrs or not self._url:
            self._unclaimed.pop(trial.number, None)
            return self._is_here(trial) and file_lock.is_free(self._lock(number).path)
        return time.monotonic() - self._unclaimed.setdefault(trial.number, time.monotonic()) > UNCLAIMED_SECONDS

    def _retry(self, number: int, trial: FrozenTrial) -> bool:
        """Close an interrupted trial and add it again for the next `ask`. Returns False if another machine has closed it."""
        if trial.state == TrialState.RUNNING:
            try:
                self._study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, UpdateFinishedTrialError):
                return False
        self._add_again(number, trial, TrialState.WAITING)
        return True

    def _add_again(self, number: int, trial: FrozenTrial, state: TrialState, value: float | None = None) -> None:
        again = optuna.trial.create_trial(
            state=state,
            value=value,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
            user_attrs={key: each for key, each in trial.user_attrs.items() if key != FAILED} | {TRIAL: number},
            system_attrs=trial.system_attrs,  # pruners store the completed rungs of a trial there
        )
        self._study.add_trial(again)

    def _hold(self, trial: Trial) -> Assignment | None:
        found = self._study.get_trials(deepcopy=False)[trial.number]
        number = self._number(found)
        if number >= self._plan.trials:  # another machine took the last trial; this Optuna trial is used if sweep.trials is raised
            return None
        if self._url:
            trial.set_user_attr(PLACE, self._place)
        lock = self._lock(number)
        lock.acquire()
        self._held[number] = _Held(trial, lock, set(found.intermediate_values))
        return Assignment(number, self._values(number, trial.params), is_retry=TRIAL in found.user_attrs)

    def _values(self, number: int, params: Mapping[str, Any]) -> dict[str, str]:
        """Return a trial's values as text: its point in a grid, or else the values that the sampler has drawn."""
        drawn = {key: params[key] for key in self._distributions if key in params}
        values = self._plan.points[number] if self._plan.points is not None else drawn
        return {key: str(value) for key, value in values.items()}

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._locks / f"{number:04d}.lock")

    def _is_here(self, trial: FrozenTrial) -> bool:
        return not self._url or trial.user_attrs.get(PLACE) in (self._place, None)

    def release(self, number: int) -> None:
        """Release a held trial without ending it, for the next process that takes it."""
        self._held.pop(number).lock.release()

    def close(self) -> None:
        """Release all held trials."""
        for number in list(self._held):
            self.release(number)

    # -- results ------------------------------------------------------------------------------------------------------------------

    def report(self, number: int, step: int, value: float, *, is_last: bool = False) -> bool:
        """Report an evaluation of a held trial, each step once. Returns whether to prune the trial; False for the last evaluation.

        Steps are rounded down to multiples of the first evaluation's step, to compare runs with different numbers of environments.

        Raises:
            RunError: the storage cannot be reached.
        """
        held = self._held[number]
        at = step if is_last or step < self._first else step - step % self._first
        if at in held.reported:
            return False
        with reached(self._url):
            held.trial.report(value, at)
            held.reported.add(at)
            return not is_last and held.trial.should_prune()

    def finish(self, number: int, state: str, value: float | None = None) -> None:
        """Store the end of a held trial (completed, pruned, failed) and release the trial. Without a metric it is stored as failed.

        Raises:
            RunError: the storage cannot be reached.
        """
        trial, end = self._held[number].trial, STATES[state]
        if end == TrialState.COMPLETE and value is None:
            end = TrialState.FAIL
        with self._mutex, reached(self._url):  # no other process may read a running trial whose lock is free
            if end == TrialState.FAIL:
                trial.set_user_attr(FAILED, True)
            self._study.tell(trial, value if end == TrialState.COMPLETE else None, state=end, skip_if_finished=True)
            self.release(number)

    def complete_failed(self, number: int, value: float) -> None:
        """Store a failed trial as completed, after the user has completed its run.

        Raises:
            RunError: the storage cannot be reached.
        """
        with self._mutex, reached(self._url):
            trial = self._current()[number]
            if trial.state == TrialState.FAIL:
                self._add_again(number, trial, TrialState.COMPLETE, value)

    def rows(self) -> list[TrialRow]:
        """Return the stored state of every trial (waiting, running, completed, pruned or failed), ordered by number.

        Raises:
            RunError: the storage cannot be reached.
        """
        with reached(self._url):
            current = self._current()
        return [self._row(number, current.get(number)) for number in range(self._plan.trials)]

    def _row(self, number: int, trial: FrozenTrial | None) -> TrialRow:
        values = self._values(number, trial.params if trial is not None else {})
        row = TrialRow(number, values, "waiting", steps=self._plan.steps(values))
        if trial is None:
            return row
        is_interrupted = trial.state == TrialState.FAIL and FAILED not in trial.user_attrs
        state = "waiting" if is_interrupted else _NAMES[trial.state]
        return replace(row, state=state, score=trial.values[0] if trial.values else None, is_here=self._is_here(trial))


def check_new_study(folder: Path, plan: Plan) -> None:
    """Check the database of a new sweep before the sweep's folder is created.

    Raises:
        UserError: the database cannot be opened, or contains another sweep of the same name.
        RunError: the database cannot be read.
    """
    url = storage_url(plan.search["storage"])
    if url is not None:
        storage = open_storage(folder, url)
        with reached(url):
            for study in storage.get_all_studies():
                if study.study_name == _study_name(folder, url):
                    _check_digest(study.study_name, study.user_attrs, plan)


def _study_name(folder: Path, url: str | None) -> str:
    """Return the name of a sweep's study: the folder's name in a database, which may contain several sweeps."""
    return folder.resolve().name if url else "sweep"


def _digest(plan: Plan) -> str:
    """Return a text that identifies the shared overrides and the axes of a sweep."""
    about = [sorted(plan.shared), sorted((key, str(axis)) for key, axis in plan.axes.items())]
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()


def _check_digest(name: str, attributes: Mapping[str, Any], plan: Plan) -> None:
    if attributes.get(PLAN, _digest(plan)) != _digest(plan):
        raise UserError(f"sweep.storage contains a study {show(name)} of another sweep, named after its folder. Give another run_dir")


def _distribution(axis: Choices | NumberRange) -> BaseDistribution:
    if isinstance(axis, Choices):
        return CategoricalDistribution(axis.values)
    if axis.is_integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(float(axis.low), float(axis.high), log=axis.log)


def _pruner(plan: Plan, first: int) -> optuna.pruners.BasePruner:
    """Return the pruner. Successive halving (asynchronous: Li et al. 2020) and Hyperband (Li et al. 2018) count steps per task."""
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=first),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=first, max_resource=max(first, plan.steps_per_task)),
    }
    return pruners[plan.search["pruner"]]()


def _place(locks: Path) -> str:
    """Return the identifier of this folder in a database, created on first use. The caller holds the lock of the storage."""
    path = locks / "place"
    if not path.exists():
        atomic.replace(path, uuid.uuid4().hex.encode())
    return atomic.read_bytes(path, locks, 64).decode()
