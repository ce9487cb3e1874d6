"""Overrides of runs that take a few seconds, and the results of such runs on disk."""

from __future__ import annotations

import json
from pathlib import Path

TINY = [
    "env=classic_pack",
    "steps_per_task=600",
    "agent.learning_starts=100",
    "agent.batch_size=16",
    "agent.samples_per_step=2",
    "network.hidden=[16,16]",
    "eval.every=300",
    "eval.episodes=2",
    "eval.max_steps=40",
    "checkpoint.every=200",
    "log.every=100",
    "device=cpu",
]
STOPS = [*TINY, "eval.every=200", "early_stopping.metric=eval/score/iqm", "early_stopping.patience=1", "early_stopping.min_delta=10"]
"""A run that stops after its second evaluation."""

TASKS = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


CLASSIC = [
    "env=classic_pack",
    "agent.learning_starts=100",
    "agent.batch_size=16",
    "agent.samples_per_step=2",
    "network.hidden=[16,16]",
    "steps_per_task=1600",
    "eval.every=800",
    "eval.episodes=2",
    "eval.max_steps=30",
    "checkpoint.every=160",
    "log.every=80",
    "log.diagnostics=400",
    "device=cpu",
    "replay.capacity=1200",
]


def model(run: Path) -> bytes:
    step = (run / "checkpoints" / "latest").read_text().strip()
    return (run / "checkpoints" / step / "model.safetensors").read_bytes()


def learning_rows(run: Path) -> list[dict[str, float]]:
    """Return the rows of metrics without values that depend on time."""
    return [{name: value for name, value in row.items() if not name.startswith(("perf/", "seconds"))} for row in rows(run)]
