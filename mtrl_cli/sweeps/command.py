"""`mtrl sweep`: run the trials of a sweep."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
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
from mtrl_cli.sweeps.plan import Plan
from mtrl_cli.sweeps.scheduler import SweepLoop
from mtrl_cli.sweeps.search_space import first_values
from mtrl_cli.sweeps.summary import best_as_command, ending
from mtrl_cli.sweeps.trial_run import TRIALS
from mtrl_cli.sweeps.trial_storage import TrialStorage, check_new_study

LOCK = ".lock"


def run(plan: Plan, *, command: Sequence[str]) -> None:
    """Start the sweep of a plan, or resume the sweep in the plan's folder, and work until its trials have ended.

    Several processes may work on one sweep. Each runs `launcher.jobs` trials at a time, and resumes trials whose process has died.

    Args:
        plan: the sweep's plan.
        command: the command line, stored with the sweep.

    Raises:
        UserError: the storage, the launcher or the folder cannot be used; nothing was created.
        RunError: a trial failed, or the storage or the launcher was lost.
        Stopped: by a signal, after saving.
    """
    # Workers receive only a run's folder, and trust no package because of the folder's content.
    os.environ["MTRL_TRUSTED_PACKAGES"] = ",".join(compose.trusted_packages(compose.trusting(plan.trusted_packages)))
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
        overrides: overrides of the keys that may change on resume, such as `launcher` and `sweep.retries`.
        command: the command line.
    """
    run(sweep_plan.load(folder, overrides), command=command)


def _first_evaluation(plan: Plan) -> int:
    """Return the step per task of a run's first evaluation. Only pruners use it."""
    if plan.search["pruner"] == "none":
        return plan.steps_per_task
    return int(plan.configuration(first_values(plan.axes), Path())["eval"]["every"])


def _launcher(plan: Plan) -> Launcher:
    made = instantiate.make({"launcher": dict(plan.launcher), "trusted_packages": list(plan.trusted_packages)}, "launcher")
    assert isinstance(made, Launcher)
    return made


def _open(plan: Plan, command: Sequence[str], first: int) -> tuple[Path, Plan, TrialStorage]:
    """Create the folder and the trial storage of a sweep, or open existing ones. Returns the absolute folder, the plan and the storage.

    If two processes start at the same time, one creates the sweep and the other opens it.
    """
    path = plan.run_dir or Path("runs/sweeps") / f"{plan.env}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    path = Path(os.path.abspath(path.expanduser()))
    if _is_new(path):
        check_new_study(path, plan)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={path} cannot be created: {error.strerror}") from None
    with FileLock(path / LOCK):
        if not _is_new(path):
            plan = sweep_plan.check_same(plan, path)
            for folder in (path / TRIALS, *(path / TRIALS).glob("*")):
                atomic.refuse_link(folder)  # an untrusted link may lead to other runs of the user
            print_line(f"resuming the sweep in {path}")
        sweep_plan.save(plan, path, command)
        return path, plan, TrialStorage(path, plan, first=first)


def _is_new(path: Path) -> bool:
    """Return whether to create a sweep at `path` rather than resume one. Raises UserError if both are impossible."""
    try:
        RunFolder.check_new(path)
        return True
    except UserError:
        if os.path.lexists(path / sweep_plan.RECORD):
            return False
        raise


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
