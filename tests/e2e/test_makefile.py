"""The Makefile, checked without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A folder with the files that make reads, in a path with spaces."""
    folder = tmp_path / "a path with spaces"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, folder)
    return folder


def make(folder: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Run make in an empty environment."""
    command = [shutil.which("make") or "make", *arguments]
    return subprocess.run(command, cwd=folder, env={"PATH": path, "HOME": str(folder)}, capture_output=True, text=True)


def script(path: Path, text: str) -> None:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_help_is_the_default_target_and_lists_every_target(checkout: Path) -> None:
    listed = make(checkout).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (checkout / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert listed == make(checkout, "help").stdout
    for target in phony[1].split():
        assert f"make {target} " in listed


def test_installs_once_until_the_pins_change(checkout: Path) -> None:
    calls = checkout / "calls"
    script(checkout / ".venv/bin/python", f'echo "$@" >> "{calls}"')
    for name in ("mtrl", "ruff", "mypy", "lint-imports", "tensorboard"):
        script(checkout / ".venv/bin" / name, "exit 0")

    def installs() -> int:
        return calls.read_text().count("pip install")

    for target in ("test", "test", "lint", "train", "tensorboard"):
        assert make(checkout, target).returncode == 0
    assert installs() == 1
    later = (checkout / ".venv/.installed").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    make(checkout, "train")
    assert installs() == 2


def test_interrupted_installation_is_repeated(checkout: Path) -> None:
    script(checkout / ".venv/bin/python", "exit 1")
    assert make(checkout, "train").returncode != 0
    assert not (checkout / ".venv/.installed").exists()


def test_old_python_is_refused_in_one_line(checkout: Path) -> None:
    script(checkout / "old/python3", "exit 1")
    refused = make(checkout, "train", f"PYTHON={checkout / 'old/python3'}")
    assert refused.returncode != 0
    assert "Python 3.11 or newer" in refused.stderr.splitlines()[0]
    assert not (checkout / ".venv").exists()


def test_torch_index_is_passed_to_pip(checkout: Path) -> None:
    calls = checkout / "calls"
    script(checkout / ".venv/bin/python", f'echo "$@" >> "{calls}"')
    script(checkout / ".venv/bin/mtrl", "exit 0")
    make(checkout, "train", "TORCH=cpu")
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in calls.read_text()
