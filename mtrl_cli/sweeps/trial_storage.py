"""The book of a sweep's trials, which Optuna keeps: which there are, what each tries, who works on it and how it ended.

A trial is known by its number, from 0. All are entered when the sweep begins; what a trial tries is chosen when it is taken, from a seed
that follows from the sweep's and its number, so that a sweep by one worker that was stopped goes on as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mtrl_cli.build.instantiate import derived_seed
from mtrl_cli.errors import UserError, show
from mtrl_cli.files import atomic
from mtrl_cli.files.file_lock import FileLock
from mtrl_cli.sweeps.optuna_storage import open_storage, reached, storage_url
from mtrl_cli.sweeps.plan import Choices, Interval, Plan, Value

WORKERS = "workers"
"""In the sweep's folder: locks, by which its processes know of each other."""

UNCLAIMED_SECONDS = 60.0
"""After which a running trial in a database that names no folder is nobody's: whoever took it was killed before it could say so. That takes
a process milliseconds, and a minute where the database is busy. It is counted from when we first saw it: machines' clocks differ."""

ENDS = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_WORDS = {state: word for word, state in ENDS.items()} | {TrialState.WAITING: "waiting", TrialState.RUNNING: "running"}


@dataclass(frozen=True)
class Taken:
    """A trial to work on.

    Attributes:
        values: what it tries.
        begun: whether another process has had it before, and left it.
    """

    number: int
    values: Mapping[str, Value]
    begun: bool


@dataclass(frozen=True)
class Entry:
    """What the book says of a trial.

    Attributes:
        state: waiting, running, completed, pruned or failed.
        here: whether a process with this folder has it or had it, or nobody yet; others only share the storage.
        values: what it tries; {} while nobody has taken it.
        value: its metric, once it has ended.
    """

    number: int
    state: str
    here: bool
    values: Mapping[str, Value]
    value: float | None


@dataclass
class _Held:
    trial: Trial
    lock: FileLock
    reported: set[int]


_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
}


class _Points(BaseSampler):
    """A grid: what a trial tries stands in the plan."""

    def __init__(self, points: tuple[Mapping[str, Value], ...]):
        self._points = points

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._points[trial.number][param_name]


