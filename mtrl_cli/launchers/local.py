"""Run trials as processes on this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from mtrl_cli.errors import RunError
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher, worker_command
from mtrl_cli.launchers.worker import start_worker
from mtrl_cli.machine import hardware
from mtrl_cli.types import PositiveInt


class LocalJob(Job):
    """A local process in a separate session, so that Ctrl-C in a terminal reaches only the sweep, which then stops its workers."""

    def __init__(self, process: subprocess.Popen[bytes], slot: int):
        self._process = process
        self.slot = slot

    def poll(self) -> End | None:
        """See `Job.poll`."""
        code = self._process.poll()
        return None if code is None else End.of(code)

    def stop(self) -> None:
        """Send SIGTERM."""
        if self._process.poll() is None:
            self._process.terminate()


class LocalLauncher(Launcher):
    """Local processes that share the cores, free memory, free disk space and GPUs of this machine. They end with this process.

    Args:
        jobs: number of concurrent runs.
    """

    def __init__(self, *, jobs: PositiveInt):
        self.jobs = jobs
        self._running: list[LocalJob] = []
        self._gpus = hardware.gpus()
        # Shares are fixed at the start: the memory that running trials use must not reduce the share of later trials.
        self._cores, self._memory = max(1, hardware.cores() // jobs), hardware.memory_available() // jobs
        self._disk: int | None = None
        self._read, self._write = os.pipe()  # the system closes the write end when this process dies; workers read the other end

    def start(self, run: Path) -> LocalJob:
        """See `Launcher.start`.

        Raises:
            RunError: the process or its output file cannot be created.
        """
        self._running = [job for job in self._running if job.poll() is None]
        taken = {job.slot for job in self._running}
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        try:
            if self._disk is None:
                self._disk = hardware.disk_free(run) // self.jobs
            process = start_worker(worker_command(run), str(run / OUTPUT), self.environment(slot), new_session=True, pipe=self._read)
        except OSError as error:
            raise RunError(f"{run}: its process cannot be started: {error.strerror}") from None
        job = LocalJob(process, slot)
        self._running.append(job)
        return job

    def environment(self, slot: int) -> dict[str, str]:
        """Return the variables that describe the share of the worker in `slot` of `jobs`. A single job gets the whole machine."""
        if self.jobs == 1:
            return {}
        variables = {"MTRL_CORES": str(self._cores), "MTRL_MEMORY": str(self._memory)}
        if self._disk is not None:
            variables["MTRL_DISK"] = str(self._disk)
        if "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(self._cores)
        if self._gpus:
            slot %= self.jobs
            own = self._gpus[slot :: self.jobs] or [self._gpus[slot % len(self._gpus)]]
            variables |= {"CUDA_VISIBLE_DEVICES": ",".join(own), "MTRL_RUNS_PER_GPU": str(-(-self.jobs // len(self._gpus)))}
        return variables

    def close(self) -> None:
        """Close the pipe, so that remaining workers save and exit."""
        os.close(self._write)
        os.close(self._read)
