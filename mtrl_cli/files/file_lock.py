"""Locks between processes of one machine, or of several that share a file system: flock on a file that stays."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from mtrl_cli.errors import RunError

_held: set[int] = set()


class FileLock:
    """Held by one process at a time, and let go of when that ends, however it ends.

    Args:
        path: of the lock's file, whose folder must be there. The file stays: were it removed, two could hold two locks of one name.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Wait for the lock. Raises RunError where there can be none."""
        self._take(fcntl.LOCK_EX)

    def try_acquire(self) -> bool:
        """Take the lock if nobody has it; returns whether it is ours. Raises RunError where there can be none."""
        return self._take(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _take(self, how: int) -> bool:
        assert self._handle is None, self.path
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(f"{self.path} cannot be opened: {error.strerror}.") from None
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError as error:
            os.close(handle)
            raise RunError(f"{self.path} cannot be locked: {error.strerror}; file locks (flock) are needed there.") from None
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _held.add(handle)
        return True

    def is_in_place(self) -> bool:
        """Whether the lock that is held is still the one of its name: its folder may have been removed, and made again."""
        assert self._handle is not None, self.path
        try:
            return os.path.samestat(os.fstat(self._handle), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go of the lock; without it, does nothing."""
        if self._handle is not None:
            _held.discard(self._handle)
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # for a child that was forked this moment and has yet to close it
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock at `path` now. Makes no file."""
    if not os.path.lexists(path):
        return True
    lock = FileLock(path)
    free = lock.try_acquire()
    lock.release()
    return free


def _close_in_child() -> None:
    """A forked child shares its parent's locks, and would hold them when the parent is gone."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
