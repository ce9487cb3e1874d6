"""The folder of a run: creation, lookup, lock, and `run.json`, the record of commands, versions and status.

Paths are tested with `os.path.lexists`: a dangling link exists, too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtrl_cli import __version__
from mtrl_cli.errors import RunError, UserError
from mtrl_cli.files import atomic
from mtrl_cli.files.file_lock import FileLock

LOCK_TIMEOUT_SECONDS = 3.0  # a killed first rank has released its lock by then
STATUSES = ("running", "completed", "stopped", "failed")
IN_USE = "is in use by"
"""Part of the error of `RunFolder.lock` if another process holds the lock. A sweep searches for it in a worker's output."""

PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "hydra-core", "safetensors", "tensorboard")


class RunFolder:
    """The folder of a run. Call `lock` before changing anything in the folder. The system releases the lock when the process ends."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.record = path / "run.json"
        self.checkpoints = path / "checkpoints"
        self.evaluations = path / "eval"
        self.videos = path / "videos"
        self._lock: FileLock | None = None

    @classmethod
    def check_new(cls, path: Path) -> None:
        """Raise UserError unless `create(path)` would succeed. Creates nothing."""
        path = Path(path).expanduser()
        if os.path.lexists(path):
            if not os.path.isdir(path):
                raise UserError(f"run_dir={path} is not a folder")
            try:
                found = [entry.name for entry in sorted(path.iterdir()) if not _is_leftover(entry)]
            except OSError as error:
                raise UserError(f"run_dir={path} cannot be read: {error.strerror}") from None
            if found:
                resume = f", or mtrl resume {shlex.quote(str(path))}" if cls.is_run(path) else ""
                raise UserError(f"run_dir={path} is not empty (it contains {found[0]}). Use a new or empty folder{resume}")
        ancestor = next(each for each in (path, *path.parents) if os.path.lexists(each))
        if not os.path.isdir(ancestor):
            raise UserError(f"run_dir={path} cannot be created: {ancestor} is not a folder")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise UserError(f"run_dir={path} cannot be created: {ancestor} is not writable")

    @classmethod
    def create(cls, path: Path, *, exist_ok: bool = True) -> RunFolder:
        """Create and lock the folder `path`, which must be new or empty.

        Raises:
            UserError: the folder cannot be created. No other folder is left behind.
            FileExistsError: the folder exists and `exist_ok` is false.
        """
        cls.check_new(path)
        folder = cls(Path(path).expanduser())
        missing = [each for each in (folder.path, *folder.path.parents) if not os.path.lexists(each)]
        with contextlib.ExitStack() as undo:
            for each in reversed(missing):
                try:
                    each.mkdir(exist_ok=exist_ok or each != folder.path)
                except FileExistsError:
                    raise
                except OSError as error:
                    raise UserError(f"run_dir={folder.path} cannot be created: {error.strerror}") from None
                undo.callback(_remove_unused, each)
            folder.lock()
            undo.callback(folder.unlock)
            cls.check_new(folder.path)  # again under the lock: another process may have used the folder first
            undo.pop_all()
        atomic.remove_temporaries(folder.path)
        return folder

    @classmethod
    def create_default(cls, env: str, seed: int, runs: Path = Path("runs")) -> RunFolder:
        """Create and lock `runs/<env>/<time>_s<seed>`, with a suffix (`_2`, `_3`, …) if another run started in the same second."""
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_s{seed}"
        parent = runs / re.sub(r"[^\w.-]+|^\.+", "_", env)
        for suffix in ["", *(f"_{number}" for number in range(2, 1000))]:
            path = parent / (name + suffix)
            if not os.path.lexists(path):
                with contextlib.suppress(FileExistsError):
                    return cls.create(path, exist_ok=False)
        raise UserError(f"{parent / name} and 998 numbered alternatives exist. Use run_dir=PATH")

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, int | str | None]:
        """Open the run at RUN or RUN/checkpoints/<step>. Locks and changes nothing.

        Returns:
            the folder, and the checkpoint in the path: a step, "latest", "best" or None.

        Raises:
            UserError: the path is not a run (a folder with a `config.yaml`).
        """
        path = Path(path).expanduser()
        which: int | str | None = None
        absolute = Path(os.path.abspath(path))
        if not os.path.lexists(path / "config.yaml") and absolute.parent.name == "checkpoints":
            if absolute.name in ("latest", "best"):
                which, path = absolute.name, absolute.parent.parent
            elif absolute.name.isdecimal() and len(absolute.name) <= 18:
                which, path = int(absolute.name), absolute.parent.parent
        if not os.path.isdir(path):
            problem = "is not a folder" if os.path.lexists(path) else "does not exist"
            raise UserError(f"{path} {problem}. Expected the folder of a run")
        folder = cls(path)
        if not os.path.lexists(folder.config):
            raise UserError(f"{path} is not a run: config.yaml is missing")
        if not os.path.isfile(folder.config) or not atomic.is_inside(folder.config, path):
            raise UserError(f"{path} is not a run: its config.yaml is not a regular file in the folder")
        return folder, which

    @classmethod
    def is_run(cls, path: Path) -> bool:
        """Return whether `path` contains a run that `--or-resume` would resume."""
        return os.path.lexists(Path(path).expanduser() / "config.yaml")

    def lock(self) -> None:
        """Lock the run for this process. Raises UserError if the run cannot be locked, with the process that holds the lock."""
        lock = FileLock(self.path / ".lock")
        try:
            if not lock.try_acquire():
                raise UserError(f"{self.path} {IN_USE} {lock.owner()}. Wait until the process ends, or stop the process")
        except RunError as error:
            raise UserError(f"{self.path} cannot be locked: {error}") from None
        self._lock = lock

    def unlock(self) -> None:
        """Release the lock. Does nothing if this process does not hold the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def write(self, name: str, text: str) -> None:
        """Write a text file at `name` in the run atomically. Raises OSError, and UserError if the path leads out of the run."""
        path = self.path / name
        if not atomic.is_inside(path.parent, self.path):
            raise UserError(f"{path.parent} is a link out of the run folder. Remove the link")
        path.parent.mkdir(exist_ok=True)
        atomic.replace(path, text.encode())

    def read_record(self) -> dict[str, Any]:
        """Return the contents of run.json; {} if the run was killed before it was written. Raises UserError if it is damaged."""
        if not os.path.lexists(self.record):
            return {}
        record = atomic.read_json(self.record, self.path)
        if record.get("status") not in STATUSES:
            raise UserError(f"{self.record} is damaged: status must be one of {', '.join(STATUSES)}")
        return record

    def begin(self, *, command: Sequence[str], device: str) -> None:
        """Set the status to running. A resume keeps the first command and start time, and appends its own to `resumed`.

        The status may be "running" already. Then a process was killed, because this process holds the lock.

        Raises:
            UserError: run.json is damaged.
            OSError: run.json cannot be written.
        """
        record = self.read_record()
        now, line = _now(), shlex.join(command)
        if record:
            resumed = record.get("resumed")
            record["resumed"] = [*(resumed if isinstance(resumed, list) else []), {"command": line, "started": now}]
        else:
            record = {"command": line, "started": now}
        record |= {"ended": None, "status": "running", "seconds": record.get("seconds", 0.0), "error": None, "stopped_early": None}
        record |= {"device": device, "versions": versions(), "git": git_revision()}
        self.write("run.json", atomic.to_json(record))

    def finish(self, status: str, *, seconds: float, error: str | None = None, early: dict[str, Any] | None = None) -> None:
        """Set the final status. Raises OSError.

        Args:
            status: completed, stopped or failed.
            seconds: total run time over all resumes.
            early: reason and step, if early stopping completed the run before its budget was used.
        """
        assert status in STATUSES, status
        if not os.path.lexists(self.config):
            return  # the folder was deleted; do not recreate a part of it
        ended = {"ended": _now(), "status": status, "seconds": round(seconds, 3), "error": error, "stopped_early": early}
        self.write("run.json", atomic.to_json(self.read_record() | ended))

    def mark_failed(self, *, seconds: float, error: str) -> bool:
        """Set the status to failed. Returns whether this process wrote it. Raises OSError, UserError."""
        self.finish("failed", seconds=seconds, error=error)
        return True


