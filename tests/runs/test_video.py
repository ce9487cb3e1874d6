"""Videos are readable, complete and atomic."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras
from mtrl_cli.runs.video import write_mp4


def brightening(count: int, height: int = 33, width: int = 47) -> Iterator[np.ndarray]:
    for index in range(count):
        yield np.full((height, width, 3), 20 * index, np.uint8)


def test_video_is_h264_in_yuv420p_with_even_sides_and_every_frame(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="an extra")
    path = tmp_path / "pong.mp4"
    write_mp4(path, brightening(12), fps=15)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == (34, 48)
        assert stream.average_rate == 15
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 12
    brightness = [frame.mean() for frame in frames]
    np.testing.assert_allclose(brightness, 20 * np.arange(12), atol=4)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must be before the frames"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_existing_video_and_leaves_no_other_file(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="an extra")
    path = tmp_path / "pong.mp4"
    path.write_bytes(b"older")

    def failing() -> Iterator[np.ndarray]:
        yield from brightening(3)
        raise RuntimeError("the emulator failed")

    with pytest.raises(RuntimeError, match="the emulator failed"):
        write_mp4(path, failing(), fps=15)
    with pytest.raises(ValueError, match="no frames"):
        write_mp4(path, [], fps=15)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_pyav_is_refused_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=re.escape(extras.install_command("video"))):
        write_mp4(tmp_path / "pong.mp4", brightening(2), fps=15)
    assert not list(tmp_path.iterdir())
