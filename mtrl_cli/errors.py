"""Exceptions with the exit codes of the command line, and formatting of values in messages."""

import re
from typing import Any


class UserError(ValueError):
    """Invalid command, configuration or folder; nothing was created. The message has one or two lines. Exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """The run failed, for example because of a non-finite loss or a full disk. The message has one or two lines. Exit code 1."""

    exit_code = 1


class RanksLost(RunError):
    """Another rank has ended, so this rank cannot continue.

    Attributes:
        is_reported_here: whether this rank prints the error, because the first rank is gone.
    """

    is_reported_here = False


class Stopped(BaseException):
    """SIGINT or SIGTERM was received. Exit code 128 + signal number, after saving.

    Not an `Exception`, so that no `except Exception` in a library can swallow it.

    Attributes:
        is_reported: whether the state of the run has been printed.
    """

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.is_reported = False


def show(value: Any) -> str:
    """Format a value for a message: on one line, at most 80 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
    if not re.fullmatch(r"[\w./:,@+\[\]{} '-]+", text):
        text = repr(text)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Replace characters that could control the terminal, except line ends. Files of a run may be untrusted."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
