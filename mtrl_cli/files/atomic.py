"""Write files atomically, and read files that may come from an untrusted source.

A file of a run folder is written under a temporary name and renamed, so that a killed process leaves no incomplete file. Only regular
files inside the folder are read, and JSON files only up to a maximum size.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from mtrl_cli.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_JSON_BYTES = 64 * 2**20
TEMPORARY = ".writing-"
Model = TypeVar("Model", bound="BaseModel")


def sync_folder(folder: Path) -> None:
    """Sync the names in `folder` to disk, if the file system supports this."""
    with suppress(OSError):  # some network file systems refuse; the files have been synced
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_synced(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a new file and sync it to disk. Raises OSError and removes the incomplete file on failure."""
    try:
        with open(path, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        if not isinstance(error, FileExistsError):
            path.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the new content of `path`, and rename it to `path` at the end, or remove it after an exception."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace(path: Path, chunks: bytes | Iterable[bytes]) -> None:
    """Replace `path` atomically: a reader reads either the old file or the complete new file. Raises OSError."""
    with replacing(path) as temporary:
        write_synced(temporary, [chunks] if isinstance(chunks, bytes) else chunks)


def remove_temporaries(folder: Path) -> None:
    """Remove the incomplete files of killed processes. The caller must hold the run's lock."""
    if folder.is_dir():
        for path in folder.glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether `path` lies in `folder` after resolving the symbolic links of both."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False


def refuse_link(path: Path) -> None:
    """Raise UserError if `path` exists and is neither a regular file nor a folder. Call this before writing to `path` or into it."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a special file"
        raise UserError(f"{path} must be a regular file or a folder, got {kind}. Remove {path}")


def open_regular(path: Path, *, follow_links: bool = False) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for anything else, such as a pipe, and for a link unless `follow_links`."""
    # Opening a named pipe without O_NONBLOCK would wait for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    file = open(os.open(path, flags), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_bytes(path: Path, folder: Path, max_bytes: int | None = None) -> bytes:
    """Read a regular file inside `folder`. Raises UserError for anything else, and if the file is larger than `max_bytes`."""
    if not is_inside(path, folder):
        raise UserError(f"{path} must be a file inside {folder}, got a link out of the folder")
    try:
        with open_regular(path, follow_links=True) as file:
            size = os.fstat(file.fileno()).st_size
            if max_bytes is not None and size > max_bytes:
                raise UserError(f"{path} must have at most {max_bytes:,} bytes, got {size:,}")
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """Read a JSON object from a file inside `folder`. Raises UserError if the file is missing or contains anything else."""
    return parse_json(read_bytes(path, folder, MAX_JSON_BYTES), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse the JSON object that was read from `path`. Raises UserError if `data` is anything else."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise UserError(f"{path} is damaged: its JSON is nested too deeply") from None
    except ValueError:  # also invalid UTF-8, and integers of thousands of digits
        raise UserError(f"{path} is damaged: invalid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, got a {type(value).__name__}")
    return value


def read_model(model: type[Model], path: Path, folder: Path) -> Model:
    """Read a JSON file inside `folder` into a pydantic model. Raises UserError if the file is missing or does not fit the model."""
    data = read_bytes(path, folder, MAX_JSON_BYTES)
    return validated(lambda: model.model_validate_json(data), path)


def validated(validate: Callable[[], Model], path: Path) -> Model:
    """Return the result of validating what was read from `path`. Raises UserError with the first error of pydantic."""
    from pydantic import ValidationError

    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {f'{key[:80]}: ' if key else ''}{first['msg'][:200]}") from None


def to_json(value: Any) -> str:
    """Return indented JSON with a final newline. Raises ValueError for NaN and infinities."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
