"""Atomic writes, and reads of hostile files."""

from __future__ import annotations

import os

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic


def test_replace_is_atomic_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "x"
    atomic.replace(path, b"old")
    atomic.replace(path, iter([b"n", b"ew"]))
    assert path.read_bytes() == b"new"

    def breaks():
        yield b"half"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        atomic.replace(path, breaks())
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / f"{atomic.TEMPORARY}123-latest").write_text("half")
    (tmp_path / "latest").write_text("5")
    atomic.remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["latest"]
    atomic.remove_temporaries(tmp_path / "none")


HOSTILE = {
    "broken": b"{",
    "nested": b"[" * 200_000,
    "nested object": b'{"a":' * 200_000,
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_invalid_json_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "run.json"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as caught:
        atomic.read_json(path, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_regular_files_inside_the_folder_are_read(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside.json"
    run.mkdir()
    outside.write_text('{"secret": 1}')
    (run / "link").symlink_to(outside)
    (run / "loop").symlink_to(run / "loop")
    (run / "device").symlink_to("/dev/zero")
    (run / "folder").mkdir()
    os.mkfifo(run / "pipe")
    for name in ("link", "loop", "device", "folder", "pipe", "missing", "../outside.json"):
        with pytest.raises(UserError) as caught:
            atomic.read_json(run / name, run)
        assert "secret" not in str(caught.value)


def test_oversized_file_is_not_read(tmp_path):
    path = tmp_path / "state.json"
    with open(path, "wb") as file:
        file.truncate(atomic.MAX_JSON_BYTES + 1)
    with pytest.raises(UserError, match="at most"):
        atomic.read_json(path, tmp_path)
