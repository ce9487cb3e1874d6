"""Reward factors and value scale of an agent, and its epsilon schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mtrl_cli.agents.epsilon import EpsilonSchedule
from mtrl_cli.agents.value_scale import ValueScale


class RewardTransform:
    """Rewards that the agent learns from: the environment's rewards, multiplied by a factor per task and then scaled.

    Args:
        scale: of rewards and values.
        task_names: of the K tasks.
        reward_factors: factors of single tasks, by name.

    Raises:
        ValueError: reward_factors names an unknown task.
    """

    def __init__(self, scale: ValueScale, task_names: Sequence[str], reward_factors: Mapping[str, float]):
        _check_names("reward_factors", reward_factors, task_names)
        factors = [reward_factors.get(name, 1.0) for name in task_names]
        self.scale = scale
        self._factor_K = torch.tensor(factors, device=scale.mean_K.device) if reward_factors else None

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        """Update the statistics of the scale (see `Agent.observe`)."""
        self.scale.observe(reward_KN if self._factor_K is None else reward_KN * self._factor_K[:, None], done_KN)

    def __call__(self, rewards: torch.Tensor) -> torch.Tensor:
        """Scale rewards, float32 `[K, ..., ...]`."""
        return self.scale.rewards(rewards if self._factor_K is None else rewards * self._factor_K[:, None, None])


def epsilon_schedule(task_names: Sequence[str], start: float, end: float, steps: int, tasks: Mapping[str, float]) -> EpsilonSchedule:
    """Build an epsilon schedule; `tasks` holds final values of single tasks, by name.

    Raises:
        ValueError: epsilon_tasks names an unknown task.
    """
    _check_names("epsilon_tasks", tasks, task_names)
    return EpsilonSchedule(start, [tasks.get(name, end) for name in task_names], steps)


def _check_names(key: str, named: Iterable[str], task_names: Sequence[str]) -> None:
    if unknown := set(named) - set(task_names):
        raise ValueError(f"agent.{key} names {sorted(unknown)}; the tasks of this run are {list(task_names)}")
