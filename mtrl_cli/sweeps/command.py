"""`mtrl sweep`: many runs, as trials of one sweep."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mtrl_cli.build import instantiate
from mtrl_cli.config import compose
from mtrl_cli.errors import RunError, Stopped, UserError
from mtrl_cli.files import atomic
from mtrl_cli.files.file_lock import FileLock
from mtrl_cli.launchers.base import Launcher
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.runs.terminal import OutputGuard, console, print_line
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.display import SweepDisplay, TrialRow
from mtrl_cli.sweeps.optuna_storage import open_storage, storage_url
from mtrl_cli.sweeps.plan import Choices, Plan
from mtrl_cli.sweeps.scheduler import SweepLoop
from mtrl_cli.sweeps.summary import best_as_command, ending
from mtrl_cli.sweeps.trial_run import TRIALS
from mtrl_cli.sweeps.trial_storage import TrialStorage

LOCK = ".lock"


def sweep(plan: Plan, *, command: Sequence[str]) -> None:
    """Work on a sweep until its trials have ended: a new one, or the one that lies in the plan's folder.

    Several processes may work on one sweep. Each has `launcher.jobs` of its trials at a time, and goes on with those that others left.

    Args:
        plan: of the sweep.
        command: the command line, kept with the sweep.

    Raises:
        UserError: the storage, the launcher or the folder is wrong; nothing was made.
        RunError: a trial failed for good, or the storage or the launcher was lost.
        Stopped: by a signal, after saving.
    """
    # Workers are given a run's folder and nothing else; what the user trusts is the user's to say.
    os.environ["MTRL_TRUSTED_PACKAGES"] = ",".join(compose.trusted_packages(_trusted(plan)))
    with StopRequest() as stop:
        with stop.interruptible():
            first = _first_evaluation(plan)
            launcher = _launcher(plan)
        with closing(launcher):
            with stop.interruptible():
                folder, plan, book = _open(plan, command, first)
            with closing(book):
                rows = _work(folder, plan, book, launcher, stop)
    _tell_end(folder, plan, rows)


def go_on(folder: Path, overrides: Sequence[str], *, command: Sequence[str]) -> None:
    """Go on with the sweep in a folder: `mtrl resume`.

    Args:
        folder: the sweep's.
        overrides: what may differ from how it was begun: `launcher`, `sweep.retries` and so on.
        command: the command line.

    Raises:
        as `sweep`.
    """
    sweep(sweep_plan.load(folder, overrides), command=command)


def _trusted(plan: Plan) -> list[str]:
    return [f"trusted_packages=[{','.join(plan.trusted_packages)}]"] if plan.trusted_packages else []


def _first_evaluation(plan: Plan) -> int:
    """Steps per task at which a run is first evaluated; without a pruner that does not matter."""
    if plan.search["pruner"] == "none":
        return plan.steps_per_task
    values = {key: axis.words[0] if isinstance(axis, Choices) else axis.low for key, axis in plan.axes.items()}
    return int(plan.configuration(values, Path())["eval"]["every"])


def _launcher(plan: Plan) -> Launcher:
    made = instantiate.make({"launcher": dict(plan.launcher), "trusted_packages": list(plan.trusted_packages)}, "launcher")
    assert isinstance(made, Launcher)
    return made


def _open(plan: Plan, command: Sequence[str], first: int) -> tuple[Path, Plan, TrialStorage]:
    """The sweep's folder, absolute, the plan to go on with there, and its book: a new one, or that of the same sweep.

    Two processes that make it at the same time make one sweep.
    """
    path = plan.run_dir or Path("runs/sweeps") / f"{plan.env}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    path = Path(os.path.abspath(path.expanduser()))
    if _is_new(path) and plan.search["storage"]:
        open_storage(path, storage_url(plan.search["storage"]))
    with _entered(path):
        is_new = _is_new(path)
        if not is_new:
            plan = sweep_plan.check_same(plan, path)
            for folder in (path / TRIALS, *_listed(path / TRIALS)):
                atomic.refuse_link(folder)  # a stranger's may lead to runs of the user's own
            print_line(f"going on in {path}")
        sweep_plan.save(plan, path, command)
        try:
            return path, plan, TrialStorage(path, plan, first=first)
        except UserError:
            if is_new:
                _discard(path)
            raise


def _is_new(path: Path) -> bool:
    """Whether a sweep is to be made at `path`, rather than gone on with. Raises UserError if neither can be."""
    if not os.path.lexists(path / sweep_plan.RECORD):
        try:
            RunFolder.check_new(path)
        except UserError:
            if not os.path.lexists(path / sweep_plan.RECORD):  # else another process was quicker
                raise
    return not os.path.lexists(path / sweep_plan.RECORD)


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


@contextmanager
def _entered(path: Path) -> Iterator[None]:
    """Inside, no other process makes or enters the sweep's folder, which is made if need be."""
    lock = FileLock(path / LOCK)
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={path} cannot be made: {error.strerror}.") from None
        try:
            lock.acquire()
        except RunError:
            if path.is_dir():
                raise
            continue
        if lock.is_in_place():
            break
        lock.release()  # whoever had it has removed the folder: it could not make the sweep
    try:
        yield
    finally:
        lock.release()


def _discard(path: Path) -> None:
    """Remove what was made of a sweep that cannot be, by whoever has the folder's lock; that goes last, for whoever waits for it."""
    for entry in path.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (path / LOCK).unlink()
    with suppress(OSError):  # another process has come in by now
        path.rmdir()


def _work(folder: Path, plan: Plan, book: TrialStorage, launcher: Launcher, stop: StopRequest) -> list[TrialRow]:
    try:
        with SweepDisplay(launcher.jobs) as display:
            return SweepLoop(folder, plan, book, launcher, display, stop).work()
    except Stopped as stopped:
        stopped.told = True
        print_line(f"the sweep goes on where it was with: mtrl resume {shlex.quote(str(folder))}")
        raise


def _tell_end(folder: Path, plan: Plan, rows: list[TrialRow]) -> None:
    OutputGuard(sys.stdout)(lambda: console(sys.stdout).print(ending(plan, rows)))
    print_line(best_as_command(plan, rows))
    print_line(f"to see what came out: mtrl report {shlex.quote(str(folder))}")
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        raise RunError(f"{len(failed)} of {plan.trials} trials failed; trial {failed[0].number}: {failed[0].note}")
