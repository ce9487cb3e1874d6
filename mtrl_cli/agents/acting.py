"""Epsilon-greedy actions with an epsilon per task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mtrl_cli.machine import rng
from mtrl_cli.networks.network import MultiTaskNetwork


class EpsilonGreedy:
    """Epsilon-greedy actions for K x N environments. Invalid actions are never chosen.

    Args:
        network: action values, minus infinity for invalid actions.
        num_actions: number of actions of each task.
        device: of the network.
        seed: of the exploration.
    """

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
            epsilon_K: float32 `[K]`, share of random actions.

        Returns:
            int64 `[K, N]` and float32 `[K, N]`, in units of the network.
        """
        value_KN, greedy_KN = self._network(observation.flatten(2, 3)).max(-1)
        draw_2KN = torch.rand((2, *greedy_KN.shape), generator=self._generator, device=observation.device)
        random_KN = (draw_2KN[0] * self._num_actions_K1).long().clamp_max(self._num_actions_K1 - 1)
        return torch.where(draw_2KN[1] < epsilon_K[:, None], random_KN, greedy_KN), value_KN

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        rng.restore(self._generator, state["generator"])
