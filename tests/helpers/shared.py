"""Results shared by several tests, created once per test session by the first pytest-xdist process that needs them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.helpers.command import MtrlHere


class Trained(NamedTuple):
    """A finished run."""

    path: Path
    """Folder of the run. Tests must copy it before changing it."""
    printed: str
    """Standard output of the run."""


class Shared:
    """Folders shared by all processes of a test session.

    Args:
        root: folder of the session.
    """

    def __init__(self, root: Path):
        self.root = root

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Allow one process of the session at a time in this block."""
        self.root.mkdir(exist_ok=True)
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder of this name; the first caller fills it with `make(folder)` while the others wait."""
        folder, done = self.root / name, self.root / f"{name}.done"
        with self.lock(name):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    def run(self, *words: str) -> Trained:
        """Train with these overrides, once."""

        def train(folder: Path) -> None:
            (folder / "printed").write_text(MtrlHere(folder)("train", *words, "run_dir=run").stdout)

        folder = self.folder("run-" + hashlib.sha256("\0".join(words).encode()).hexdigest()[:12], train)
        return Trained(folder / "run", (folder / "printed").read_text())


def session_root(basetemp: Path) -> Path:
    """The folder for `Shared`, below pytest's base folder, which has a subfolder per process of pytest-xdist."""
    return (basetemp.parent if "PYTEST_XDIST_WORKER" in os.environ else basetemp) / "shared"
