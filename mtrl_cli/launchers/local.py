"""Runs as processes of this machine, which share it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from mtrl_cli.errors import RunError
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher, command
from mtrl_cli.machine import hardware, parent_watchdog
from mtrl_cli.types import PositiveInt


class LocalJob(Job):
    """A process of its own session: a terminal's Ctrl-C reaches the sweep alone, which then asks its workers to stop."""

    def __init__(self, process: subprocess.Popen[bytes], place: int):
        self._process = process
        self.place = place

    def poll(self) -> End | None:
        """How the process ended; None while it has not."""
        code = self._process.poll()
        if code is None:
            return None
        if code >= 0:
            return End(code)
        try:
            return End(None, f"killed by {signal.Signals(-code).name}")
        except ValueError:
            return End(None, f"killed by signal {-code}")

    def is_waiting(self) -> bool:
        """Never: it runs from the beginning."""
        return False

    def stop(self) -> None:
        """SIGTERM."""
        if self._process.poll() is None:
            self._process.terminate()


class LocalLauncher(Launcher):
    """Processes of this machine. They share its cores, its free memory and disk, and its GPUs, and end with this process.

    Args:
        jobs: runs at a time.
    """

    def __init__(self, *, jobs: PositiveInt):
        self.jobs = jobs
        self._running: list[LocalJob] = []
        self._gpus = hardware.gpus()
        # What is free is shared out once: what the first runs take is no reason to give less to the next.
        self._cores, self._memory = max(1, hardware.cores() // jobs), hardware.memory_available() // jobs
        self._disk: int | None = None
        # The system closes this process's end when it dies, and each worker reads the other.
        self._read, self._write = os.pipe()

    def start(self, run: Path) -> LocalJob:
        """Start the worker of a run; what it prints is added to the run's output.txt.

        Raises:
            RunError: there is no room for it on the disk or among the processes.
        """
        self._running = [job for job in self._running if job.poll() is None]
        taken = {job.place for job in self._running}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        try:
            if self._disk is None:
                self._disk = hardware.disk_free(run) // self.jobs
            handle = os.open(run / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(handle, "ab") as output:
                process = subprocess.Popen(
                    command(run),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.environment(place),
                    pass_fds=[self._read],
                    start_new_session=True,
                )
        except OSError as error:
            raise RunError(f"{run}: its process cannot be started: {error.strerror}.") from None
        job = LocalJob(process, place)
        self._running.append(job)
        return job

    def environment(self, place: int) -> dict[str, str]:
        """A worker's environment: ours, and what it has of the machine as the one at `place` of `jobs`."""
        shared = dict(os.environ) | {parent_watchdog.VARIABLE: str(self._read)}
        if self.jobs == 1:
            return shared
        shared |= {"MTRL_CORES": str(self._cores), "MTRL_MEMORY": str(self._memory)}
        if self._disk is not None:
            shared["MTRL_DISK"] = str(self._disk)
        shared.setdefault("OMP_NUM_THREADS", str(self._cores))
        if self._gpus:
            place %= self.jobs
            own = self._gpus[place :: self.jobs] or [self._gpus[place % len(self._gpus)]]
            shared |= {"CUDA_VISIBLE_DEVICES": ",".join(own), "MTRL_RUNS_PER_GPU": str(-(-self.jobs // len(self._gpus)))}
        return shared

    def close(self) -> None:
        """Close the pipe: workers that are still there save and end."""
        if self._write >= 0:
            os.close(self._write)
            os.close(self._read)
            self._write = -1