class ReadOnlyRunFolder(RunFolder):
    """The run folder on all ranks except the first. Only the first rank locks and writes: most methods here do nothing."""

    def lock(self) -> None:
        pass

    def write(self, name: str, text: str) -> None:
        pass

    def begin(self, *, command: Sequence[str], device: str) -> None:
        pass

    def finish(self, status: str, *, seconds: float, error: str | None = None, early: dict[str, Any] | None = None) -> None:
        pass

    def mark_failed(self, *, seconds: float, error: str) -> bool:
        """Set the status to failed if the first rank died before it wrote the status."""
        folder, until = RunFolder(self.path), time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                folder.lock()
                break
            except UserError:
                if time.monotonic() > until:
                    return False  # the first rank is alive, or another process resumed the run
                time.sleep(0.05)
        with folder:
            if folder.read_record().get("status") != "running":
                return False
            folder.finish("failed", seconds=seconds, error=error)
            return True


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl; None if it is invalid or incomplete."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of mtrl, Python and the installed packages; by default the packages that affect the result of a run."""
    found = {"mtrl_cli": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_revision(package: Path = Path(__file__).parents[1]) -> dict[str, Any] | None:
    """Return {"revision", "changed"} of the checkout that mtrl runs from; None without a checkout or git."""
    checkout = package.parent
    if not (checkout / ".git").exists():
        return None
    try:
        revision = _git(checkout, "rev-parse", "HEAD").strip()
        return {"revision": revision, "changed": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _remove_unused(folder: Path) -> None:
    """Remove a folder that contains nothing or only leftovers."""
    with contextlib.suppress(OSError):
        entries = list(folder.iterdir())
        if all(map(_is_leftover, entries)):
            for entry in entries:
                entry.unlink()
            folder.rmdir()


def _is_leftover(entry: Path) -> bool:
    """Return whether `entry` may be left by a process that was killed at its start: the lock, or an incomplete file."""
    return entry.name == ".lock" or entry.name.startswith(atomic.TEMPORARY)
