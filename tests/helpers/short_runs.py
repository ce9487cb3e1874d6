"""Overrides of the shortest run that still learns, for tests over many components."""

from __future__ import annotations

SMALL = [
    "env=classic_pack",
    "env.num_envs=4",
    "steps_per_task=240",
    "agent.learning_starts=40",
    "agent.batch_size=16",
    "agent.samples_per_step=2",
    "network.hidden=[16,16]",
    "eval.every=0",
    "eval.episodes=1",
    "eval.max_steps=5",
    "eval.test_episodes=0",
    "checkpoint.every=120",
    "log.every=80",
    "device=cpu",
]
