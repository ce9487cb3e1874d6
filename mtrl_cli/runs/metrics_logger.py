"""A run's metrics: one JSON object a line in `metrics.jsonl`, and the same to TensorBoard.

TensorBoard's files are written with its own record writer, in this thread and without torch: what was flushed is on disk, and
cutting back to a checkpoint is a matter of copying records.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import platform
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.files import atomic

FLUSH_SECONDS = 20.0
LARGEST_RECORD = 256 * 2**20
HPARAMS = "_hparams_/"
FINAL = "final/"
TEST = "test/"
_numbers = itertools.count()


class NullLogger:
    """Writes nothing: for evaluation alone, tests, and all but one of several processes."""

    def row(self, step: int, frames: int, seconds: float, updates: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics."""

    def histogram(self, name: str, values: ArrayLike, step: int) -> None:
        """The distribution of `values`, of any shape."""

    def image(self, name: str, hwc: NDArray[np.uint8], step: int) -> None:
        """A picture: uint8 [H, W, 1, 3 or 4]."""

    def hyperparameters(self, config: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        """The run's flat configuration beside its final scores."""

    def flush(self) -> None:
        """Wait until the disk has everything."""

    def close(self) -> None:
        """Flush, and write no more."""


class Logger(NullLogger):
    """The metrics of one run.

    Args:
        run: its folder.
        resume_at: the step of the checkpoint that the run goes on from: later rows and events are cut. None: the run begins, and whatever
            an earlier attempt left is removed.

    Raises UserError if `tensorboard/` is a link out of the run, RunError if the disk is full or fails.
    """

    def __init__(self, run: Path, resume_at: int | None = None):
        self.path = run / "metrics.jsonl"
        events = run / "tensorboard"
        if not atomic.is_inside(events, run):
            raise UserError(f"{events} is a link that leaves the run; nothing is written through it.")
        try:
            cut_metrics(self.path, resume_at)
            cut_events(events, resume_at)
            self._rows = open(self.path, "a", encoding="utf-8", buffering=2**16)  # noqa: SIM115
            self._events = EventWriter(events, after=resume_at)
        except OSError as error:
            raise self._failed(error) from None
        self._flushed = time.monotonic()

    def row(self, step: int, frames: int, seconds: float, updates: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics. A metric that is not finite is null in the file: JSON has no word for it."""
        numbers = {name: float(value) for name, value in metrics.items()}
        line: dict[str, Any] = {"step": int(step), "frames": int(frames), "seconds": round(float(seconds), 3), "updates": int(updates)}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            self._rows.write(json.dumps(line, allow_nan=False) + "\n")
            self._events.scalars(numbers, step)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._rows.flush()
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise self._failed(error) from None

    def histogram(self, name: str, values: ArrayLike, step: int) -> None:
        """The distribution of the finite ones among `values`, of any shape."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if flat.size:
            self._write_event(_histogram_value(name, flat), step)

    def image(self, name: str, hwc: NDArray[np.uint8], step: int) -> None:
        """A picture: uint8 [H, W, 1, 3 or 4]. Raises ValueError for other arrays."""
        self._write_event(_image_value(name, hwc), step)

    def hyperparameters(self, config: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        """The run's flat configuration beside its final scores, in TensorBoard's HParams tab. The scores become `final/<name>`."""
        scores = {FINAL + name: float(value) for name, value in scores.items()}
        try:
            for value in _hparams_values(config, list(scores)):
                self._events.write([value], step)
            self._events.scalars(scores, step)
        except OSError as error:
            raise self._failed(error) from None

    def _write_event(self, value: Any, step: int) -> None:
        try:
            self._events.write([value], step)
        except OSError as error:
            raise self._failed(error) from None

    def flush(self) -> None:
        """Wait until the disk has everything: before a checkpoint is saved, as nothing before it is written again on resume."""
        try:
            self._rows.flush()
            os.fsync(self._rows.fileno())
            self._events.flush(sync=True)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Flush, and write no more. May be called twice."""
        if self._rows.closed:
            return
        try:
            self.flush()
        finally:
            for file in (self._rows, self._events):
                with contextlib.suppress(OSError):  # the flush has told already
                    file.close()

    def _failed(self, error: OSError) -> RunError:
        trouble = error.strerror or str(error)
        return RunError(f"{self.path.parent}: {trouble[:1].lower()}{trouble[1:]} while writing metrics.jsonl and tensorboard/.")


class EventWriter:
    """One new event file in `folder`. `after`: tells a TensorBoard that is watching to forget what it saw past that step."""

    def __init__(self, folder: Path, after: int | None = None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}.{next(_numbers):06d}"
        self._file: BinaryIO = open(folder / name, "xb", buffering=2**16)  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._event = Event
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if after is not None:
            restart = SessionLog(status=SessionLog.START)
            self._records.write(Event(wall_time=time.time(), step=after + 1, session_log=restart).SerializeToString())
        self._file.flush()

    def write(self, values: list[Any], step: int) -> None:
        """One event of some `Summary.Value`s."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        event = self._event(wall_time=time.time(), step=int(step), summary=Summary(value=values))
        self._records.write(event.SerializeToString())

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """One event of numbers by name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if metrics:
            self.write([Summary.Value(tag=name, simple_value=_as_float32(value)) for name, value in metrics.items()], step)

    def flush(self, sync: bool = False) -> None:
        """Hand everything to the system, and with `sync` wait until the disk has it."""
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _as_float32(value: float) -> float:
    """TensorBoard's scalars are float32, whose writer refuses larger finite numbers."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _histogram_value(name: str, flat: NDArray[np.float64]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    counts, edges = np.histogram(flat, bins=min(64, max(8, flat.size // 8)))
    histogram = HistogramProto(
        min=flat.min(),
        max=flat.max(),
        num=flat.size,
        sum=flat.sum(),
        sum_squares=np.square(flat).sum(),
        # Each limit is a bucket's upper end; the first bucket, empty, says where the second begins.
        bucket_limit=edges.tolist(),
        bucket=[0, *counts.tolist()],
    )
    return Summary.Value(tag=name, histo=histogram)


def _image_value(name: str, hwc: NDArray[np.uint8]) -> Any:
    from PIL import Image  # TensorBoard requires it
    from tensorboard.compat.proto.summary_pb2 import Summary

    if hwc.dtype != np.uint8 or hwc.ndim != 3 or hwc.shape[2] not in (1, 3, 4):
        raise ValueError(f"image {name!r} is {hwc.dtype}{list(hwc.shape)}; expected uint8[height, width, 1, 3 or 4]")
    encoded = io.BytesIO()
    Image.fromarray(hwc[:, :, 0] if hwc.shape[2] == 1 else hwc).save(encoded, format="png")
    height, width, channels = hwc.shape
    return Summary.Value(
        tag=name, image=Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded.getvalue())
    )


def _hparams_values(config: Mapping[str, Any], metrics: list[str]) -> Iterator[Any]:
    """The two values that declare the run's hyper-parameters and which scalars are its metrics."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import summary_v2

    plain = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in config.items()}
    declared = [summary_v2.HParam(name) for name in plain], [summary_v2.Metric(name) for name in metrics]
    for summary in (summary_v2.hparams_config_pb(*declared), summary_v2.hparams_pb(plain)):
        for value in summary.value:
            yield Summary.Value.FromString(value.SerializeToString())


def cut_metrics(path: Path, resume_at: int | None) -> None:
    """Keep the rows with step <= `resume_at`, none if that is None. Raises OSError.

    What is no row, like a half-written last line, goes too, and a test's row in any case: the resumed run will write its own.
    """
    if not os.path.lexists(path):
        return
    if resume_at is None or not path.is_file():
        path.unlink()
        return
    with open(path, "rb") as file:
        atomic.replace(path, (line for line in file if _row_step(line) <= resume_at))


def _row_step(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinity for what is no row, or a test's."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
        step = row["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if type(step) is int and not any(name.startswith(TEST) for name in row) else math.inf


def cut_events(folder: Path, resume_at: int | None) -> None:
    """Keep the events with step <= `resume_at`, none if that is None, in every event file of `folder`. Raises OSError.

    Hyper-parameters, final scores and those of a test go in any case: the resumed run will write its own.
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
    """The whole records of an event file as they stand: length, its checksum, the event, its checksum."""
    while len(header := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", header[:8])
        body = file.read(length + 4) if length <= LARGEST_RECORD else b""
        if len(body) != length + 4:
            return  # half-written, or no event file: readers stop here too
        yield header + body


def _is_kept(record: bytes, resume_at: int) -> bool:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        event = Event.FromString(record[12:-4])
    except DecodeError:
        return False
    tags = [value.tag for value in event.summary.value]
    return event.step <= resume_at and not any(tag.startswith((HPARAMS, FINAL, TEST)) for tag in tags)
