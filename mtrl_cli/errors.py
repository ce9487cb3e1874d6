"""What a run can end with, each with the exit code that the command line promises, and how a message shows a value."""

import re
from typing import Any


class UserError(ValueError):
    """The command, the configuration or a given folder is wrong; nothing was created. One or two plain lines. Exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """The run failed while it was running (a loss that is not finite, a full disk). One or two plain lines. Exit code 1."""

    exit_code = 1


class RanksLost(RunError):
    """Another rank of the run has ended, so this one cannot go on.

    Attributes:
        is_ours_to_tell: whether this rank tells it, though it is not the first: that one is gone.
    """

    is_ours_to_tell = False


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Exit code 128 + the signal's number, after saving.

    Not an `Exception`, so that no library's `except Exception` can swallow a request to stop.

    Attributes:
        told: whether the user has been told what became of the run.
    """

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.told = False


def show(value: Any) -> str:
    """A value for a message: on one line, and short."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
    if not re.fullmatch(r"[\w./:,@+\[\]{} '-]+", text):
        text = repr(text)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Replace characters that could control the terminal, except line ends. Files of a run may come from a stranger."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
