"""Epsilon-greedy actions with an epsilon per task, and the schedule of epsilon."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mtrl_cli.machine.saved import Saved
from mtrl_cli.networks.network import MultiTaskNetwork


class EpsilonSchedule:
    """Probability of a random action in each task: linear from `start` to the final value of the task over `steps`, then constant.

    Args:
        start: epsilon at step 0.
        ends: final epsilon of each task, `[K]`.
        steps: length of the linear part, in steps per task; 0: the final values from the start.
    """

    def __init__(self, start: float, ends: Sequence[float], steps: int):
        self._start = start
        self._ends = np.asarray(ends, dtype=np.float32)
        self._steps = steps

    def __call__(self, step: int) -> np.ndarray:
        """Return epsilon of each task at a step, float32 `[K]`."""
        progress = min(1.0, step / self._steps) if self._steps else 1.0
        return ((1 - progress) * self._start + progress * self._ends).astype(np.float32)


class EpsilonGreedy(Saved):
    """Epsilon-greedy actions for K x N environments. Invalid actions are never chosen.

    Args:
        network: network that returns action values, minus infinity for invalid actions.
        num_actions: number of actions of each task.
        device: device of the network.
        seed: seed of the exploration.
    """

    saved = ("_generator",)

    def __init__(self, network: MultiTaskNetwork, num_actions: Sequence[int], device: torch.device, seed: int):
        self._network = network
        self._num_actions_K1 = torch.tensor(num_actions, device=device)[:, None]
        self._generator = torch.Generator(device).manual_seed(seed)

    def act(self, observation: torch.Tensor, epsilon_K: np.ndarray) -> torch.Tensor:
        """Choose actions int64 `[K, N]` for observations `[K, N, S, *frame]`; epsilon is float32 `[K]`."""
        return self.choose(observation, torch.as_tensor(epsilon_K, device=observation.device))[0]

    @torch.no_grad()
    def choose(self, observation: torch.Tensor, epsilon_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose actions, and return them with the values of the best actions.

        Args:
            observation: `[K, N, S, *frame]`.
            epsilon_K: float32 `[K]`, probability of a random action.

        Returns:
            int64 `[K, N]` and float32 `[K, N]`, in units of the network.
        """
        value_KN, greedy_KN = self._network(observation.flatten(2, 3)).max(-1)
        draw_2KN = torch.rand((2, *greedy_KN.shape), generator=self._generator, device=observation.device)
        random_KN = (draw_2KN[0] * self._num_actions_K1).long().clamp_max(self._num_actions_K1 - 1)
        return torch.where(draw_2KN[1] < epsilon_K[:, None], random_KN, greedy_KN), value_KN