class _Seeded(BaseSampler):
    """A sampler of Optuna's whose draws follow from seeds of their own: one for what it draws together, and one for each key that it draws
    alone. A trial whose process died between two of them goes on to the same.

    Args:
        make: the sampler with a seed.
        seed: of the sweep.
        number: of the trial.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, number: int):
        self._make, self._seed, self._number = make, seed, number
        self._together = self._with("")

    def _with(self, key: str) -> BaseSampler:
        return self._make(derived_seed(self._seed, f"trial/{self._number}/{key}") % 2**32)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._together.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._together.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._with(param_name).sample_independent(study, trial, param_name, param_distribution)


class TrialStorage:
    """A sweep's trials. `close()` lets go of those that are held, to be gone on with.

    Args:
        folder: the sweep's, which is there. Processes that share it know when one of them has died.
        plan: of the sweep.
        first: steps per task at which a run is first evaluated: no pruner judges before.

    Raises:
        UserError: the storage cannot be reached, is a link, or holds another sweep of this name. RunError: the journal is damaged.
    """

    def __init__(self, folder: Path, plan: Plan, *, first: int):
        self._plan, self._first, self._url = plan, first, storage_url(plan.search["storage"])
        self._locks = folder / WORKERS
        atomic.refuse_link(self._locks)
        self._locks.mkdir(exist_ok=True)
        self._mutex = FileLock(self._locks / "book.lock")
        self._held: dict[int, _Held] = {}
        self._unclaimed: dict[int, float] = {}  # since when we have seen running trials without a place
        self._distributions = {key: _distribution(axis) for key, axis in plan.axes.items()}
        storage = open_storage(folder, self._url)
        with self._mutex, self._reached():
            self._place = _place(self._locks) if self._url else ""
            self._study = optuna.create_study(
                study_name=study_name(folder, self._url),
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                sampler=self._sampler(0),
                pruner=_pruner(plan, first),
            )
            self._check_same()
            missing = plan.trials - len(self._trials())
            for _ in range(missing):
                self._study.enqueue_trial({})

    def _check_same(self) -> None:
        """Refuse a study that another sweep has begun under this name."""
        about = [sorted(self._plan.words), sorted((key, str(axis)) for key, axis in self._plan.axes.items())]
        digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()
        known = self._study.user_attrs.get("plan")
        if known is None:
            self._study.set_user_attr("plan", digest)
        elif known != digest:
            name = show(self._study.study_name)
            raise UserError(f"sweep.storage holds a study {name} of another sweep: its name is that of the folder; give another run_dir")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        with reached(self._url), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _sampler(self, number: int) -> BaseSampler:
        """The sampler as it is for one trial: what it draws follows from the seed, the number and the trials that have ended."""
        points, name = self._plan.points, self._plan.search["sampler"]
        if points is not None:
            return _Points(points)
        return _Seeded(_SAMPLERS[name], self._plan.search["seed"], number)

    # -- whose a trial is ---------------------------------------------------------------------------------------------------------

    def take(self) -> Taken | None:
        """A trial for this process to work on: one that a process has left, else the next that waits; None if there is neither.

        Raises:
            RunError: the storage cannot be reached.
        """
        with self._mutex, self._reached():
            for found in self._trials(TrialState.RUNNING):
                if found.number >= self._plan.trials or found.number in self._held or not self._is_left(found):
                    continue
                lock = self._lock(found.number)
                if lock.try_acquire():
                    trial = Trial(self._study, found._trial_id)
                    self._claim(trial)
                    return self._hold(trial, lock, set(found.intermediate_values), begun=True)
            for found in self._trials(TrialState.WAITING):
                # Those beyond ours are of a worker that was told of more, or two machines have entered all of them at the same time.
                if found.number >= self._plan.trials or not self._pop(found):
                    continue
                trial = Trial(self._study, found._trial_id)
                self._claim(trial)
                lock = self._lock(found.number)
                lock.acquire()
                return self._hold(trial, lock, set(), begun=False)
        return None

    def _pop(self, waiting: FrozenTrial) -> bool:
        """Have a waiting trial run; whether it was us who did, not another machine. `Study.ask` would make one more where none waits."""
        try:
            return self._study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _hold(self, trial: Trial, lock: FileLock, reported: set[int], *, begun: bool) -> Taken:
        self._held[trial.number] = _Held(trial, lock, reported)
        self._study.sampler = self._sampler(trial.number)
        self._study._thread_local.cached_all_trials = None  # as `Study.ask` does: samplers look there
        values = {key: self._suggested(trial, key, distribution) for key, distribution in self._distributions.items()}
        return Taken(trial.number, values, begun)

    def _suggested(self, trial: Trial, key: str, distribution: BaseDistribution) -> Value:
        """What the trial tries for a key: as the storage has it, else as the sampler chooses now."""
        if isinstance(distribution, CategoricalDistribution):
            return str(trial.suggest_categorical(key, distribution.choices))
        if isinstance(distribution, IntDistribution):
            return trial.suggest_int(key, distribution.low, distribution.high, log=distribution.log)
        assert isinstance(distribution, FloatDistribution)
        return trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._locks / f"{number:04d}.lock")

    def _claim(self, trial: Trial) -> None:
        if self._url and trial.user_attrs.get("place") != self._place:
            trial.set_user_attr("place", self._place)

    def _is_here(self, trial: FrozenTrial) -> bool:
        return not self._url or trial.user_attrs.get("place") in (self._place, None)

    def _is_left(self, trial: FrozenTrial) -> bool:
        """Whether a running trial is this folder's or nobody's; unless its lock is held, its process is gone."""
        if not self._url or "place" in trial.user_attrs:
            self._unclaimed.pop(trial.number, None)
            return self._is_here(trial)
        return time.monotonic() - self._unclaimed.setdefault(trial.number, time.monotonic()) > UNCLAIMED_SECONDS

    def release(self, number: int) -> None:
        """Leave a trial as it is, for whoever takes it next."""
        self._held.pop(number).lock.release()

    def close(self) -> None:
        """Leave all that are held."""
        for number in list(self._held):
            self.release(number)

    # -- what becomes of it -------------------------------------------------------------------------------------------------------

    def report(self, number: int, step: int, value: float, *, is_last: bool = False) -> bool:
        """Tell an evaluation of a trial that is held, each step once, and return whether the trial is to be pruned; after its last, never.

        Runs of other numbers of environments are evaluated some steps later or earlier, and compared all the same.

        Raises:
            RunError: the storage cannot be reached.
        """
        held = self._held[number]
        at = step if is_last or step < self._first else step - step % self._first
        if at in held.reported:
            return False
        with self._reached():
            held.trial.report(value, at)
            held.reported.add(at)
            if is_last or not held.trial.should_prune():
                return False
            held.trial.set_user_attr("pruned", True)  # a pruner that is asked twice may answer otherwise
            return True

    def is_pruned(self, number: int) -> bool:
        """Whether it was decided before that a trial which is held is to be pruned."""
        return bool(self._held[number].trial.user_attrs.get("pruned"))

    def tell(self, number: int, state: str, value: float | None = None) -> None:
        """Tell how a trial that is held has ended (completed, pruned, failed), and let go of it. Told twice, the first counts.

        Raises:
            RunError: the storage cannot be reached.
        """
        trial, end = self._held[number].trial, ENDS[state]
        if end == TrialState.COMPLETE and value is None:  # nothing for a sampler to learn from
            end = TrialState.FAIL
        with self._mutex, self._reached():  # whoever has seen it running must not find its lock free by now
            self._study.tell(trial, value if end == TrialState.COMPLETE else None, state=end, skip_if_finished=True)
            self.release(number)

    def entries(self) -> list[Entry]:
        """What the book says of each trial, by number.

        Raises:
            RunError: the storage cannot be reached.
        """
        with self._reached():
            return [
                Entry(trial.number, _WORDS[trial.state], self._is_here(trial), dict(trial.params), _value(trial))
                for trial in self._trials()[: self._plan.trials]
            ]


def study_name(folder: Path, url: str | None) -> str:
    """The name of a sweep's study: in a storage that holds others, that of its folder."""
    return folder.resolve().name if url else "sweep"


def _value(trial: FrozenTrial) -> float | None:
    return trial.values[0] if trial.values else None


def _distribution(axis: Choices | Interval) -> BaseDistribution:
    if isinstance(axis, Choices):
        return CategoricalDistribution(axis.words)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(float(axis.low), float(axis.high), log=axis.log)


def _pruner(plan: Plan, first: int) -> optuna.pruners.BasePruner:
    """Successive halving (asynchronous: Li et al. 2020) and Hyperband (Li et al. 2018) count in steps per task."""
    name, steps = plan.search["pruner"], plan.steps_per_task
    if name == "median":
        return optuna.pruners.MedianPruner()
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=first, max_resource=max(first, steps))
    assert name == "none", name
    return optuna.pruners.NopPruner()


def _place(locks: Path) -> str:
    """What tells this folder from those of other machines with the same storage. Called by whoever has the book's lock."""
    path = locks / "place"
    if not path.exists():
        atomic.replace(path, uuid.uuid4().hex.encode())
    return atomic.read_bytes(path, locks, 64).decode()
