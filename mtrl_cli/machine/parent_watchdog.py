"""Ending with the process that started this one, however that ends: a pipe between them, which the system closes for the dead."""

from __future__ import annotations

import os
import signal
import threading
import time

VARIABLE = "MTRL_PARENT"
"""In a child's environment: the file descriptor of the pipe's end that it reads; nothing is ever written to the other."""

PATIENCE_SECONDS = 300.0
"""In which a child that was asked to stop has saved."""

_is_stopping = False


def note_stop() -> None:
    """This process was asked to stop and is saving: it is not to be asked again, as a second signal would end it at once."""
    global _is_stopping
    _is_stopping = True


def watch() -> None:
    """Ask this process to stop (SIGTERM: it saves) as soon as its parent is gone, if the environment says that it has one to follow.

    Called by the main thread, before there are others. What it starts later inherits neither the variable nor the pipe.
    """
    named = os.environ.pop(VARIABLE, None)
    if named is None or not named.isdecimal():
        return
    try:
        os.set_inheritable(int(named), False)
    except OSError:  # no descriptor of ours: a variable that was handed on
        return
    threading.Thread(target=_follow, args=(int(named),), name="parent", daemon=True).start()


def _follow(pipe: int) -> None:
    try:
        while os.read(pipe, 1):
            pass
    except OSError:
        return
    if not _is_stopping:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
