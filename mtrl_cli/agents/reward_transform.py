"""What agents have in common beside the network: settings by task, and rewards as the learner sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mtrl_cli.agents.epsilon import EpsilonSchedule
from mtrl_cli.agents.value_scale import ValueScale


class RewardTransform:
    """Rewards of all tasks as the learner sees them: each task's are multiplied by a factor, and then brought to the value scale.

    Args:
        scale: of the values.
        task_names: of the K tasks.
        reward_factors: of single tasks, by name.

    Raises:
        ValueError: reward_factors name no task of the run.
    """

    def __init__(self, scale: ValueScale, task_names: Sequence[str], reward_factors: Mapping[str, float]):
        _check_names("reward_factors", reward_factors, task_names)
        factors = [reward_factors.get(name, 1.0) for name in task_names]
        self.scale = scale
        self._factor_K = torch.tensor(factors, device=scale.mean_K.device) if reward_factors else None

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        """As `Agent.observe`."""
        self.scale.observe(reward_KN if self._factor_K is None else reward_KN * self._factor_K[:, None], done_KN)

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        """The game's own rewards (float32 `[K, B, n]`) on the learner's scale."""
        return self.scale.rewards(rewards_KBn if self._factor_K is None else rewards_KBn * self._factor_K[:, None, None])


def epsilon_schedule(task_names: Sequence[str], start: float, end: float, steps: int, tasks: Mapping[str, float]) -> EpsilonSchedule:
    """Every task's share of random actions; `tasks` are the ends of single ones, by name.

    Raises:
        ValueError: it names no task of the run.
    """
    _check_names("epsilon_tasks", tasks, task_names)
    return EpsilonSchedule(start, [tasks.get(name, end) for name in task_names], steps)


def _check_names(key: str, named: Iterable[str], task_names: Sequence[str]) -> None:
    if unknown := set(named) - set(task_names):
        raise ValueError(f"agent.{key} names {sorted(unknown)}; the tasks of this run are {list(task_names)}")
