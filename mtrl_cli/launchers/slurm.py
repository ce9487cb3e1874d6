"""Run trials as jobs of a Slurm cluster, submitted through submitit."""

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
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher, worker_command
from mtrl_cli.launchers.worker import share_variables, start_worker
from mtrl_cli.machine import extras
from mtrl_cli.types import PositiveFloat, PositiveInt

FOLDER = "slurm"
"""Folder within a run's folder for the files that submitit and Slurm write."""

ADVICE = "set what your cluster requires: launcher.partition, launcher.account, launcher.timeout_min, …; `sinfo` lists the partitions"
NO_CLUSTER = "start the sweep on a machine of a Slurm cluster, where `sinfo` works, or use launcher=local"
COMMAND_SECONDS = 120.0  # a busy controller, or one during a failover, answers late
SAVING_SECONDS = 120.0  # time to save after SIGTERM, before Slurm kills the job
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}
GONE = "GONE"
REASONS = {
    GONE: "Slurm no longer lists the job",
    "CANCELLED": "the job was cancelled",
    "OUT_OF_MEMORY": "the job exceeded its memory limit (launcher.mem_gb)",
    "TIMEOUT": "the job exceeded its time limit (launcher.timeout_min)",
}


def work(command: list[str], output: str) -> None:
    """Run a worker inside the job and exit with the worker's exit code. submitit calls this function.

    Slurm signals every process of the job. SIGTERM (preemption, a requeue, `SlurmJob.stop`) reaches the worker directly, which saves and
    exits. SIGUSR2 arrives before the time limit, because submitit sets sbatch's --signal. This function then stops the worker and requeues
    the job under the same id.
    """
    is_out_of_time = False

    def stop_worker(number: int, frame: FrameType | None) -> None:
        nonlocal is_out_of_time
        is_out_of_time = True
        worker.terminate()

    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # inherited by the worker, which the signal would kill
    worker = start_worker(command, output, _share(), new_session=False)
    signal.signal(signal.SIGUSR2, stop_worker)
    code = worker.wait()
    if is_out_of_time and code == 128 + signal.SIGTERM:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True, timeout=COMMAND_SECONDS)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _share() -> dict[str, str]:
    """Return the variables that limit the worker to the job's share, in case Slurm does not enforce it (task/affinity, cgroups)."""
    cores, memory, memory_per_core = (
        int(text) if text.isdecimal() else None
        for text in (os.environ.get(name, "") for name in ("SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"))
    )
    if cores is None:
        return {}
    megabytes = memory or (memory_per_core or 0) * cores
    return share_variables(cores, megabytes * 2**20 or None)


@dataclass(frozen=True)
class _State:
    """The state of a job as the controller reports it.

    Attributes:
        name: PENDING, RUNNING, COMPLETED, …; `GONE` if the controller no longer lists the job.
        status: wait status, as in wait(2), of a job that has ended.
        script: path of the batch script.
    """

    name: str
    status: int = 0
    script: str = ""


class _Queue:
    """The states of all watched jobs, fetched by one query at intervals, which keeps the load of the controller low.

    submitit queries the accounting database (sacct), which a cluster may not have. The controller lists ended jobs for some minutes.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._fetched_at = -float("inf")
        self._states: dict[str, _State] = {}

    def watch(self, job: str) -> None:
        """Add a job to those that are fetched."""
        self._states[job] = _State("PENDING")

    def forget(self, job: str) -> None:
        """Remove a job that has ended."""
        self._states.pop(job, None)

    def state(self, job: str) -> _State:
        """Return the last known state of a watched job. The state stays while the controller is unreachable."""
        if time.monotonic() - self._fetched_at >= self._seconds:
            found = _fetch_states(list(self._states))
            self._fetched_at = time.monotonic()
            if found is not None:
                self._states = {each: found.get(each, _State(GONE)) for each in self._states}
        return self._states[job]


def _fetch_states(jobs: list[str]) -> dict[str, _State] | None:
    """Return the states of the jobs that the controller lists, or None if it does not answer."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--Format=JobID:|,State:|,exit_code:|,Command:|"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        # For a single job, an unknown id is an error.
        return {} if "Invalid job id" in answer.stderr else None
    found = {}
    for line in answer.stdout.splitlines():
        number, name, status, script = [*line.split("|", 3), "", "", ""][:4]
        found[number.strip()] = _State(name.strip(), int(status) if status.strip().isdecimal() else 0, script.rstrip("|"))
    return found


def _end(state: _State) -> End:
    """Return the end of a job from its final state."""
    if state.name not in ("COMPLETED", "FAILED"):
        return End(None, REASONS.get(state.name, f"the job ended with state {state.name}"))
    killed_by, code = state.status & 0x7F, state.status >> 8
    if code > 128 and code - 128 not in (signal.SIGINT, signal.SIGTERM):  # the convention of shells
        killed_by = code - 128
    return End.of(-killed_by or code)


