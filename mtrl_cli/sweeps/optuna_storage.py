"""Optuna storages of a sweep: a journal in its folder, or a database that several machines share."""

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

from mtrl_cli.errors import RunError, UserError, first_line, show
from mtrl_cli.files import atomic
from mtrl_cli.files.file_lock import FileLock
from mtrl_cli.sweeps.plan import without_password

JOURNAL = "journal.log"
optuna.logging.set_verbosity(optuna.logging.ERROR)  # the sweep's table shows the progress
_DATABASE_SECONDS = 60  # time to wait for another process that writes to SQLite


class _JournalLock(JournalFileOpenLock):
    """The journal's lock. It ends with its process. The next holder removes the unfinished line of a killed process.

    Args:
        path: path of the journal.
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
    """Remove everything after the last line end. Raises OSError, including for a link."""
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
    """Resolve `sweep.storage`: a URL, or env:NAME for the URL in an environment variable, which is hidden from `ps` and sweep.json.

    Raises:
        UserError: the variable is not set, or its value is not a URL.
    """
    if storage is None or not storage.startswith("env:"):
        return storage
    name = storage.removeprefix("env:")
    if "://" not in os.environ.get(name, ""):
        state = "is not a URL" if os.environ.get(name) else "is not set"
        raise UserError(
            f"sweep.storage={show(storage)}: the environment variable {show(name)} {state}. Set it to the URL of an Optuna storage"
        )
    return os.environ[name]


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    """Open the journal in a sweep's folder, or the database at `url`, with its tables created if necessary.

    Raises:
        UserError: the database cannot be reached, its driver is not installed, or the journal is a link.
        RunError: the journal is damaged.
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
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": arguments})
    except ImportError as error:
        raise UserError(f"sweep.storage={without_password(url)} needs a package that is not installed: {_line(error, url)}") from None
    except Exception as error:
        if not _is_of_storage(error):
            raise
        raise UserError(f"sweep.storage={without_password(url)} cannot be opened: {_line(error, url)}") from None


@contextmanager
def reached(url: str | None) -> Iterator[None]:
    """Turn the errors of a storage into one line without the password.

    Raises:
        RunError: the storage cannot be reached, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's warnings about experimental features
            yield
    except (UserError, RunError):
        raise
    except Exception as error:
        if not _is_of_storage(error):
            raise
        if url is None:
            raise RunError(f"the sweep's {JOURNAL} cannot be used: {_line(error, '')}") from None
        text = f"sweep.storage={without_password(url)} cannot be reached: {_line(error, url)}. Resume with the same command"
        raise RunError(text) from None


def _is_of_storage(error: Exception) -> bool:
    """Return whether an error comes from the storage rather than from a bug."""
    if isinstance(error, OSError | json.JSONDecodeError | optuna.exceptions.StorageInternalError | optuna.exceptions.DuplicatedStudyError):
        return True
    names = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return "sqlalchemy" in names or "alembic" in names or (isinstance(error, ValueError | RuntimeError) and "log format" in str(error))


def _line(error: Exception, url: str) -> str:
    """Return the first line of an error's message, without the URL's password."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ else error
    text = first_line(cause)
    if not url:
        return text
    text = without_password(text.replace(url, without_password(url)))
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(url: str) -> set[str]:
    """Return the passwords in a URL, as written and as drivers decode them."""
    found = [*re.findall(r"://[^\s:/@]*:(.*)@", url, re.DOTALL), *re.findall(r"(?i)(?:password|passwd|pwd)=([^&]*)", url)]
    return {secret for each in found for secret in (each, unquote(each), unquote_plus(each)) if secret}
