"""What a launcher is: it has a run worked on somewhere, by a process that is given the run's folder and nothing else."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

OUTPUT = "output.txt"
"""In a run's folder: what the processes that worked on it printed, one after the other."""


def command(run: Path) -> list[str]:
    """The command line of a worker. Started again, it goes on where the run stopped; of a run that is completed it only says so."""
    return [sys.executable, "-m", "mtrl_cli", "resume", str(run)]


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        code: the worker's exit code; None where it ended without one: it was killed, or its node is gone.
        why: in a few words, where there is something to say.
    """

    code: int | None
    why: str = ""


class Job(ABC):
    """One run that is being worked on, or waits for its turn.

    Attributes:
        handle: by which a later process finds the job again (`Launcher.attach`); empty where it ends with this process.
    """

    handle = ""

    @abstractmethod
    def poll(self) -> End | None:
        """How the job ended; None while it has not. Does not wait."""

    @abstractmethod
    def is_waiting(self) -> bool:
        """Whether it has yet to be given its machine."""

    @abstractmethod
    def stop(self) -> None:
        """Ask the worker to save and end (SIGTERM), or take the job out of the queue. Does not wait; may be called again."""


class Launcher(ABC):
    """Where a sweep's runs are worked on: `launcher=`.

    Subclasses have keyword-only parameters for what conf/launcher/<name>.yaml sets.

    Attributes:
        jobs: how many runs at a time.
    """

    jobs: int

    @abstractmethod
    def start(self, run: Path) -> Job:
        """Have the run in this folder, an absolute path, worked on with `command(run)`.

        Raises:
            RunError: it cannot be started here or now. UserError: what this launcher needs is missing or wrong.
        """

    def attach(self, run: Path, handle: str) -> Job | None:
        """The job that an earlier process started and left; None if it has ended, or ends with the process that started it."""
        return None

    def close(self) -> None:
        """Let go of what the launcher holds. Jobs that outlive this process are left alone, others have ended by then."""
