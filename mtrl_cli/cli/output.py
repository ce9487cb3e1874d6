"""Print the results and errors of a command, on the first of several ranks only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mtrl_cli.errors import UserError, print_error
from mtrl_cli.parallel import torchrun

ERROR_DELAY_SECONDS = 10.0
"""Delay before other ranks print an error: it is usually also the first rank's, and torchrun ends them before the delay is over."""


def is_first_rank() -> bool:
    """Return whether this process is the first of the ranks that torchrun started, or the only one."""
    try:
        return torchrun.place().is_first
    except UserError:
        return True


def print_error_of_rank(message: str) -> None:
    """Print an error on standard error; ranks other than the first wait for `ERROR_DELAY_SECONDS` before."""
    if not is_first_rank():
        time.sleep(ERROR_DELAY_SECONDS)
    print_error(message)


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