class SlurmJob(Job):
    """A Slurm job.

    Args:
        handle: the job id.
        queue: fetches the job's state.
    """

    def __init__(self, handle: str, queue: _Queue):
        self.handle = handle
        self._queue = queue
        self._queue.watch(handle)
        self._end: End | None = None
        self._stopped_at: float | None = None

    def poll(self) -> End | None:
        """See `Job.poll`. A requeued job has not ended."""
        if self._end is None:
            state = self._queue.state(self.handle)
            if state.name not in WAITING | RUNNING:
                self._end = _end(state)
                self._queue.forget(self.handle)
            elif self._stopped_at is not None and time.monotonic() - self._stopped_at > SAVING_SECONDS:
                self._stopped_at = time.monotonic()
                _cancel(self.handle)
        return self._end

    def is_waiting(self) -> bool:
        """See `Job.is_waiting`."""
        return self._end is None and self._queue.state(self.handle).name in WAITING

    def stop(self) -> None:
        """See `Job.stop`. Slurm kills the job if it has not ended two minutes later."""
        if self._end is not None or self._stopped_at is not None:
            return  # a second signal would end the worker before it has saved
        self._stopped_at = time.monotonic()
        _cancel(self.handle, "--state=PENDING")
        _cancel(self.handle, "--state=RUNNING", "--signal=TERM")


def _cancel(job: str, *options: str) -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["scancel", "--quiet", *options, job], capture_output=True, timeout=COMMAND_SECONDS, check=False)


class SlurmLauncher(Launcher):
    """A Slurm cluster. A preempted job is requeued and resumes the run from its latest checkpoint.

    None selects the cluster's default.

    Args:
        jobs: number of jobs that are queued or running at a time.
        partition: sbatch's --partition.
        account: sbatch's --account.
        qos: sbatch's --qos.
        timeout_min: time limit in minutes; a job that reaches the limit saves, is requeued and resumes.
        cpus_per_task: cores per run.
        mem_gb: memory per run in GB.
        gpus_per_node: GPUs per run.
        setup: shell lines to run first.
        extra: additional sbatch parameters by name.
        poll_seconds: interval between queries to the controller.

    Raises:
        UserError: submitit or Slurm's commands are missing, or sbatch refuses the parameters.
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
                f"launcher=slurm needs Slurm's commands, but {missing[0]} is not on PATH. Start the sweep on a machine of the cluster"
                " (Debian package: slurm-client), or use launcher=local"
            )
        # None selects the cluster's default. Without a value, submitit would set a time limit of five minutes.
        self._parameters: dict[str, Any] = {"partition": partition, "account": account, "qos": qos, "time": timeout_min}
        self._parameters |= {"cpus_per_task": cpus_per_task, "gpus_per_node": gpus_per_node}
        self._parameters |= {"mem": None if mem_gb is None else f"{max(1, round(mem_gb * 1024))}MB"}
        # Since Slurm 22.05 srun no longer inherits --cpus-per-task from sbatch.
        self._parameters |= {"srun_args": None if cpus_per_task is None else [f"--cpus-per-task={cpus_per_task}"]}
        self._parameters |= {"setup": setup or None, "additional_parameters": {"requeue": True, **extra}}
        self._queue = _Queue(poll_seconds)
        self._check_accepted()

    def _check_accepted(self) -> None:
        """Validate the parameters with sbatch, without queueing a job. Raises UserError."""
        script = self._executor(Path(tempfile.gettempdir()), "mtrl")._make_submission_file_text("true", "trial")
        try:
            with _without_job_variables():
                done = subprocess.run(
                    ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
                )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"launcher=slurm: the Slurm controller did not answer within {COMMAND_SECONDS:.0f} s") from error
        if done.returncode:
            is_no_cluster = re.search("configuration source|configuration file|contact slurm controller", done.stderr)
            advice = NO_CLUSTER if is_no_cluster else ADVICE
            raise UserError(f"launcher=slurm: sbatch refuses the job: {_last_line(done.stderr)}\n{advice}")

    def _executor(self, folder: Path, job_name: str) -> Any:
        import submitit

        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**self._parameters, job_name=job_name)
        return executor

    def start(self, run: Path) -> Job:
        """See `Launcher.start`."""
        executor = self._executor(run / FOLDER, f"mtrl-{run.name}")
        try:
            with _without_job_variables():
                handle = str(executor.submit(work, worker_command(run), str(run / OUTPUT)).job_id)
        except Exception as error:  # submitit's own exceptions; importing submitit for them is slow
            raise RunError(f"{run}: sbatch refused the job: {_last_line(str(error))}") from error
        return SlurmJob(handle, self._queue)

    def attach(self, run: Path, handle: str) -> Job | None:
        """See `Launcher.attach`.

        Raises:
            RunError: the controller does not answer.
        """
        found = _fetch_states([handle]) if handle.isdecimal() else {}
        if found is None:
            raise RunError(f"{run}: the Slurm controller does not report the state of job {handle}. Try again later")
        state = found.get(handle)
        # Compare the script, too: a reinstalled cluster reuses job ids.
        if state is None or state.name not in WAITING | RUNNING or not Path(state.script).is_relative_to(run / FOLDER):
            return None
        return SlurmJob(handle, self._queue)


@contextlib.contextmanager
def _without_job_variables() -> Iterator[None]:
    """Remove the variables of a surrounding Slurm job, which sbatch would use as parameters, from the environment."""
    import submitit

    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _last_line(text: str) -> str:
    """Return the last error line of a Slurm command, without the name of the command."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    return lines[-1].removeprefix("sbatch: ").removeprefix("error: ")[:300] if lines else "no reason given"
