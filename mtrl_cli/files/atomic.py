"""Files that a killed process cannot leave half-written, and files that someone else may have written.

What a run folder holds is replaced in one move, and what is read from one is only ever a regular file of a sensible size,
inside that folder: it may come from a stranger.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from mtrl_cli.errors import UserError

LARGEST_JSON = 64 * 2**20
TEMPORARY = ".writing-"


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` outlive a power cut. Does nothing where folders cannot be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse this; the file itself has been synced
    finally:
        os.close(handle)


def write_synced(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a new file and wait until the disk has it. Raises OSError, with nothing left at `path`."""
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


def replace(path: Path, chunks: bytes | Iterable[bytes]) -> None:
    """Put `chunks` at `path` in one move: whoever reads sees the old file or the new one, whole. Raises OSError."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    write_synced(temporary, [chunks] if isinstance(chunks, bytes) else chunks)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process had begun to write. Only for whoever holds the run's lock."""
    if folder.is_dir():
        for path in folder.glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, its symbolic links followed, lies in `folder`, whose own links are followed too."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False


def refuse_link(path: Path) -> None:
    """For a name that is written to, or in: raise UserError if it is there and is neither a regular file nor a folder, but a link, say."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        what = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
        raise UserError(f"{path} is {what}; nothing is written there.")


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file to read, no link and no pipe. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = open(handle, "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_bytes(path: Path, folder: Path, largest: int | None = None) -> bytes:
    """The bytes of a regular file in `folder`. Raises UserError for anything else, or for more than `largest` bytes."""
    if not is_inside(path, folder):
        raise UserError(f"{path} is a link that leaves {folder}; nothing is read through it.")
    try:
        # Not blocking: to open a named pipe would otherwise wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is not a regular file.")
            if largest is not None and status.st_size > largest:
                raise UserError(f"{path} has {status.st_size:,} bytes; at most {largest:,} are expected.")
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """The JSON object in a file of `folder`. Raises UserError, in one line, for whatever else is there."""
    return parse_json(read_bytes(path, folder, LARGEST_JSON), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that `data`, read from `path`, holds. Raises UserError for broken, absurd or other content."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be one of ours.") from None
    except ValueError:  # wrong JSON, wrong UTF-8, a number of thousands of digits
        raise UserError(f"{path} is damaged: it does not hold valid JSON.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds a {type(value).__name__} where an object was expected.")
    return value


def to_json(value: Any) -> str:
    """JSON as people read it, ending in a newline. Raises ValueError for NaN and infinities, which JSON has no word for."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
