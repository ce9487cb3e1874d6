"""The replay on disk, in immutable segments of rows: each checkpoint writes only the rows added since the previous checkpoint."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Protocol, Self

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mtrl_cli.checkpoints.state_tree import with_own_storage
from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic

SEGMENT_BYTES = 64 * 2**20
NAME = re.compile(r"(0|[1-9]\d{0,17})-([1-9]\d{0,17})\.safetensors", re.ASCII)
Count = Annotated[int, Field(ge=0)]


class ReplayRows(Protocol):
    """A replay that can be saved. Rows are numbered from the start of the run; the ring buffer contains the newest `capacity_rows`.

    `import_rows` is called in ascending order of rows. The first rows may be older than the oldest row of the ring buffer.
    """

    rows: int
    capacity_rows: int

    def export_rows(self, start: int, stop: int) -> dict[str, torch.Tensor]: ...

    def import_rows(self, start: int, tensors: dict[str, torch.Tensor]) -> None: ...


class ReplayRecord(BaseModel):
    """The description of one replay in a checkpoint.

    Attributes:
        segments: CRC-32 by file name, oldest first. The segments are contiguous and cover the ring buffer.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    rows: Count
    capacity_rows: Count
    segments: dict[str, int]

    @model_validator(mode="after")
    def _check_coverage(self) -> Self:
        ranges = [row_range(name) for name in self.segments]
        first, last = (ranges[0][0], ranges[-1][1]) if ranges else (0, 0)
        has_gap = any(stop != start for (_, stop), (start, _) in pairwise(ranges))
        if has_gap or first > max(0, self.rows - self.capacity_rows) or last != self.rows:
            raise ValueError("rows are missing")
        return self


def row_range(name: str) -> tuple[int, int]:
    """Return the rows [start, stop) of the segment file `name`. Raises UserError for any other name, such as a path."""
    match = NAME.fullmatch(name)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"{name!r} is not the name of a replay segment")
    return int(match[1]), int(match[2])


class ReplaySegments:
    """The segment files in one folder, named `<first row>-<row after the last>.safetensors`.

    Attributes:
        current: the segments of the last checkpoint saved or loaded: CRC-32 by file name, oldest first.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.current: dict[str, int] = {}

    def write_new(self, replay: ReplayRows, written: list[Path]) -> ReplayRecord:
        """Write the rows that are in no current segment, and return the record of all segments that cover the ring buffer.

        Each new file is added to `written`, so that the caller can delete the files if the checkpoint fails. Raises OSError.
        """
        rows, oldest = replay.rows, max(0, replay.rows - replay.capacity_rows)
        segments = {name: crc32 for name, crc32 in self.current.items() if oldest < row_range(name)[1] <= rows}
        start = row_range(next(reversed(segments)))[1] if segments else oldest
        if start < rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            row_bytes = sum(tensor.nbytes for tensor in replay.export_rows(start, start + 1).values())
            step = max(1, SEGMENT_BYTES // max(1, row_bytes))
            for first in range(start, rows, step):
                path = self.folder / f"{first}-{min(first + step, rows)}.safetensors"
                segments[path.name] = self._write(path, replay, written)
        return ReplayRecord(rows=rows, capacity_rows=replay.capacity_rows, segments=segments)

    def _write(self, path: Path, replay: ReplayRows, written: list[Path]) -> int:
        rows = replay.export_rows(*row_range(path.name))
        data = safetensors.torch.save({name: with_own_storage(tensor) for name, tensor in rows.items()})
        assert not path.exists(), f"{path} belongs to a kept checkpoint: load or discard the checkpoint before saving"
        written.append(path)
        atomic.replace(path, data)
        return zlib.crc32(data)

    def check(self, record: ReplayRecord) -> None:
        """Raise UserError unless every segment of the record is on disk and undamaged."""
        for name, crc32 in record.segments.items():
            self._read(name, crc32)

    def load(self, record: ReplayRecord, replay: ReplayRows) -> None:
        """Import the rows of a record into `replay`. Raises UserError if a segment is damaged or the capacities differ."""
        if record.capacity_rows != replay.capacity_rows:
            raise UserError(f"the capacity of the saved replay is {record.capacity_rows} rows, expected {replay.capacity_rows}")
        for name, crc32 in record.segments.items():
            data = self._read(name, crc32)
            try:
                replay.import_rows(row_range(name)[0], safetensors.torch.load(data))
            except (safetensors.SafetensorError, KeyError, IndexError, RuntimeError, ValueError):
                raise UserError(f"{self.folder / name} does not contain rows of this replay") from None
        self.current = record.segments

    def _read(self, name: str, crc32: int) -> bytes:
        data = atomic.read_bytes(self.folder / name, self.folder)
        if zlib.crc32(data) != crc32:
            raise UserError(f"{self.folder / name} is damaged: checksum mismatch")
        return data

    def delete_all_but(self, names: Collection[str]) -> None:
        """Delete every segment file that is not in `names`. Other files are kept."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if NAME.fullmatch(path.name) and path.name not in names:
                    path.unlink(missing_ok=True)
