"""Videos that browsers play: MP4 with H.264 in yuv420p, written by PyAV, an optional dependency."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mtrl_cli.files import atomic
from mtrl_cli.machine import extras


def require() -> None:
    """Raise UserError unless PyAV is installed."""
    extras.require("video=true", "av", "video")


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write frames of equal size, RGB uint8 `[H, W, 3]`, as a video. The file appears atomically.

    An odd height or width is padded by one row or column, because yuv420p halves both.

    Raises:
        UserError: PyAV is not installed.
        ValueError: `frames` is empty.
        OSError: the file cannot be written.
    """
    require()
    import av

    count = 0
    # faststart puts the index first, so that a browser can play before the whole file is loaded.
    options = {"movflags": "faststart"}
    with atomic.replacing(path) as temporary, av.open(temporary, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        for count, frame in enumerate(frames, start=1):
            even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if count == 1:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))
        if count == 0:
            raise ValueError(f"{path}: there are no frames to write")
        container.mux(stream.encode())
