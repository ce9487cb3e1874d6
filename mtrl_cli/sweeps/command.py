"""`mtrl sweep`: run the trials of a sweep."""

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


def run(plan: Plan, *, command: Sequence[str]) -> None:
    """Start the sweep of a plan, or resume the one in the plan's folder, and work until its trials have ended.

    Several processes may work on one sweep. Each runs `launcher.jobs` trials at a time, and resumes those whose process has died.

    Args:
        plan: of the sweep.
        command: the command line, stored with the sweep.

    Raises:
        UserError: the storage, the launcher or the folder is wrong; nothing was created.
        RunError: a trial failed, or the storage or the launcher was lost.
        Stopped: by a signal, after saving.
    """
    # Workers receive only a run's folder, which must not decide which packages are trusted.
    os.environ["MTRL_TRUSTED_PACKAGES"] = ",".join(compose.trusted_packages(_trusted(plan)))
    with StopRequest() as stop:
        with stop.interruptible():
            first = _first_evaluation(plan)
            launcher = _launcher(plan)
        with closing(launcher):
            with stop.interruptible():
                folder, plan, storage = _open(plan, command, first)
            with closing(storage):
                rows = _work(folder, plan, storage, launcher, stop)
    _print_results(folder, plan, rows)


def resume(folder: Path, overrides: Sequence[str], *, command: Sequence[str]) -> None:
    """Resume the sweep in a folder: `mtrl resume`. Raises the same errors as `run`.

    Args:
        folder: the sweep's folder.
        overrides: of the keys that may change on resume, such as `launcher` and `sweep.retries`.
        command: the command line.
    """
    run(sweep_plan.load(folder, overrides), command=command)


def _trusted(plan: Plan) -> list[str]:
    return [f"trusted_packages=[{','.join(plan.trusted_packages)}]"] if plan.trusted_packages else []


def _first_evaluation(plan: Plan) -> int:
    """The step per task of a run's first evaluation. Only pruners need it."""
    if plan.search["pruner"] == "none":
        return plan.steps_per_task
    values = {key: axis.values[0] if isinstance(axis, Choices) else axis.low for key, axis in plan.axes.items()}
    return int(plan.configuration(values, Path())["eval"]["every"])


def _launcher(plan: Plan) -> Launcher:
    made = instantiate.make({"launcher": dict(plan.launcher), "trusted_packages": list(plan.trusted_packages)}, "launcher")
    assert isinstance(made, Launcher)
    return made


def _open(plan: Plan, command: Sequence[str], first: int) -> tuple[Path, Plan, TrialStorage]:
    """Create the folder and the trial storage of a sweep, or open existing ones. Returns the absolute folder, the plan and the storage.

    Two processes that start at the same time create one sweep.
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
                atomic.refuse_link(folder)  # an untrusted link may lead to other runs of the user
            print_line(f"resuming the sweep in {path}")
        sweep_plan.save(plan, path, command)
        try:
            return path, plan, TrialStorage(path, plan, first=first)
        except UserError:
            if is_new:
                _discard(path)
            raise


def _is_new(path: Path) -> bool:
    """Return whether to create a sweep at `path` rather than resume one. Raises UserError if neither is possible."""
    if not os.path.lexists(path / sweep_plan.RECORD):
        try:
            RunFolder.check_new(path)
        except UserError:
            if not os.path.lexists(path / sweep_plan.RECORD):  # else another process has just created it
                raise
    return not os.path.lexists(path / sweep_plan.RECORD)


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


@contextmanager
def _entered(path: Path) -> Iterator[None]:
    """Lock the sweep's folder, created if necessary, against other processes that create or open it."""
    lock = FileLock(path / LOCK)
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={path} cannot be created: {error.strerror}.") from None
        try:
            lock.acquire()
        except RunError:
            if path.is_dir():
                raise
            continue
        if lock.is_in_place():
            break
        lock.release()  # the last holder could not create the sweep and removed the folder
    try:
        yield
    finally:
        lock.release()


def _discard(path: Path) -> None:
    """Remove a sweep that could not be created. The caller holds the folder's lock, which is removed last."""
    for entry in path.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (path / LOCK).unlink()
    with suppress(OSError):  # another process has put files there
        path.rmdir()


def _work(folder: Path, plan: Plan, storage: TrialStorage, launcher: Launcher, stop: StopRequest) -> list[TrialRow]:
    try:
        with SweepDisplay(launcher.jobs) as display:
            return SweepLoop(folder, plan, storage, launcher, display, stop).work()
    except Stopped as stopped:
        stopped.is_reported = True
        print_line(f"resume with: mtrl resume {shlex.quote(str(folder))}")
        raise


def _print_results(folder: Path, plan: Plan, rows: list[TrialRow]) -> None:
    OutputGuard(sys.stdout)(lambda: console(sys.stdout).print(ending(plan, rows)))
    print_line(best_as_command(plan, rows))
    print_line(f"report: mtrl report {shlex.quote(str(folder))}")
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        raise RunError(f"{len(failed)} of {plan.trials} trials failed; trial {failed[0].number}: {failed[0].note}")
