"""Runs as jobs of a Slurm cluster, handed in through submitit."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.launchers import remote
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher, command
from mtrl_cli.machine import extras
from mtrl_cli.types import PositiveFloat, PositiveInt

FOLDER = "slurm"
"""In a run's folder: what submitit and Slurm write of its jobs."""

ADVICE = "what a cluster wants to be told is launcher.partition, launcher.account, launcher.timeout_min, …; `sinfo` lists what it has"
NO_CLUSTER = "start the sweep on a machine of a Slurm cluster, where `sinfo` answers, or give launcher=local"
COMMAND_SECONDS = 120.0  # a controller that is busy or moving to its stand-in answers late
SAVING_SECONDS = 120.0  # how long a job that was asked to stop may save before Slurm ends it
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
AT_WORK = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}
GONE = "GONE"
REASONS = {
    GONE: "Slurm no longer knows the job",
    "CANCELLED": "its job was cancelled",
    "OUT_OF_MEMORY": "it needed more memory than its job was given (launcher.mem_gb)",
    "TIMEOUT": "its job's time was up (launcher.timeout_min)",
}


def work(words: list[str], output: str) -> None:
    """In the job, called by submitit: have the worker's command line run, and end with its exit code.

    Slurm signals every process of the job. SIGTERM (preemption, a requeue, `SlurmJob.stop`) reaches the worker itself, which saves and
    ends. SIGUSR2 comes ahead of the time limit (sbatch's --signal, which submitit gives): then the worker is made to save, and the job is
    put back into the queue under its number.
    """
    is_out_of_time = False

    def make_room(number: int, frame: FrameType | None) -> None:
        nonlocal is_out_of_time
        is_out_of_time = True
        worker.terminate()

    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the worker, whom the signal would kill, inherits that
    worker = remote.begin(words, output, _share(), own_session=False)
    signal.signal(signal.SIGUSR2, make_room)
    code = worker.wait()
    if is_out_of_time and code == 128 + signal.SIGTERM:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True, timeout=COMMAND_SECONDS)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _share() -> dict[str, str]:
    """What Slurm has given the job of its machine: the worker heeds it where nothing (task/affinity, cgroups) confines it to that."""
    cores, memory, memory_per_core = (
        int(text) if text.isdecimal() else None
        for text in (os.environ.get(name, "") for name in ("SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"))
    )
    if cores is None:
        return {}
    megabytes = memory or (memory_per_core or 0) * cores
    return remote.share(cores, megabytes * 2**20 or None)


@dataclass(frozen=True)
class _State:
    """A job as the controller sees it.

    Attributes:
        name: PENDING, RUNNING, COMPLETED, …; `GONE` once it is forgotten.
        status: as wait(2) gives it, of a job that has ended.
        script: the batch script's path.
    """

    name: str
    status: int = 0
    script: str = ""


class _Queue:
    """What Slurm's controller says of our jobs: asked for all of them at once and only now and then, as it serves a whole cluster.

    There may be no accounting (sacct, which submitit would ask), so it is asked for ended jobs, too, which it remembers for some minutes.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._asked_at = -float("inf")
        self._states: dict[str, _State] = {}

    def watch(self, job: str) -> None:
        """From now on ask for this job, too."""
        self._states[job] = _State("PENDING")

    def forget(self, job: str) -> None:
        """No longer ask for a job that has ended."""
        self._states.pop(job, None)

    def state(self, job: str) -> _State:
        """A watched job's state, as of the last answer; where the controller cannot be reached, that stays."""
        if time.monotonic() - self._asked_at >= self._seconds:
            found = _ask(list(self._states))
            self._asked_at = time.monotonic()
            if found is not None:
                self._states = {each: found.get(each, _State(GONE)) for each in self._states}
        return self._states[job]


def _ask(jobs: list[str]) -> dict[str, _State] | None:
    """The states of those jobs that the controller knows; None where it does not answer."""
    question = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--Format=JobID:|,State:|,exit_code:|,Command:|"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        # Asked for one job alone, it calls an unknown number an error.
        return {} if "Invalid job id" in answer.stderr else None
    found = {}
    for line in answer.stdout.splitlines():
        number, name, status, script = [*line.split("|", 3), "", "", ""][:4]
        found[number.strip()] = _State(name.strip(), int(status) if status.strip().isdecimal() else 0, script.rstrip("|"))
    return found


def _end(state: _State) -> End:
    """How a job in this last state ended."""
    if state.name not in ("COMPLETED", "FAILED"):
        return End(None, REASONS.get(state.name, f"its job ended as {state.name}"))
    killed_by, code = state.status & 0x7F, state.status >> 8
    if code > 128 and code - 128 not in (signal.SIGINT, signal.SIGTERM):  # as a shell says it
        killed_by = code - 128
    return End(None, f"killed by signal {killed_by}") if killed_by else End(code)


class SlurmJob(Job):
    """One run's job.

    Args:
        handle: the job's number.
        queue: that watches it.
    """

    def __init__(self, handle: str, queue: _Queue):
        self.handle = handle
        self._queue = queue
        self._end: End | None = None
        self._asked_at: float | None = None

    def poll(self) -> End | None:
        """See the base class. A job that was put back into the queue has not ended."""
        if self._end is None:
            state = self._queue.state(self.handle)
            if state.name not in WAITING | AT_WORK:
                self._end = _end(state)
                self._queue.forget(self.handle)
            elif self._asked_at is not None and time.monotonic() - self._asked_at > SAVING_SECONDS:
                self._asked_at = time.monotonic()
                _cancel(self.handle)
        return self._end

    def is_waiting(self) -> bool:
        """See the base class."""
        return self._end is None and self._queue.state(self.handle).name in WAITING

    def stop(self) -> None:
        """See the base class. A job that has not ended two minutes later is ended by Slurm."""
        if self._end is not None or self._asked_at is not None:
            return  # a second signal would end the worker before it has saved
        self._asked_at = time.monotonic()
        _cancel(self.handle, "--state=PENDING")
        _cancel(self.handle, "--state=RUNNING", "--signal=TERM")


