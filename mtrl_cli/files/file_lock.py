"""Locks between processes of one machine, or of machines that share a file system: flock on a file that is not deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import stat
from pathlib import Path
from types import TracebackType

from mtrl_cli.errors import RunError

_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()


class FileLock:
    """A lock that one process holds at a time, until the process releases the lock or ends in any way.

    Args:
        path: the lock's file, in an existing folder. The file is never removed: two processes could otherwise lock two files of one name.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Wait for the lock and acquire it. Raises RunError if the file cannot be locked."""
        self._lock(fcntl.LOCK_EX)

    def try_acquire(self) -> bool:
        """Acquire the lock unless another process holds it. Returns whether this process holds it. Raises RunError if locking fails."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _lock(self, operation: int) -> bool:
        assert self._handle is None, self.path
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(f"{self.path} cannot be opened: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise RunError(f"{self.path} is not a regular file")
            fcntl.flock(handle, operation)
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} {platform.node()}\n".encode())
        except BaseException as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                return False
            if not isinstance(error, OSError):
                raise
            reason = "its file system has no file locks (flock)" if error.errno in _NOT_SUPPORTED else error.strerror
            raise RunError(f"{self.path} cannot be locked: {reason}") from None
        self._handle = handle
        _held.add(handle)
        return True

    def owner(self) -> str:
        """Describe the process that locked the file last: "process 12 on host"."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return "another process"
        with open(handle, "rb") as file:
            match = re.fullmatch(rb"(\d{1,10}) ([\w.-]{0,64})\n", file.read(80))
        return f"process {match[1].decode()} on {match[2].decode()}" if match else "another process"

    def release(self) -> None:
        """Release the lock. Does nothing if the lock is not held."""
        if self._handle is not None:
            _held.discard(self._handle)
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # a child that was forked just now may still have the file open
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def is_free(path: Path) -> bool:
    """Return whether no process holds the lock at `path`. Creates no file."""
    if not os.path.lexists(path):
        return True
    lock = FileLock(path)
    free = lock.try_acquire()
    lock.release()
    return free


def _close_in_child() -> None:
    """Close the locks that a forked child inherits: the child would hold them after its parent has ended."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
