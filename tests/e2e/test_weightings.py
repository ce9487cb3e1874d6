"""Every weighting trains and resumes exactly, through the command's entry point (structures: test_sharing_structures.py)."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from tests.helpers.command import MtrlHere
from tests.helpers.fake_tasks import ALL_WEIGHTS
from tests.helpers.short_runs import SMALL
from tests.helpers.tiny_runs import TASKS

KEYS = {
    "static": ["task_weights.weights={CartPole-v1: 2, MountainCar-v0: 0.5}"],
    "dwa": ["task_weights.epoch=5"],
    "nash_mtl": ["task_weights.every=5"],
}


@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_every_weighting_trains_and_resumes_exactly(name: str, here: MtrlHere) -> None:
    here("train", *SMALL, f"task_weights={name}", *KEYS.get(name, []), "run_dir=run")
    rows = [json.loads(line) for line in (here.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "grad/norm" in row][-1]
    assert last["step"] == 240
    assert last["updates"] == (240 - 4 - 40) * 2 // 16
    assert all(math.isfinite(value) for row in rows for value in row.values())
    weights = [last[f"weight/{task}"] for task in TASKS]
    if name in ("uniform", "score_gap"):  # after so few steps every task scores like random play, so every gap is 1
        assert weights == pytest.approx([1 / 3] * 3, abs=0.01)
    else:
        assert max(weights) - min(weights) > 1e-4
    last_checkpoint = here.folder / "run" / "checkpoints" / "240"
    before = [(last_checkpoint / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")]
    shutil.rmtree(last_checkpoint)  # as after a kill before the checkpoint
    assert "resuming from step 120" in here("resume", "run").stdout
    assert [(last_checkpoint / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")] == before
