"""Choosing actions: greedy, or at random with a probability per task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mtrl_cli import generators
from mtrl_cli.networks.network import MultiTaskNetwork


class EpsilonGreedy:
    """Actions for K x N environments; never one that a task does not have.

    Args:
        network: action values, minus infinity where invalid.
        num_actions: each task's number of actions.
        device: where the network is.
        seed: of the exploration.

    Attributes:
        value_KN: float32 `[K, N]`, the best values of the observations that were last acted on, as the network gives them.
    """

    value_KN: torch.Tensor

    def __init__(self, network: MultiTaskNetwork, num_actions: Sequence[int], device: torch.device, seed: int):
        self._network = network
        self._num_actions_K1 = torch.tensor(num_actions, device=device)[:, None]
        self._generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def act(self, observation: torch.Tensor, epsilon_K: np.ndarray) -> torch.Tensor:
        """Actions int64 `[K, N]` for observations `[K, N, S, *frame]`; epsilon is float32 `[K]`."""
        q_KNA = self._network(observation.flatten(2, 3))
        greedy_KN = q_KNA.argmax(-1)
        self.value_KN = q_KNA.gather(-1, greedy_KN[..., None]).squeeze(-1)
        draw_2KN = torch.rand((2, *greedy_KN.shape), generator=self._generator, device=observation.device)
        random_KN = (draw_2KN[0] * self._num_actions_K1).long().clamp_max(self._num_actions_K1 - 1)
        explore_KN = draw_2KN[1] < torch.as_tensor(epsilon_K, device=observation.device)[:, None]
        return torch.where(explore_KN, random_KN, greedy_KN)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        generators.restore(self._generator, state["generator"])
