"""Where Optuna keeps a sweep's trials: a journal in its folder, or a database that several machines share."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, unquote_plus

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from mtrl_cli.errors import RunError, UserError, show
from mtrl_cli.files import atomic
from mtrl_cli.files.file_lock import FileLock
from mtrl_cli.sweeps.plan import without_password

JOURNAL = "journal.log"
optuna.logging.set_verbosity(optuna.logging.ERROR)  # what there is to tell, the sweep's table tells
_DATABASE_SECONDS = 60  # in which another process's writing to SQLite is waited for


class _JournalLock(JournalFileOpenLock):
    """The journal's lock, which goes with its process, and whoever takes it cuts off a line that a dying process had begun.

    Args:
        path: the journal.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = FileLock(path.with_suffix(".lock"))

    def acquire(self) -> bool:
        self._lock.acquire()
        try:
            cut_torn_line(self._path)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        self._lock.release()


def cut_torn_line(path: Path, block: int = 2**16) -> None:
    """Cut off what stands behind the last line's end. Raises OSError, and so for a link."""
    with open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - block)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


def storage_url(storage: str | None) -> str | None:
    """The URL that `sweep.storage` means: itself, or what the variable of `env:NAME` holds, out of sight of `ps` and of sweep.json.

    Raises:
        UserError: there is no such variable, or it holds no URL.
    """
    if storage is None or not storage.startswith("env:"):
        return storage
    name = storage.removeprefix("env:")
    if "://" not in os.environ.get(name, ""):
        held = "holds none" if os.environ.get(name) else "is not set"
        raise UserError(
            f"sweep.storage={show(storage)}: expected an Optuna storage's URL in the environment variable {show(name)}, which {held}"
        )
    return os.environ[name]


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    """The journal in a sweep's folder, or the database at `url`, whose tables are made if need be.

    Raises:
        UserError: the database cannot be reached, or its driver is not installed; the journal is a link. RunError: it is damaged.
    """
    if url is None:
        path = folder / JOURNAL
        atomic.refuse_link(path)
        with reached(None):
            return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = {"timeout": _DATABASE_SECONDS} if url.startswith("sqlite") else {}
            return optuna.storages.get_storage(RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": arguments}))
    except ImportError as error:
        raise UserError(f"sweep.storage={without_password(url)} needs a package that is not installed: {_line(error, url)}") from None
    except Exception as error:
        if not _is_of_storage(error):
            raise
        raise UserError(f"sweep.storage={without_password(url)} cannot be opened: {_line(error, url)}") from None


@contextmanager
def reached(url: str | None) -> Iterator[None]:
    """Inside, what a storage may go wrong with is a line without its password.

    Raises:
        RunError: it cannot be reached, or is damaged.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        if not _is_of_storage(error):
            raise
        if url is None:
            raise RunError(f"the sweep's {JOURNAL} cannot be used: {_line(error, '')}") from None
        raise RunError(f"sweep.storage={without_password(url)} cannot be reached: {_line(error, url)}; the same command goes on") from None


def _is_of_storage(error: Exception) -> bool:
    """Whether an error is the storage's, rather than of a mistake in a program."""
    if isinstance(error, OSError | json.JSONDecodeError | optuna.exceptions.StorageInternalError | optuna.exceptions.DuplicatedStudyError):
        return True
    names = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return "sqlalchemy" in names or "alembic" in names or (isinstance(error, ValueError | RuntimeError) and "log format" in str(error))


def _line(error: Exception, url: str) -> str:
    """The first line that says what went wrong, without the URL's password."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = (lines[0] if lines else type(cause).__name__)[:300]
    if not url:
        return text
    text = without_password(text.replace(url, without_password(url)))
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, "***")
    return str(text)


def _secrets(url: str) -> set[str]:
    """The passwords in a URL, as they stand there and as drivers decode them."""
    found = [*re.findall(r"://[^\s:/@]*:(.*)@", url, re.DOTALL), *re.findall(r"(?i)(?:password|passwd|pwd)=([^&]*)", url)]
    return {secret for each in found for secret in (each, unquote(each), unquote_plus(each)) if secret}
