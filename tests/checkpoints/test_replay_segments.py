"""Replay segments: each save writes only new rows, and damaged or malformed segments are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mtrl_cli.checkpoints import replay_segments
from mtrl_cli.checkpoints.replay_segments import ReplayRecord, ReplaySegments
from mtrl_cli.errors import UserError
from tests.helpers.checkpoints import Ring


def _restored(folder: Path, record: ReplayRecord, ring: Ring) -> Ring:
    other = Ring(ring.capacity_rows)
    other.rows = ring.rows
    segments = ReplaySegments(folder)
    segments.check(record)
    segments.load(record, other)
    return other


def test_each_save_writes_only_new_rows_and_covers_the_ring(tmp_path):
    ring, segments = Ring(10), ReplaySegments(tmp_path)
    for count in (0, 4, 0, 3, 6, 1, 25, 2):
        ring.add(count)
        before, written = set(tmp_path.iterdir()), []
        record = segments.write_new(ring, written)
        segments.current = record.segments
        assert set(tmp_path.iterdir()) == before | set(written)
        rows = sum(stop - start for start, stop in (replay_segments.row_range(path.name) for path in written))
        assert rows == min(count, 10)
        assert torch.equal(_restored(tmp_path, record, ring).data, ring.data)


def test_segments_have_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_segments, "SEGMENT_BYTES", 4 * 2 * 3 * 8)  # four rows
    ring = Ring(50)
    ring.add(30)
    record = ReplaySegments(tmp_path).write_new(ring, [])
    assert ring.largest_export == 4
    assert list(record.segments)[:2] == ["0-4.safetensors", "4-8.safetensors"]
    assert torch.equal(_restored(tmp_path, record, ring).data, ring.data)


def test_rows_written_after_the_loaded_checkpoint_are_discarded(tmp_path):
    ring, segments = Ring(10), ReplaySegments(tmp_path)
    ring.add(5)
    early = segments.write_new(ring, [])
    segments.current = early.segments
    ring.add(3)
    segments.current = segments.write_new(ring, []).segments
    segments.delete_all_but(early.segments)
    rewound = _restored(tmp_path, early, ring)
    rewound.rows = 5
    segments.load(early, rewound)
    rewound.add(2)
    written: list[Path] = []
    record = segments.write_new(rewound, written)
    assert [path.name for path in written] == ["5-7.safetensors"]
    assert torch.equal(_restored(tmp_path, record, rewound).data, rewound.data)


def _record(tmp_path: Path) -> tuple[Ring, ReplayRecord]:
    ring = Ring(10)
    ring.add(8)
    return ring, ReplaySegments(tmp_path).write_new(ring, [])


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "flipped"])
def test_damaged_segment_is_detected(tmp_path, damage):
    _, record = _record(tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "longer":
        path.write_bytes(data + b"x")
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"0-8\.safetensors"):
        ReplaySegments(tmp_path).check(record)


@pytest.mark.parametrize(
    "change",
    [
        {"segments": None},
        {"segments": {}},
        {"segments": {"../../../etc/passwd": 1}},
        {"segments": {"0-8.safetensors": "1"}},
        {"segments": {"8-0.safetensors": 1}},
        {"segments": [5]},
        {"rows": 9},
        {"rows": "8"},
        {"rows": True},
        {"capacity_rows": None},
        {"rows": 7},
    ],
)
def test_malformed_record_is_refused(tmp_path, change):
    _, record = _record(tmp_path)
    with pytest.raises(ValidationError):
        ReplayRecord.model_validate(record.model_dump() | change)


def test_gap_between_segments_is_refused(tmp_path):
    _, record = _record(tmp_path)
    with pytest.raises(ValidationError, match="rows are missing"):
        ReplayRecord.model_validate(record.model_dump() | {"segments": {"0-3.safetensors": 1, "4-8.safetensors": 1}})


def test_rows_of_another_capacity_or_shape_are_refused(tmp_path):
    _, record = _record(tmp_path)
    with pytest.raises(UserError, match="10 rows, expected 11"):
        ReplaySegments(tmp_path).load(record, Ring(11))
    other = Ring(10)
    other.data = torch.zeros(4, 10, 3)
    with pytest.raises(UserError, match="does not contain rows of this replay"):
        ReplaySegments(tmp_path).load(record, other)


def test_only_segments_are_deleted(tmp_path):
    _record(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    ReplaySegments(tmp_path).delete_all_but([])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
