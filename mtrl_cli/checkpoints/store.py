"""The checkpoints of a run. A kill or a full disk at any moment leaves each checkpoint either complete or absent.

    checkpoints/<step>/   model.safetensors  optimizer.safetensors  arrays.safetensors  state.json  COMPLETE
    checkpoints/replay/   <first row>-<row after the last>.safetensors
    checkpoints/latest    a step and a newline
    checkpoints/best      a step and a newline

A checkpoint is written under a temporary name, synced, and renamed. Then `latest` is updated, and only then are older files deleted.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from mtrl_cli.checkpoints.format import Header, UnsupportedFormat, from_bytes, read_checkpoint, read_header, to_bytes, write_checkpoint
from mtrl_cli.checkpoints.replay_segments import ReplayRecord, ReplayRows, ReplaySegments
from mtrl_cli.errors import RunError, UserError
from mtrl_cli.files import atomic
from mtrl_cli.parallel.distributed import ALONE, Ranks

STEP = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)
SAVING, REPLACED, REMOVED = ".saving-", ".replaced-", ".removed-"
RANK = "rank-"
Which = int | Literal["latest", "best"]
Warn = Callable[[str], None]


class NoCheckpoint(UserError):
    """The run has no finished checkpoint: there is nothing to load, and a resume starts from the beginning."""


def parse_which(text: str | int) -> Which:
    """Parse the value of `checkpoint=`: "latest", "best" or a step. Raises UserError."""
    if text in ("latest", "best"):
        return text  # type: ignore[return-value]
    if isinstance(text, bool) or not STEP.fullmatch(str(text)):
        raise UserError(f"checkpoint must be latest, best or a step, got {text}")
    return int(text)


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints/` of the run; created by the first save.
        keep: number of newest checkpoints to keep, in addition to the best checkpoint.
        with_replay: whether to save the replay, and whether a checkpoint with a damaged replay counts as damaged.
        ranks: the ranks that save together. The first rank stores the states of the other ranks in the checkpoint, under "others" by
            rank. Each rank has its own replay segments.

    Only the process that holds the run's lock may call `recover`, `save` and `discard_after`; any process may load. All ranks call
    `save`. Raises UserError if the folder is a link out of the run.
    """

    def __init__(self, folder: Path, *, keep: int, with_replay: bool, ranks: Ranks = ALONE):
        assert keep >= 1, keep
        for link in (folder, folder / "replay", *(folder / "replay").glob(f"{RANK}*")):
            if not atomic.is_inside(link, link.parent):
                raise UserError(f"{link} is a link out of the run folder. Remove the link")
        self.folder = folder
        self.keep = keep
        self.with_replay = with_replay
        self._ranks = ranks
        self._segments = self._segments_of(ranks.rank)
        self._headers: dict[int, Header] = {}

    # -- Queries ------------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, ascending, damaged ones included."""
        if not self.folder.is_dir():
            return []
        names = (path.name.removeprefix(REPLACED) for path in self.folder.iterdir() if path.is_dir())
        return sorted({int(name) for name in names if STEP.fullmatch(name)})

    def latest(self) -> int | None:
        """Return the step in `latest`, or None if the file or its checkpoint is missing."""
        return self._read_pointer("latest")

    def best(self) -> int | None:
        """Return the step of the checkpoint with the highest score, or None if no checkpoint has a score."""
        return self._read_pointer("best")

    def _read_pointer(self, name: str) -> int | None:
        try:
            text = atomic.read_bytes(self.folder / name, self.folder, 32).decode("ascii").strip()
        except (UserError, UnicodeDecodeError):
            return None
        return int(text) if STEP.fullmatch(text) and self._path(int(text)).is_dir() else None

    def _path(self, step: int) -> Path:
        """Return the folder of a checkpoint. During the replacement of a checkpoint the folder has another name."""
        path, aside = self.folder / str(step), self.folder / f"{REPLACED}{step}"
        return aside if not path.exists() and aside.exists() else path

    # -- Saving -------------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any], replay: ReplayRows | None = None, score: float | None = None) -> None:
        """Save `state` as the checkpoint of `step` and update `latest`, and `best` if the score is the highest so far.

        `state` is a nested dictionary of tensors, numpy arrays and plain values; "model" and "optimizer" have separate files.
        Saving a step again replaces its checkpoint. The score is kept unless a new score is given.

        Raises:
            RunError: the disk is full or failed. Earlier checkpoints are intact.
        """
        written: list[Path] = []
        try:
            records = []
            with self._ranks.together(), self._disk_errors_as_run_errors(step):
                if self.with_replay and replay is not None:
                    records = [self._segments.write_new(replay, written)]
            own = {"replays": [record.model_dump() for record in records], "state": state}
            others = [from_bytes(data) for data in self._ranks.gather(b"" if self._ranks.is_first else to_bytes(own))]
            with self._ranks.together(), self._disk_errors_as_run_errors(step):
                if self._ranks.is_first:
                    theirs = [ReplayRecord.model_validate(record) for other in others for record in other["replays"]]
                    if others:
                        state = state | {"others": {str(rank): other["state"] for rank, other in enumerate(others, 1)}}
                    self._write(step, score, state, [*records, *theirs])
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        if records:
            self._segments.current = records[0].segments
        with self._ranks.together(), self._disk_errors_as_run_errors(step):
            if self._ranks.is_first:
                atomic.replace(self.folder / "latest", f"{step}\n".encode())
                self._update_best()
                self._prune()

    def _write(self, step: int, score: float | None, state: dict[str, Any], replays: list[ReplayRecord]) -> None:
        """Write the folder of the checkpoint."""
        score = None if score is None or not math.isfinite(score) else float(score)
        if score is None and step in self.steps():
            score = self._score(step)
        header = Header(step=step, score=score, replays=replays)
        temporary = self.folder / f"{SAVING}{step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.sync_folder(self.folder.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            write_checkpoint(temporary, header, state)
            self._publish(temporary, step)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(self.folder / f"{REPLACED}{step}", ignore_errors=True)
        self._headers[step] = header

    def _publish(self, temporary: Path, step: int) -> None:
        """Rename a complete folder to its step. An existing checkpoint of the step is first renamed to where `_path` finds it."""
        path, aside = self.folder / str(step), self.folder / f"{REPLACED}{step}"
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        try:
            temporary.rename(path)
        except BaseException:
            if aside.exists():
                aside.rename(path)
            raise
        atomic.sync_folder(self.folder)

    @contextmanager
    def _disk_errors_as_run_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            last = self.latest()
            intact = "there is no earlier checkpoint" if last is None else f"the last good checkpoint is {last}"
            reason = error.strerror or str(error)
            raise RunError(f"{self.folder}: {reason[:1].lower()}{reason[1:]} while saving step {step}; {intact}") from None

    # -- Deleting -----------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Delete or restore the unfinished files of a killed process, and update `best`."""
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            step = path.name.removeprefix(REPLACED)
            if path.name.startswith(REPLACED) and not (self.folder / step).exists():
                path.rename(self.folder / step)
            elif path.name.startswith((SAVING, REPLACED, REMOVED)):
                shutil.rmtree(path, ignore_errors=True)
        for folder in (self.folder, *(segments.folder for segments in self._all_segments())):
            atomic.remove_temporaries(folder)
        self._update_best()
        self._delete_unused_segments()

    def discard_after(self, step: int) -> None:
        """Delete all checkpoints newer than `step`, because the run continues from there; -1 deletes all."""
        if not self.folder.is_dir():
            return
        if step in self.steps():
            atomic.replace(self.folder / "latest", f"{step}\n".encode())
        else:
            (self.folder / "latest").unlink(missing_ok=True)
        newer = [other for other in self.steps() if other > step]
        self._update_best(newer)
        for other in newer:
            self._remove(other)
        self._delete_unused_segments()

    def _update_best(self, without: list[int] | None = None) -> None:
        scores = {step: score for step in self.steps() if step not in (without or []) and (score := self._score(step)) is not None}
        if not scores:
            (self.folder / "best").unlink(missing_ok=True)
            return
        best = max(sorted(scores), key=lambda step: scores[step])
        if best != self.best():
            atomic.replace(self.folder / "best", f"{best}\n".encode())

    def _prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self.latest(), self.best()}
        for step in self.steps():
            if step not in kept:
                self._remove(step)
        self._delete_unused_segments()

    def _remove(self, step: int) -> None:
        """Delete a checkpoint. It is renamed first, so that a partly deleted checkpoint never has a valid name."""
        removed = self.folder / f"{REMOVED}{step}"
        shutil.rmtree(removed, ignore_errors=True)
        try:
            self._path(step).rename(removed)
        except OSError:
            return
        self._headers.pop(step, None)
        shutil.rmtree(removed, ignore_errors=True)

    def _delete_unused_segments(self) -> None:
        """Keep only the segments of the newest `keep` checkpoints. A checkpoint that is kept as the best needs no replay."""
        headers = [header for step in self.steps()[-self.keep :] if (header := self._header(step)) is not None]
        for rank, segments in enumerate(self._all_segments()):
            segments.delete_all_but({name for header in headers for record in header.replays[rank : rank + 1] for name in record.segments})

    def _segments_of(self, rank: int) -> ReplaySegments:
        folder = self.folder / "replay"
        return ReplaySegments(folder if rank == 0 else folder / f"{RANK}{rank}")

    def _all_segments(self) -> list[ReplaySegments]:
        """Return the segments of each rank, up to the highest rank that has saved any."""
        found = [path.name.removeprefix(RANK) for path in (self.folder / "replay").glob(f"{RANK}*")]
        return [self._segments_of(rank) for rank in range(1 + max((int(name) for name in found if STEP.fullmatch(name)), default=0))]

    def _header(self, step: int) -> Header | None:
        """Return the header of a checkpoint, or None if it cannot be read."""
        if step not in self._headers:
            try:
                self._headers[step] = read_header(self._path(step), self.folder)
            except UserError:
                return None
        return self._headers[step]

    def _score(self, step: int) -> float | None:
        header = self._header(step)
        return None if header is None else header.score

    # -- Loading ------------------------------------------------------------------------------------------------------------

    def load(self, which: Which, device: str | torch.device = "cpu", *, warn: Warn = _print_to_stderr) -> tuple[int, dict[str, Any]]:
        """Return (step, state) of a checkpoint after verifying every byte: "model" and "optimizer" on `device`, the rest on the CPU.

        If the latest checkpoint is damaged, "latest" falls back to the newest undamaged one and passes one line to `warn`; then call
        `discard_after` before saving.

        Raises:
            NoCheckpoint: the run has no finished checkpoint.
            UserError: the checkpoint is missing, damaged or has another format version.
        """
        steps = self.steps()
        if not steps and which in ("latest", "best"):
            raise NoCheckpoint(f"{self.folder.parent} has no checkpoint yet")
        if which == "latest":
            return self._load_latest(device, warn)
        step = self.best() if which == "best" else int(which)
        if step is None:
            raise UserError(f"{self.folder.parent} has no best checkpoint: no score was saved. Use checkpoint=latest or a step")
        if step not in steps:
            raise UserError(f"{self.folder.parent} has no checkpoint {step}; available: {', '.join(map(str, steps)) or 'none'}")
        try:
            return step, self._load(step, device)
        except UnsupportedFormat:
            raise
        except UserError as error:
            raise UserError(f"checkpoint {step} cannot be loaded: {error}") from None

    def _load_latest(self, device: str | torch.device, warn: Warn) -> tuple[int, dict[str, Any]]:
        reason, failed = "", set()
        if self.latest() is None and os.path.lexists(self.folder / "latest"):  # a missing file: killed before the first was named
            reason = f"{self.folder / 'latest'} names no checkpoint"
        # Another process may be training the run: the checkpoint that failed to load may have been deleted, and there may be a newer one.
        while untried := [step for step in (*self.steps(), self.latest()) if step is not None and step not in failed]:
            step = untried[-1]
            try:
                state = self._load(step, device)
            except UnsupportedFormat:
                raise
            except UserError as error:
                failed.add(step)
                reason = reason or str(error)
                continue
            if reason and step != self.latest():
                warn(f"warning: {reason}; falling back to checkpoint {step}")
            return step, state
        if not any((self._path(step) / "COMPLETE").exists() for step in self.steps()):
            raise NoCheckpoint(f"{self.folder.parent} has no finished checkpoint yet")
        raise UserError(f"all checkpoints in {self.folder} are damaged: {reason}")

    def _load(self, step: int, device: str | torch.device) -> dict[str, Any]:
        folder = self._path(step)
        header, state = read_checkpoint(folder, self.folder, device)
        if header.step != step:
            raise UserError(f"{folder / 'state.json'} is damaged: expected step {step}, got {str(header.step)[:20]}")
        if self.with_replay and header.replays:
            for rank in range(len(header.replays)) if self._ranks.is_first else [self._ranks.rank]:
                self._segments_of(rank).check(self._record(header, rank))
        self._headers[step] = header
        return state

    def load_replay(self, step: int, replay: ReplayRows) -> bool:
        """Load the replay of the loaded checkpoint `step` into `replay`. Returns whether the checkpoint has a replay. Raises UserError."""
        header = self._header(step)
        if not self.with_replay or header is None or not header.replays:
            return False
        self._segments.load(self._record(header, self._ranks.rank), replay)
        return True

    def _record(self, header: Header, rank: int) -> ReplayRecord:
        if rank >= len(header.replays):
            raise UserError(f"checkpoint {header.step} has no replay of rank {rank}")
        return header.replays[rank]
