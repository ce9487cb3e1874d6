"""File locks: one holder at a time, no leaks into children, and refusal of files that are not locks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mtrl_cli.errors import RunError
from mtrl_cli.files import file_lock
from mtrl_cli.files.file_lock import FileLock


def test_second_holder_is_refused_and_can_name_the_first(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.try_acquire()
    assert not second.try_acquire()
    assert second.owner().startswith(f"process {os.getpid()} on ")
    first.release()
    assert second.try_acquire()
    second.release()


@pytest.mark.parametrize("content", ["", "1 host\n", "nonsense \x1b[31m\n", "x" * 1000])
def test_stale_content_is_harmless(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(content)
    assert FileLock(tmp_path / "lock").owner() in ("another process", "process 1 on host")
    assert file_lock.is_free(tmp_path / "lock")


def test_is_free_creates_no_file(tmp_path: Path) -> None:
    assert file_lock.is_free(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_forked_child_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    assert not file_lock.is_free(tmp_path / "lock")
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        lock.release()
        assert file_lock.is_free(tmp_path / "lock")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_link_and_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(RunError, match=name):
            FileLock(tmp_path / name).try_acquire()
    assert not (tmp_path / "victim").exists()
