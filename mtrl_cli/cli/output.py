"""Print the results and errors of a command, on the first of several ranks only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mtrl_cli.errors import UserError, printable
from mtrl_cli.parallel import torchrun

ERROR_DELAY_SECONDS = 10.0
"""Delay before other ranks print an error: it is usually also the first rank's, and torchrun ends them before the delay is over."""


def is_first_rank() -> bool:
    """Return whether this process is the first of the ranks that torchrun started, or the only one."""
    try:
        return torchrun.place().is_first
    except UserError:
        return True


def print_error(message: str, exit_code: int, *, delay: bool = True) -> int:
    """Print an error on stderr and return the exit code. Control characters are replaced, as a message may quote an untrusted file.

    Args:
        delay: whether ranks other than the first wait for `ERROR_DELAY_SECONDS`.
    """
    if delay and not is_first_rank():
        time.sleep(ERROR_DELAY_SECONDS)
    print(f"mtrl: error: {printable(message)}", file=sys.stderr)
    return exit_code


def print_result(text: str) -> None:
    """Print a result on stdout, on the first rank only."""
    if is_first_rank():
        with broken_pipe_ignored():
            print(text, flush=True)


@contextmanager
def broken_pipe_ignored() -> Iterator[None]:
    """Ignore a closed stdout, as in `mtrl ls | head -1`."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
