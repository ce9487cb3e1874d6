"""How a command speaks: its answers on standard output, what went wrong in a line on standard error; of several ranks, only one does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mtrl_cli.errors import UserError, printable
from mtrl_cli.parallel import torchrun

OTHERS_SECONDS = 10.0
"""So long the ranks after the first leave it to that one to tell an error, which is most often the same; torchrun ends them by then."""


def is_first() -> bool:
    """Whether this process is the one that speaks, of those that torchrun has started."""
    try:
        return torchrun.place().is_first
    except UserError:
        return True


def tell_error(message: str, code: int, is_ours: bool = False) -> int:
    """One or two plain lines on stderr; returns the exit code. What a stranger's file put into them cannot steer the terminal."""
    if not is_first() and not is_ours:
        time.sleep(OTHERS_SECONDS)
    print(f"mtrl: error: {printable(message)}", file=sys.stderr)
    return code


def show(text: str) -> None:
    """Print an answer."""
    if not is_first():
        return
    with reader_may_leave():
        print(text, flush=True)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Whoever reads what is printed may have gone (`mtrl ls | head -1`), which is no error."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
