"""The replay on disk: immutable segments of rows, so that a checkpoint writes only the rows that are new."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch

from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic

PIECE_BYTES = 64 * 2**20
NAME = re.compile(r"(0|[1-9]\d{0,17})-([1-9]\d{0,17})\.safetensors")


class ReplayRows(Protocol):
    """What a replay must offer to be kept. Rows are counted from the run's first; the ring holds the newest `capacity_rows`.

    `import_rows` is called in ascending order of rows, possibly with some that the ring has no room for any more.
    """

    rows: int
    capacity_rows: int

    def export_rows(self, start: int, stop: int) -> dict[str, torch.Tensor]: ...

    def import_rows(self, start: int, tensors: dict[str, torch.Tensor]) -> None: ...


def own(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU, contiguous, in memory that it shares with no other: what safetensors can write."""
    tensor = tensor.detach().cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def span(name: str) -> tuple[int, int]:
    """The rows [start, stop) of the segment `name`. Raises UserError for what is not a segment's name, a path for example."""
    match = NAME.fullmatch(name)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"{name!r} is not the name of a replay segment")
    return int(match[1]), int(match[2])


class ReplaySegments:
    """The segments in one folder. `current` are those that the last save or load named, oldest first.

    A segment's record is {"name", "bytes", "crc32"}; a checkpoint's is {"rows", "capacity_rows", "segments": [records]}.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.current: list[dict[str, Any]] = []

    def write_new(self, replay: ReplayRows, written: list[Path]) -> dict[str, Any]:
        """Write the rows that no current segment holds, and return the record of all that cover the ring.

        `written` receives each new file, so that the caller can remove them if the checkpoint fails. Raises OSError.
        """
        rows, oldest = replay.rows, max(0, replay.rows - replay.capacity_rows)
        spans = [(record, *span(record["name"])) for record in self.current]
        kept = [(record, stop) for record, _, stop in spans if oldest < stop <= rows]
        start = kept[-1][1] if kept else oldest
        records = [record for record, _ in kept]
        if start < rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            row_bytes = sum(tensor.nbytes for tensor in replay.export_rows(start, start + 1).values())
            piece = max(1, PIECE_BYTES // max(1, row_bytes))
            for first in range(start, rows, piece):
                records.append(self._write(replay, first, min(first + piece, rows), written))
        return {"rows": rows, "capacity_rows": replay.capacity_rows, "segments": records}

    def _write(self, replay: ReplayRows, start: int, stop: int, written: list[Path]) -> dict[str, Any]:
        path = self.folder / f"{start}-{stop}.safetensors"
        data = safetensors.torch.save({name: own(tensor) for name, tensor in replay.export_rows(start, stop).items()})
        assert not path.exists(), f"{path} belongs to a kept checkpoint: load_replay it, or discard it, before saving"
        written.append(path)
        atomic.replace(path, data)
        return {"name": path.name, "bytes": len(data), "crc32": zlib.crc32(data)}

    def check(self, record: dict[str, Any]) -> None:
        """Raise UserError unless every segment that a checkpoint's record names is whole."""
        for segment in _segments(record):
            self._read(segment)

    def load(self, record: dict[str, Any], replay: ReplayRows) -> None:
        """Give the replay the rows of a checkpoint's record. Raises UserError if they are damaged or of another capacity."""
        segments = _segments(record)
        if record.get("capacity_rows") != replay.capacity_rows:
            raise UserError(f"the saved replay has {record.get('capacity_rows')} rows, this one {replay.capacity_rows}")
        for segment in segments:
            data = self._read(segment)
            try:
                tensors = safetensors.torch.load(data)
                replay.import_rows(span(segment["name"])[0], tensors)
            except (safetensors.SafetensorError, KeyError, IndexError, RuntimeError, ValueError):
                raise UserError(f"{self.folder / segment['name']} does not hold rows of this replay") from None
        self.current = segments

    def _read(self, segment: dict[str, Any]) -> bytes:
        path = self.folder / segment["name"]
        data = atomic.read_bytes(path, self.folder, segment["bytes"])
        if len(data) != segment["bytes"]:
            raise UserError(f"{path} is truncated: {len(data):,} of {segment['bytes']:,} bytes")
        if zlib.crc32(data) != segment["crc32"]:
            raise UserError(f"{path} is damaged: its bytes have changed")
        return data

    def delete_all_but(self, names: Iterable[str]) -> None:
        """Delete the segments that are not among `names`. Files of other names are left alone."""
        if self.folder.is_dir():
            keep = set(names)
            for path in self.folder.iterdir():
                if NAME.fullmatch(path.name) and path.name not in keep:
                    path.unlink(missing_ok=True)


def segment_names(record: Any) -> list[str]:
    """The names in a checkpoint's record, as far as there are any: for keeping files, not for reading them."""
    segments = record.get("segments") if isinstance(record, dict) else None
    named = [segment.get("name") for segment in segments if isinstance(segment, dict)] if isinstance(segments, list) else []
    return [name for name in named if isinstance(name, str)]


def _segments(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a checkpoint's segments. Raises UserError unless they are well-formed and cover the ring without a gap."""
    rows, capacity, segments = record.get("rows"), record.get("capacity_rows"), record.get("segments")
    if type(rows) is not int or type(capacity) is not int or not isinstance(segments, list):
        raise UserError("the record of its replay is damaged")
    expected = None
    for segment in segments:
        if not isinstance(segment, dict) or not isinstance(segment.get("name"), str):
            raise UserError("the record of its replay is damaged")
        start, stop = span(segment["name"])
        well_formed = type(segment.get("bytes")) is int and type(segment.get("crc32")) is int and segment["bytes"] >= 0
        if not well_formed or (expected is not None and start != expected):
            raise UserError("the record of its replay is damaged")
        expected = stop
    first = span(segments[0]["name"])[0] if segments else 0
    if first > max(0, rows - capacity) or (expected or 0) != rows:
        raise UserError("the record of its replay is damaged: rows are missing")
    return segments
