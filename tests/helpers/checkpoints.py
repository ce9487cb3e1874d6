"""Checkpoints of a fake training state, and a replay whose row r contains the number r."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from mtrl_cli.checkpoints.store import CheckpointStore, NoCheckpoint

SCORES = [random.Random(5).random() for _ in range(5000)]


class Ring:
    """A replay of K=2 tasks and N=3 environments in which row r contains the number r."""

    def __init__(self, capacity_rows: int):
        self.capacity_rows = capacity_rows
        self.rows = 0
        self.data = torch.full((2, capacity_rows, 3), -1)
        self.largest_export = 0

    def add(self, count: int) -> None:
        for _ in range(count):
            self.data[:, self.rows % self.capacity_rows] = self.rows
            self.rows += 1

    def export_rows(self, start, stop):
        self.largest_export = max(self.largest_export, stop - start)
        return {"data": self.data[:, torch.arange(start, stop) % self.capacity_rows]}

    def import_rows(self, start, tensors):
        length = tensors["data"].shape[1]
        self.data[:, torch.arange(start, start + length) % self.capacity_rows] = tensors["data"]


def same(a, b) -> bool:
    """Compare two states, NaN equal to NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def state_of(step: int) -> dict:
    """A training state whose values depend on the step."""
    return {
        "model": {"torso.weight": torch.full((3, 4), float(step)), "head/0.bias": torch.arange(3)},
        "optimizer": {"state": {"torso.weight": {"exp_avg": torch.ones(3) * step, "step": 7}}, "lr": 1e-4},
        "envs": {"episode": np.full((2, 3), step), "names": ["pong", "breakout"]},
        "random": {"state": 2**127 + step, "none": None},
        "step": step,
    }


def store_in(run: Path, keep: int = 2, with_replay: bool = False) -> CheckpointStore:
    """The checkpoint store of a run folder."""
    return CheckpointStore(run / "checkpoints", keep=keep, with_replay=with_replay)


def refuse_warning(line: str) -> None:
    """Fail the test: loading printed a warning."""
    raise AssertionError(line)


def go_on_saving(run: Path) -> None:
    """Save checkpoints until killed, like a training process. Every second step is saved twice."""
    ring, store = Ring(30), store_in(run, keep=2, with_replay=True)
    store.recover()
    try:
        step, _ = store.load("latest", warn=refuse_warning)
    except NoCheckpoint:
        step = 0
    else:
        store.discard_after(step)
        ring.rows = 7 * step
        assert store.load_replay(step, ring)
    while True:
        step += 1
        ring.add(7)
        for _ in range(1 + step % 2):
            store.save(step, state_of(step), replay=ring, score=SCORES[step])