def _cancel(job: str, *options: str) -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["scancel", "--quiet", *options, job], capture_output=True, timeout=COMMAND_SECONDS, check=False)


class SlurmLauncher(Launcher):
    """Runs as jobs of a Slurm cluster. A job that Slurm preempts goes on in its place in the queue, from the run's checkpoint.

    Args:
        jobs: in the queue or at work at a time.
        partition: as sbatch takes it, as are `account` and `qos`; None, here and below: the cluster's default.
        account: whom the job is charged to.
        qos: quality of service.
        timeout_min: minutes that a job may take; then it saves, is put back into the queue and goes on.
        cpus_per_task: cores.
        mem_gb: memory, GB.
        gpus_per_node: GPUs.
        setup: lines of shell that the job begins with.
        extra: further parameters of sbatch, by name.
        poll_seconds: between two questions to Slurm's controller.

    Raises:
        UserError: submitit or Slurm's commands are missing here, or sbatch would refuse such a job.
    """

    def __init__(
        self,
        *,
        jobs: PositiveInt,
        partition: str | None,
        account: str | None,
        qos: str | None,
        timeout_min: PositiveInt | None,
        cpus_per_task: PositiveInt | None,
        mem_gb: PositiveFloat | None,
        gpus_per_node: PositiveInt | None,
        setup: list[str],
        extra: dict[str, bool | int | float | str],
        poll_seconds: PositiveFloat,
    ):
        self.jobs = jobs
        extras.require("launcher=slurm", "submitit", "slurm")
        if missing := [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]:
            raise UserError(
                f"launcher=slurm needs Slurm's commands, and there is no {missing[0]} on PATH; start the sweep on a machine of the cluster"
                " that has them (Debian's package: slurm-client), or give launcher=local"
            )
        # None leaves a parameter to the cluster; left out, the time would be submitit's five minutes.
        self._parameters: dict[str, Any] = {"partition": partition, "account": account, "qos": qos, "time": timeout_min}
        self._parameters |= {"cpus_per_task": cpus_per_task, "gpus_per_node": gpus_per_node}
        self._parameters |= {"mem": None if mem_gb is None else f"{max(1, round(mem_gb * 1024))}MB"}
        # Since 22.05 srun no longer takes over what sbatch was told about cores.
        self._parameters |= {"srun_args": None if cpus_per_task is None else [f"--cpus-per-task={cpus_per_task}"]}
        self._parameters |= {"setup": setup or None, "additional_parameters": {"requeue": True, **extra}}
        self._queue = _Queue(poll_seconds)
        self._try()

    def _try(self) -> None:
        """Have sbatch look at a job like ours, without queueing it."""
        script = self._executor(Path(tempfile.gettempdir()))._make_submission_file_text("true", "trial")
        try:
            with _outside_of_any_job():
                done = subprocess.run(
                    ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
                )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"launcher=slurm: Slurm's controller has not answered for {COMMAND_SECONDS:.0f} s") from error
        if done.returncode:
            is_no_cluster = re.search("configuration source|configuration file|contact slurm controller", done.stderr)
            advice = NO_CLUSTER if is_no_cluster else ADVICE
            raise UserError(f"launcher=slurm: sbatch refuses such a job: {_last_line(done.stderr)}\n{advice}")

    def _executor(self, folder: Path) -> Any:
        import submitit

        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**self._parameters)
        return executor

    def start(self, run: Path) -> Job:
        """See the base class."""
        executor = self._executor(run / FOLDER)
        executor.update_parameters(**self._parameters, job_name=f"mtrl-{run.name}")
        try:
            with _outside_of_any_job():
                handle = str(executor.submit(work, command(run), str(run / OUTPUT)).job_id)
        except Exception as error:  # submitit's own kinds, which are not ours to import before it is needed
            raise RunError(f"{run}: sbatch did not take its job: {_last_line(str(error))}") from error
        self._queue.watch(handle)
        return SlurmJob(handle, self._queue)

    def attach(self, run: Path, handle: str) -> Job | None:
        """See the base class.

        Raises:
            RunError: the controller does not answer.
        """
        found = _ask([handle]) if handle.isdecimal() else {}
        if found is None:
            raise RunError(f"{run}: Slurm's controller does not say what has become of its job {handle}; try again later")
        state = found.get(handle)
        # Numbers begin anew where a cluster was set up anew.
        if state is None or state.name not in WAITING | AT_WORK or not Path(state.script).is_relative_to(run / FOLDER):
            return None
        self._queue.watch(handle)
        return SlurmJob(handle, self._queue)


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Where we are in a job ourselves, hide its variables from sbatch, which would take them for its parameters."""
    import submitit

    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _last_line(text: str) -> str:
    """What a command of Slurm's said last, without its name."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    return lines[-1].removeprefix("sbatch: ").removeprefix("error: ")[:300] if lines else "it does not say why"
