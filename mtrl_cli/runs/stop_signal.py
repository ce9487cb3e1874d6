"""Stop requests: SIGINT and SIGTERM set a flag that the training loop checks between steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from mtrl_cli.errors import Stopped
from mtrl_cli.machine import parent_watchdog

IMPATIENCE_SECONDS = 1.0
SHOW_CURSOR = b"\x1b[?25h"


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGHUP (a closed terminal) are recorded instead of ending the process.

    `received` is the number of the first signal, or None. The loop calls `check()` where it can stop. A second signal, more than one second
    after the first, ends the process immediately with the same exit code. An ignored SIGHUP (nohup) stays ignored. Outside the main thread,
    where Python allows no handlers, no signal is recorded.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._interruptible = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at < IMPATIENCE_SECONDS:
                return  # a key that is held down, or a signal to the process and to its group
            if sys.stdout is not None and sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR)  # the live display has hidden it
            os._exit(128 + number)
        self.received, self._received_at = number, time.monotonic()
        parent_watchdog.note_stop()
        if self._interruptible:
            raise Stopped(number)

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self.received is not None:
            raise Stopped(self.received)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Return a context in which a signal raises Stopped immediately, for long work without state to save, such as compilation."""
        self._interruptible += 1
        try:
            self.check()
            yield
        finally:
            self._interruptible -= 1
        self.check()  # in case a library swallowed the exception
