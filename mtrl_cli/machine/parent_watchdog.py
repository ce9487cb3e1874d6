"""Stop this process when its parent dies. A pipe connects parent and child; the system closes the parent's end when the parent dies."""

from __future__ import annotations

import os
import signal
import threading
import time

VARIABLE = "MTRL_PARENT"
"""Environment variable of a child: file descriptor of the read end of the pipe, to which nothing is ever written."""

SAVING_SECONDS = 300.0
"""Time to save after SIGTERM, before SIGKILL."""

_is_stopping = False


def note_stop() -> None:
    """Record that this process is stopping, so that `_follow` sends no second signal, which would end the process before saving."""
    global _is_stopping
    _is_stopping = True


def watch() -> None:
    """Send SIGTERM to this process when its parent dies, so that the process saves. Does nothing unless the environment names a pipe.

    Call this in the main thread before starting other threads. Children of this process inherit neither the variable nor the pipe.
    """
    descriptor = os.environ.pop(VARIABLE, None)
    if descriptor is None or not descriptor.isdecimal():
        return
    try:
        os.set_inheritable(int(descriptor), False)
    except OSError:  # the variable was inherited, but not the descriptor
        return
    threading.Thread(target=_follow, args=(int(descriptor),), name="parent", daemon=True).start()


def _follow(pipe: int) -> None:
    try:
        while os.read(pipe, 1):
            pass
    except OSError:
        return
    if not _is_stopping:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVING_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
