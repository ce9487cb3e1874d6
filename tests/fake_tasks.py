"""What a weighting and a value scale are told of a run, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtrl_cli.agents.value_scale import RewardStream
from mtrl_cli.task_weights.base import Tasks


def tasks_of(names: Sequence[str], seed: int = 0) -> Tasks:
    """Tasks of these names, with random play at 0 and the reference at 10, 20, 30, ..."""
    references = tuple(10.0 * (index + 1) for index in range(len(names)))
    return Tasks(tuple(names), (0.0,) * len(names), references, seed, torch.device("cpu"))


def stream_of(names: Sequence[str], num_envs: int = 2, gamma: float = 0.9) -> RewardStream:
    """Rewards of tasks of these names."""
    return RewardStream(len(names), num_envs, gamma, torch.device("cpu"))
