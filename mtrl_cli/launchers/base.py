"""The launcher interface. A launcher starts a worker process for a run; the run's folder is the worker's only input."""

from __future__ import annotations

import signal
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

OUTPUT = "output.txt"
"""File in a run's folder to which each worker appends its output."""


def worker_command(run: Path) -> list[str]:
    """Return the command line of a worker, which resumes the run, or does nothing if the run is completed."""
    return [sys.executable, "-m", "mtrl_cli", "resume", str(run)]


@dataclass(frozen=True)
class End:
    """The result of a job that has ended.

    Attributes:
        code: the worker's exit code; None if the worker was killed or its node was lost.
        why: the reason, if known.
    """

    code: int | None
    why: str = ""

    @classmethod
    def of(cls, code: int) -> End:
        """Convert an exit code as `subprocess` returns it: the negative signal number if the process was killed."""
        return cls(code) if code >= 0 else cls(None, f"killed by signal {-code} ({signal.strsignal(-code)})")


class Job(ABC):
    """A worker that is running or queued.

    Attributes:
        handle: identifies the job to a later process (`Launcher.attach`); empty if the job ends with this process.
    """

    handle = ""

    @abstractmethod
    def poll(self) -> End | None:
        """Return the end of the job, or None if the job has not ended. Does not block."""

    def is_waiting(self) -> bool:
        """Return whether the job is queued and has not started. False by default."""
        return False

    @abstractmethod
    def stop(self) -> None:
        """Send SIGTERM, so that the worker saves and exits, or remove the job from the queue. Does not block; may be repeated."""


class Launcher(ABC):
    """A place where a sweep's runs are executed: `launcher=`.

    Subclasses have keyword-only parameters for the keys of conf/launcher/<name>.yaml.

    Attributes:
        jobs: number of concurrent runs.
    """

    jobs: int

    @abstractmethod
    def start(self, run: Path) -> Job:
        """Start `worker_command(run)` for the run folder `run`, an absolute path.

        Raises:
            RunError: the job cannot be started now.
            UserError: a requirement of this launcher is missing or misconfigured.
        """

    def attach(self, run: Path, handle: str) -> Job | None:
        """Return the job that an earlier process started, or None if it has ended."""
        return None

    def close(self) -> None:
        """Release resources. Jobs that outlive this process continue; all others must have ended."""
