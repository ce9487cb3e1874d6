"""A run is a folder: making it, finding it again, its lock, and `run.json`, which tells how the run was started and ended."""

from __future__ import annotations

import importlib.metadata
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

PATIENCE_SECONDS = 3.0  # in which a first rank that was killed is gone for certain
STATUSES = ("running", "completed", "stopped", "failed")
IN_USE = "is in use by"
"""In what `RunFolder.lock` says of a run that another process has: a sweep looks for it."""

PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "hydra-core", "safetensors", "tensorboard")


class RunFolder:
    """One run's folder. `lock()` before changing anything in it; the lock goes with the process, however that ends."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.record = path / "run.json"
        self.checkpoints = path / "checkpoints"
        self.evaluations = path / "eval"
        self.videos = path / "videos"
        self._lock: FileLock | None = None
        self._made: list[Path] = []

    @classmethod
    def check_new(cls, path: Path) -> None:
        """Raise UserError unless `create(path)` would succeed. Makes nothing: for before the work of building."""
        path = Path(path).expanduser()
        if _exists(path):
            if not os.path.isdir(path):
                raise UserError(f"run_dir={path} is not a folder.")
            holds = next((entry.name for entry in _list(path) if not _is_unborn(entry)), None)
            if holds is not None:
                go_on = f", or mtrl resume {shlex.quote(str(path))}" if cls.is_run(path) else ""
                raise UserError(f"run_dir={path} is not empty (it holds {holds}): give a new or empty folder{go_on}.")
        ancestor = path
        while not _exists(ancestor):
            ancestor = ancestor.parent
        if not os.path.isdir(ancestor):
            raise UserError(f"run_dir={path} cannot be made: {ancestor} is not a folder.")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise UserError(f"run_dir={path} cannot be made: {ancestor} is not writable.")

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make and lock the folder `path`, which must be new or empty. Raises UserError, with nothing left behind."""
        cls.check_new(path)
        folder = cls(Path(path).expanduser())
        try:
            folder._make(exist_ok=True)
            folder.lock()
            cls.check_new(folder.path)  # again under the lock: another process may have been quicker
        except BaseException:
            folder.discard()
            raise
        atomic.remove_temporaries(folder.path)
        return folder

    @classmethod
    def create_default(cls, env: str, seed: int, runs: Path = Path("runs")) -> RunFolder:
        """Make and lock `runs/<env>/<time>_s<seed>`, with `_2` and so on added if another run took that name this second."""
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_s{seed}"
        parent = runs / re.sub(r"[^\w.-]+|^\.+", "_", env)
        for suffix in ["", *(f"_{number}" for number in range(2, 1000))]:
            folder = cls(parent / (name + suffix))
            if _exists(folder.path):
                continue
            cls.check_new(folder.path)
            try:
                folder._make(exist_ok=False)
                folder.lock()
            except FileExistsError:
                continue
            except BaseException:
                folder.discard()
                raise
            return folder
        raise UserError(f"{parent / name} and 998 more of that name exist; give run_dir=.")

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, int | str | None]:
        """The run at RUN or RUN/checkpoints/<step>, and which checkpoint was named: a step, "latest", "best" or None.

        Raises UserError if `path` is no run: one has a `config.yaml`. Neither locks nor changes anything.
        """
        path = Path(path).expanduser()
        which: int | str | None = None
        absolute = Path(os.path.abspath(path))
        if not _exists(path / "config.yaml") and absolute.parent.name == "checkpoints":
            if absolute.name in ("latest", "best"):
                which, path = absolute.name, absolute.parent.parent
            elif absolute.name.isdecimal() and len(absolute.name) <= 18:
                which, path = int(absolute.name), absolute.parent.parent
        if not _exists(path):
            raise UserError(f"{path} does not exist; give the folder of a run.")
        if not os.path.isdir(path):
            raise UserError(f"{path} is not the folder of a run.")
        folder = cls(path)
        if not _exists(folder.config):
            raise UserError(f"{path} is no run: it has no config.yaml. Give a folder that mtrl train made.")
        if not os.path.isfile(folder.config) or not atomic.is_inside(folder.config, path):
            raise UserError(f"{path} is no run: its config.yaml is not a file of its own.")
        return folder, which

    @classmethod
    def is_run(cls, path: Path) -> bool:
        """Whether there is something at `path` to resume: what `--or-resume` asks."""
        return _exists(Path(path).expanduser() / "config.yaml")

    def _make(self, *, exist_ok: bool) -> None:
        """Make the folder and the missing ones above it, remembering them for `discard`."""
        missing = [self.path, *self.path.parents]
        missing = [path for path in missing if not _exists(path)]
        try:
            for path in reversed(missing):
                path.mkdir(exist_ok=exist_ok or path != self.path)
                self._made.append(path)
        except FileExistsError:
            raise
        except OSError as error:
            self.discard()
            raise UserError(f"run_dir={self.path} cannot be made: {error.strerror}.") from None

    def discard(self) -> None:
        """Remove what `create` made, as far as it is still empty: for a run that turned out wrong before it began."""
        self.unlock()
        if self._made and os.path.isdir(self.path) and all(_is_unborn(entry) for entry in self.path.iterdir()):
            for entry in self.path.iterdir():
                entry.unlink()
        try:
            for path in reversed(self._made):
                path.rmdir()
        except OSError:
            pass  # something is in it by now
        self._made.clear()

    def lock(self) -> None:
        """Lock the run for this process. Raises UserError if the run cannot be locked, naming the process that holds it."""
        lock = FileLock(self.path / ".lock")
        try:
            if not lock.try_acquire():
                raise UserError(f"{self.path} {IN_USE} {lock.owner()}: wait for it to end, or stop it.")
        except RunError as error:
            raise UserError(f"{self.path} cannot be locked: {error}") from None
        self._lock = lock

    def unlock(self) -> None:
        """Unlock the run. Does nothing if this process does not hold it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def write(self, name: str, text: str) -> None:
        """Put a text file at `name` in the run, in one move. Raises OSError, and UserError if a link leads out of the run."""
        path = self.path / name
        if not atomic.is_inside(path.parent, self.path):
            raise UserError(f"{path.parent} is a link that leaves the run; nothing is written through it.")
        path.parent.mkdir(exist_ok=True)
        atomic.replace(path, text.encode())

    def read_record(self) -> dict[str, Any]:
        """What run.json holds; {} if the run was killed before it was written. Raises UserError if it is damaged."""
        if not _exists(self.record):
            return {}
        record = atomic.read_json(self.record, self.path)
        if record.get("status") not in STATUSES:
            raise UserError(f"{self.record} is damaged: its status is none of {', '.join(STATUSES)}.")
        return record

    def begin(self, *, command: Sequence[str], device: str) -> None:
        """Write that the run is running. A resume keeps how it first began and adds itself to `resumed`. Raises UserError, OSError.

        A status of "running" found here is left from a process that was killed: whoever holds the lock is the only one.
        """
        record = self.read_record()
        now, line = _now(), shlex.join(command)
        if record:
            resumed = record.get("resumed")
            record["resumed"] = [*(resumed if isinstance(resumed, list) else []), {"command": line, "started": now}]
        else:
            record = {"command": line, "started": now, "seconds": 0.0}
        record |= {"versions": versions(), "git": git_revision(), "device": device}
        record |= {"ended": None, "status": "running", "error": None, "stopped_early": None}
        self._write_record(record)

    def finish(self, status: str, *, seconds: float, error: str | None = None, early: dict[str, Any] | None = None) -> None:
        """Write how the run ended (completed, stopped or failed), after `seconds` of work over all resumes. Raises OSError.

        `early`: why and at which step, where it completed before its budget was used up.
        """
        assert status in STATUSES, status
        if not _exists(self.config):
            return  # the folder was removed: half a run must not come back
        ended = {"ended": _now(), "status": status, "seconds": round(seconds, 3), "error": error, "stopped_early": early}
        self._write_record(self.read_record() | ended)

    def mark_failed(self, *, seconds: float, error: str) -> bool:
        """Write that the run failed; returns whether it was for us to write. Raises OSError, UserError."""
        self.finish("failed", seconds=seconds, error=error)
        return True

    def _write_record(self, record: dict[str, Any]) -> None:
        order = ("command", "started", "ended", "status", "seconds", "error", "stopped_early", "device", "versions", "git", "resumed")
        ordered = {key: record[key] for key in order if key in record} | record
        self.write("run.json", atomic.to_json(ordered))


class FolderOfTheFirst(RunFolder):
    """A run's folder to the ranks after the first: the first rank writes in it, and holds its lock."""

    def lock(self) -> None:
        pass

    def write(self, name: str, text: str) -> None:
        pass

    def begin(self, *, command: Sequence[str], device: str) -> None:
        pass

    def finish(self, status: str, *, seconds: float, error: str | None = None, early: dict[str, Any] | None = None) -> None:
        pass

    def mark_failed(self, *, seconds: float, error: str) -> bool:
        """Write that the run failed, if the first rank is gone and could not."""
        folder, until = RunFolder(self.path), time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                folder.lock()
                break
            except UserError:
                if time.monotonic() > until:
                    return False  # it lives, or somebody goes on with the run already
                time.sleep(0.05)
        with folder:
            if folder.read_record().get("status") != "running":
                return False
            folder.finish("failed", seconds=seconds, error=error)
            return True


def versions() -> dict[str, str]:
    """The versions of mtrl, Python and the packages that decide what a run computes; those not installed are left out."""
    found = {"mtrl_cli": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(package: Path = Path(__file__).parents[1]) -> dict[str, Any] | None:
    """{"revision", "changed"} of the checkout that mtrl runs from; None if it was installed elsewhere or git is missing."""
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


def _exists(path: Path) -> bool:
    """Whether anything has that name, a dangling link included."""
    return os.path.lexists(path)


def _list(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"run_dir={path} cannot be read: {error.strerror}.") from None


def _is_unborn(entry: Path) -> bool:
    """Whether `entry` is all that a process killed in its first moments leaves: its lock, and files it had begun to write."""
    return entry.name == ".lock" or entry.name.startswith(atomic.TEMPORARY)
