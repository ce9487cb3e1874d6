"""Metrics of a run: one JSON object per line in `metrics.jsonl`, and the same metrics in TensorBoard files.

The event files are written by `EventWriter`, not by torch's SummaryWriter, for these reasons:

- `SummaryWriter(purge_step=)` leaves events past the checkpoint in the file. TensorBoard's data server still shows such an event if its
  metric has no newer value, and TensorBoard's Python backend shows each such step twice.
- SummaryWriter writes in a background thread. A full disk causes a traceback there, and nothing is synced to disk before a checkpoint.
- `add_hparams` writes a second run in a subfolder, and stores true and false as numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import ArrayLike, NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.files import atomic
from mtrl_cli.metric_names import FINAL, TEST
from mtrl_cli.runs.run_dir import parse_row

FLUSH_SECONDS = 20.0
LARGEST_RECORD = 256 * 2**20
HPARAMS = "_hparams_/"
_numbers = itertools.count()


class NullLogger:
    """A logger that writes nothing, for all ranks except the first."""

    def row(self, step: int, frames: int, seconds: float, updates: int, metrics: Mapping[str, float]) -> None:
        """Write one row of metrics."""

    def histogram(self, name: str, values: ArrayLike, step: int) -> None:
        """Write the distribution of `values`, of any shape."""

    def image(self, name: str, hwc: NDArray[np.uint8], step: int) -> None:
        """Write an image: uint8 `[H, W, C]` with 1, 3 or 4 channels."""

    def hyperparameters(self, config: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        """Write the flat configuration with the final scores."""

    def flush(self) -> None:
        """Sync everything to disk."""

    def close(self) -> None:
        """Flush and close the files."""


class Logger(NullLogger):
    """The metrics of one run.

    Args:
        run: the run folder.
        resume_at: step of the checkpoint that the run resumes from; later rows and events are cut. None for a new run: files of an earlier
            attempt are removed.

    Raises:
        UserError: `tensorboard/` is a link out of the run folder.
        RunError: the disk is full or fails.
    """

    def __init__(self, run: Path, resume_at: int | None = None):
        self.path = run / "metrics.jsonl"
        events = run / "tensorboard"
        if not atomic.is_inside(events, run):
            raise UserError(f"{events} is a link out of the run folder. Remove the link")
        with self._disk_errors():
            cut_metrics(self.path, resume_at)
            cut_events(events, resume_at)
            self._rows = open(self.path, "a", encoding="utf-8", buffering=2**16)  # noqa: SIM115
            self._events = EventWriter(events, after=resume_at)
        self._flushed = time.monotonic()

    def row(self, step: int, frames: int, seconds: float, updates: int, metrics: Mapping[str, float]) -> None:
        """Write one row of metrics. A non-finite value becomes null in metrics.jsonl, because JSON has no NaN."""
        numbers = {name: float(value) for name, value in metrics.items()}
        line: dict[str, Any] = {"step": int(step), "frames": int(frames), "seconds": round(float(seconds), 3), "updates": int(updates)}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self._disk_errors():
            self._rows.write(json.dumps(line, allow_nan=False) + "\n")
            self._events.scalars(numbers, step)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._rows.flush()
                self._events.flush()
                self._flushed = time.monotonic()

    def histogram(self, name: str, values: ArrayLike, step: int) -> None:
        """Write the distribution of the finite values, of any shape."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if flat.size:
            with self._disk_errors():
                self._events.write(summary.histogram(name, flat, bins=min(64, max(8, flat.size // 8))).value, step)

    def image(self, name: str, hwc: NDArray[np.uint8], step: int) -> None:
        """Write an image: uint8 `[H, W, C]` with 1, 3 or 4 channels."""
        with self._disk_errors():
            self._events.write(summary.image(name, hwc, dataformats="HWC").value, step)

    def hyperparameters(self, config: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        """Write the flat configuration and the final scores for TensorBoard's HParams tab. The scores become `final/<name>`."""
        scores = {FINAL + name: float(value) for name, value in scores.items()}
        with self._disk_errors():
            for value in _hparams_values(config, list(scores)):
                self._events.write([value], step)
            self._events.scalars(scores, step)

    def flush(self) -> None:
        """Sync everything to disk. Call this before saving a checkpoint: a resumed run does not write earlier rows again."""
        with self._disk_errors():
            self._rows.flush()
            os.fsync(self._rows.fileno())
            self._events.flush(sync=True)

    def close(self) -> None:
        """Flush and close the files. May be called twice."""
        if self._rows.closed:
            return
        try:
            self.flush()
        finally:
            for file in (self._rows, self._events):
                with contextlib.suppress(OSError):  # `flush` has raised the error
                    file.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn an OSError into a RunError of one line."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunError(f"{self.path.parent}: {reason[:1].lower()}{reason[1:]} while writing metrics.jsonl and tensorboard/") from None


class EventWriter:
    """The writer of one new TensorBoard event file.

    Args:
        folder: the folder of event files.
        after: a running TensorBoard discards the events after this step that it has read before; None discards none.
    """

    def __init__(self, folder: Path, after: int | None = None):
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}.{next(_numbers):06d}"
        self._file: BinaryIO = open(folder / name, "xb", buffering=2**16)  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if after is not None:
            restart = SessionLog(status=SessionLog.START)
            self._records.write(Event(wall_time=time.time(), step=after + 1, session_log=restart).SerializeToString())
        self._file.flush()

    def write(self, values: Iterable[Any], step: int) -> None:
        """Write one event with `Summary.Value`s."""
        event = Event(wall_time=time.time(), step=int(step), summary=Summary(value=values))
        self._records.write(event.SerializeToString())

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one event with numbers by name."""
        if metrics:
            self.write([Summary.Value(tag=name, simple_value=_as_float32(value)) for name, value in metrics.items()], step)

    def flush(self, sync: bool = False) -> None:
        """Flush the file, and sync it to disk if `sync`."""
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _as_float32(value: float) -> float:
    """Convert to float32, the type of TensorBoard's scalars. Larger finite numbers become infinite, because protobuf refuses them."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _hparams_values(config: Mapping[str, Any], metrics: list[str]) -> Iterator[Any]:
    """Yield the two values that declare the hyperparameters of the run and its metrics."""
    plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in config.items()}
    declared = [summary_v2.HParam(name) for name in plain], [summary_v2.Metric(name) for name in metrics]
    for made in (summary_v2.hparams_config_pb(*declared), summary_v2.hparams_pb(plain)):
        for value in made.value:
            yield Summary.Value.FromString(value.SerializeToString())


def cut_metrics(path: Path, resume_at: int | None) -> None:
    """Keep the rows with step <= `resume_at`; None keeps no rows. Raises OSError.

    Invalid rows, such as a half-written last line, are removed. So are rows of a test, because the resumed run tests again.
    """
    if not os.path.lexists(path):
        return
    if resume_at is None or not path.is_file():
        path.unlink()
        return
    with open(path, "rb") as file:
        atomic.replace(path, (line for line in file if _row_step(line) <= resume_at))


def _row_step(line: bytes) -> float:
    """Return the step of a line of metrics.jsonl; infinity for an invalid row and for a row of a test."""
    row = parse_row(line) if line.endswith(b"\n") else None
    return math.inf if row is None or any(name.startswith(TEST) for name in row) else row["step"]


def cut_events(folder: Path, resume_at: int | None) -> None:
    """Keep the events with step <= `resume_at` in every event file of `folder`; None keeps no files. Raises OSError.

    Hyperparameters, final scores and metrics of a test are removed, because the resumed run writes them again.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.glob("*tfevents*")):
        if resume_at is None or not path.is_file() or not atomic.is_inside(path, folder):
            path.unlink()
            continue
        with open(path, "rb") as file:
            atomic.replace(path, (record for record in _records(file) if _is_kept(record, resume_at)))


def _records(file: BinaryIO) -> Iterator[bytes]:
    """Yield the complete records of an event file: length, checksum of the length, event, checksum of the event."""
    while len(header := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", header[:8])
        body = file.read(length + 4) if length <= LARGEST_RECORD else b""
        if len(body) != length + 4:
            return  # half-written, or not an event file: TensorBoard stops here, too
        yield header + body


def _is_kept(record: bytes, resume_at: int) -> bool:
    try:
        event = Event.FromString(record[12:-4])
    except DecodeError:
        return False
    tags = [value.tag for value in event.summary.value]
    return event.step <= resume_at and not any(tag.startswith((HPARAMS, FINAL, TEST)) for tag in tags)
