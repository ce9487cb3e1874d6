"""Checkpoints: folders of plain files that are whole or not there at all, whatever kills the process or fills the disk.

    checkpoints/<step>/   model.safetensors  optimizer.safetensors  arrays.safetensors  state.json  COMPLETE
    checkpoints/replay/   <first row>-<row after the last>.safetensors
    checkpoints/latest    a step, and a line end
    checkpoints/best      likewise

A checkpoint is written under another name, synced, and renamed; only then does `latest` name it, and only then is anything older
deleted. COMPLETE holds sizes and checksums. Nothing is ever unpickled.
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

from mtrl_cli.checkpoints.format import NewerFormat, from_bytes, read_checkpoint, to_bytes, write_checkpoint
from mtrl_cli.checkpoints.replay_segments import ReplayRows, ReplaySegments, segment_names
from mtrl_cli.errors import RunError, UserError
from mtrl_cli.files import atomic
from mtrl_cli.parallel.distributed import ALONE, Ranks

STEP = re.compile(r"0|[1-9]\d{0,17}")
SAVING, REPLACED, REMOVED = ".saving-", ".replaced-", ".removed-"
RANK = "rank-"
Which = int | Literal["latest", "best"]
Warn = Callable[[str], None]


class NoCheckpoint(UserError):
    """The run was never saved: there is nothing to load, and a resume starts anew."""


def parse_which(text: str | int) -> Which:
    """What `checkpoint=` means: "latest", "best" or a step. Raises UserError."""
    if text in ("latest", "best"):
        return text  # type: ignore[return-value]
    if isinstance(text, bool) or not STEP.fullmatch(str(text)):
        raise UserError(f"checkpoint={text} is not known; give latest, best or a step.")
    return int(text)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints/` of the run; made at the first save.
        keep: how many of the newest to keep, besides the best.
        with_replay: whether a checkpoint without its replay counts as damaged, and whether replay is saved.
        ranks: that save together. The first keeps the others' states in its own, as "others" by rank; each has replay segments of its own.

    Only the process that holds the run's lock may call `recover`, `save` and `discard_after`; anyone may load. Where there are several
    ranks, all call `save`. Raises UserError if the folder is a link that leads elsewhere.
    """

    def __init__(self, folder: Path, *, keep: int, with_replay: bool, ranks: Ranks = ALONE):
        assert keep >= 1, keep
        for link in (folder, folder / "replay", *(folder / "replay").glob(f"{RANK}*")):
            if not atomic.is_inside(link, link.parent):
                raise UserError(f"{link} is a link that leaves the run; nothing is read or written through it.")
        self.folder = folder
        self.keep = keep
        self.with_replay = with_replay
        self._ranks = ranks
        self._segments = self._segments_of(ranks.rank)
        self._headers: dict[int, dict[str, Any]] = {}

    # -- what there is ------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps of all finished checkpoints, ascending, damaged ones included."""
        if not self.folder.is_dir():
            return []
        names = (path.name.removeprefix(REPLACED) for path in self.folder.iterdir() if path.is_dir())
        return sorted({int(name) for name in names if STEP.fullmatch(name)})

    def latest(self) -> int | None:
        """The step that `latest` names, or None if it is missing or names nothing."""
        return self._named("latest")

    def best(self) -> int | None:
        """The step of the checkpoint with the highest score so far, or None if none has one."""
        return self._named("best")

    def best_score(self) -> float | None:
        """The score of the best checkpoint."""
        step = self.best()
        return None if step is None else self._score(step)

    def _named(self, name: str) -> int | None:
        try:
            text = atomic.read_bytes(self.folder / name, self.folder, 32).decode("ascii").strip()
        except (UserError, UnicodeDecodeError):
            return None
        return int(text) if STEP.fullmatch(text) and self._path(int(text)).is_dir() else None

    def _path(self, step: int) -> Path:
        """Where a checkpoint lies: under its step, or aside for the moment in which it is being replaced."""
        path, aside = self.folder / str(step), self.folder / f"{REPLACED}{step}"
        return aside if not path.exists() and aside.exists() else path

    # -- saving -------------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any], replay: ReplayRows | None = None, score: float | None = None) -> None:
        """Save `state` as the checkpoint of `step` and make it the latest; the best too, if its score beats all before.

        `state` is a nested dictionary of tensors, numpy arrays and plain values; its "model" and "optimizer" get files of their own.
        Saving a step again replaces its checkpoint and keeps its score unless a new one is given. Raises RunError if the disk is
        full or fails, with the checkpoints before still whole.
        """
        written: list[Path] = []
        try:
            record = None
            with self._ranks.together(), self._telling_failure(step):
                if self.with_replay and replay is not None:
                    record = self._segments.write_new(replay, written)
            others = self._ranks.gather(b"" if self._ranks.is_first else to_bytes({"replay": record, "state": state}))
            with self._ranks.together(), self._telling_failure(step):
                if self._ranks.is_first:
                    self._write(step, score, state, record, [from_bytes(data) for data in others])
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        if record is not None:
            self._segments.current = record["segments"]
        with self._ranks.together(), self._telling_failure(step):
            if self._ranks.is_first:
                atomic.replace(self.folder / "latest", f"{step}\n".encode())
                self._repair_best()
                self._prune()

    def _write(self, step: int, score: float | None, state: dict[str, Any], record: Any, others: list[dict[str, Any]]) -> None:
        """Write the checkpoint's own folder, with what the other ranks have handed over."""
        score = None if score is None or not math.isfinite(score) else float(score)
        if score is None and step in self.steps():
            score = self._score(step)
        header: dict[str, Any] = {"step": step, "score": score, "replay": record}
        if others:
            header["others"] = [other["replay"] for other in others]
            state = state | {"others": {str(rank): other["state"] for rank, other in enumerate(others, 1)}}
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
        """Give a whole folder its name. One that has it already is put aside first, where `_path` finds it."""
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
    def _telling_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(step, error) from None

    def _failed(self, step: int, error: OSError) -> RunError:
        last = self.latest()
        good = "there is no checkpoint before it" if last is None else f"the last good checkpoint is {last}"
        trouble = error.strerror or str(error)
        return RunError(f"{self.folder}: {trouble[:1].lower()}{trouble[1:]} while saving step {step}; {good}.")

    # -- clearing away ------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Clear away what a killed process left unfinished, and let `best` name the best that is there."""
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            step = path.name.removeprefix(REPLACED)
            if path.name.startswith(REPLACED) and not (self.folder / step).exists():
                path.rename(self.folder / step)
            elif path.name.startswith((SAVING, REPLACED, REMOVED)):
                shutil.rmtree(path, ignore_errors=True)
        atomic.remove_temporaries(self.folder)
        for segments in self._all_segments():
            atomic.remove_temporaries(segments.folder)
        self._repair_best()
        self._delete_unnamed_segments()

    def discard_after(self, step: int) -> None:
        """Remove all checkpoints newer than `step` and what only they need: the run goes on from there; -1 removes all."""
        if not self.folder.is_dir():
            return
        if step in self.steps():
            atomic.replace(self.folder / "latest", f"{step}\n".encode())
        else:
            (self.folder / "latest").unlink(missing_ok=True)
        newer = [other for other in self.steps() if other > step]
        self._repair_best(newer)
        for other in newer:
            self._remove(other)
        self._delete_unnamed_segments()

    def _repair_best(self, without: list[int] | None = None) -> None:
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
        self._delete_unnamed_segments()

    def _remove(self, step: int) -> None:
        """Delete a checkpoint. Its name goes first: half of one must not look like a whole one."""
        removed = self.folder / f"{REMOVED}{step}"
        shutil.rmtree(removed, ignore_errors=True)
        try:
            self._path(step).rename(removed)
        except OSError:
            return
        self._headers.pop(step, None)
        shutil.rmtree(removed, ignore_errors=True)

    def _delete_unnamed_segments(self) -> None:
        """Keep the segments of the newest `keep` checkpoints; one that is kept only as the best needs none."""
        kept = [_records(self._header(step)) for step in self.steps()[-self.keep :]]
        for rank, segments in enumerate(self._all_segments()):
            segments.delete_all_but({name for records in kept for record in records[rank : rank + 1] for name in segment_names(record)})

    def _segments_of(self, rank: int) -> ReplaySegments:
        folder = self.folder / "replay"
        return ReplaySegments(folder if rank == 0 else folder / f"{RANK}{rank}")

    def _all_segments(self) -> list[ReplaySegments]:
        """Those of every rank that has saved any, and of those before it."""
        found = [path.name.removeprefix(RANK) for path in (self.folder / "replay").glob(f"{RANK}*")]
        return [self._segments_of(rank) for rank in range(1 + max((int(name) for name in found if STEP.fullmatch(name)), default=0))]

    def _header(self, step: int) -> dict[str, Any]:
        """What a checkpoint's state.json holds; {} if it cannot be read."""
        if step not in self._headers:
            try:
                self._headers[step] = atomic.read_json(self._path(step) / "state.json", self.folder)
            except UserError:
                return {}
        return self._headers[step]

    def _score(self, step: int) -> float | None:
        score = self._header(step).get("score")
        return score if isinstance(score, float) and math.isfinite(score) else None

    # -- loading ------------------------------------------------------------------------------------------------------------

    def load(self, which: Which, device: str | torch.device = "cpu", *, warn: Warn = _to_stderr) -> tuple[int, dict[str, Any]]:
        """(step, state) of a checkpoint, every byte checked: "model" and "optimizer" on `device`, the rest on the CPU.

        "latest" falls back to the newest whole one where it is damaged, and tells `warn` so in a line; call `discard_after` before
        saving then. Raises NoCheckpoint if none was ever finished, and UserError for one named explicitly, or the best, that is
        missing, damaged or of a newer format.
        """
        steps = self.steps()
        if not steps and which in ("latest", "best"):
            raise NoCheckpoint(f"{self.folder.parent} has no checkpoint yet.")
        if which == "latest":
            return self._load_latest(device, warn)
        step = self.best() if which == "best" else int(which)
        if step is None:
            raise UserError(f"{self.folder.parent} has no best checkpoint (no score was saved); give checkpoint=latest or a step.")
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder.parent} has no checkpoint {step}; there are: {there}.")
        try:
            return step, self._load(step, device)
        except NewerFormat:
            raise
        except UserError as error:
            raise UserError(f"checkpoint {step} cannot be loaded: {str(error).rstrip('.')}.") from None

    def _load_latest(self, device: str | torch.device, warn: Warn) -> tuple[int, dict[str, Any]]:
        step, trouble = self.latest(), ""
        if step is None and not os.path.lexists(self.folder / "latest"):
            step = self.steps()[-1]  # killed after the first checkpoint was whole and before `latest` could name it
        while step is not None:
            try:
                return step, self._load(step, device)
            except NewerFormat:
                raise
            except UserError as error:
                trouble = str(error)
            # A run that is being trained may have replaced its latest and deleted the one we were reading.
            step, before = self.latest(), step
            if step == before:
                break
        else:
            trouble = f"{self.folder / 'latest'} names no checkpoint"
        for other in reversed(self.steps()):
            if other == step:
                continue
            try:
                state = self._load(other, device)
            except NewerFormat:
                raise
            except UserError:
                continue
            warn(f"warning: {trouble.rstrip('.')}; going back to checkpoint {other}.")
            return other, state
        if not any((self._path(other) / "COMPLETE").exists() for other in self.steps()):
            raise NoCheckpoint(f"{self.folder.parent} has no finished checkpoint yet.")
        raise UserError(f"none of the checkpoints in {self.folder} is whole: {trouble.rstrip('.')}.")

    def _load(self, step: int, device: str | torch.device) -> dict[str, Any]:
        folder = self._path(step)
        header, state = read_checkpoint(folder, self.folder, device)
        if header.get("step") != step:
            raise UserError(f"{folder / 'state.json'} is of step {str(header.get('step'))[:20]}, not {step}")
        if self.with_replay and header.get("replay") is not None:
            for rank in range(len(_records(header))) if self._ranks.is_first else [self._ranks.rank]:
                self._segments_of(rank).check(_record(header, rank, folder))
        self._headers[step] = {key: value for key, value in header.items() if key != "state"}
        return state

    def load_replay(self, step: int, replay: ReplayRows) -> bool:
        """Give `replay` its rows as of the loaded checkpoint `step`; False if that was saved without. Raises UserError."""
        header = self._header(step)
        if not self.with_replay or header.get("replay") is None:
            return False
        self._segments.load(_record(header, self._ranks.rank, self._path(step)), replay)
        return True


def _records(header: dict[str, Any]) -> list[Any]:
    """The record of each rank's replay."""
    others = header.get("others")
    return [header.get("replay"), *(others if isinstance(others, list) else [])]


def _record(header: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    record = next(iter(_records(header)[rank : rank + 1]), None)
    if not isinstance(record, dict):
        raise UserError(f"{folder / 'state.json'} is damaged: its replay is a {type(record).__name__}")
    return record
