"""Heads: from a task's features to its action values. Every task has a head of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.per_task import TaskLinear


class Head(nn.Module, ABC):
    """Features of all tasks to action values of all tasks.

    Args:
        num_features: length of a feature vector.
        num_actions: how many actions each task has; A is the largest.
    """

    invalid_KA: torch.Tensor

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__()
        actions = torch.arange(max(num_actions))
        self.register_buffer("invalid_KA", actions >= torch.tensor(num_actions)[:, None], persistent=False)

    @abstractmethod
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[K, B, F]` to action values `[K, B, A]` (float32); minus infinity for actions that a task does not have."""

    def parameter_counts(self) -> list[int]:
        """Each task's number of parameters."""
        layers = [module.sizes for module in self.modules() if isinstance(module, TaskLinear)]
        return [sum(sizes) for sizes in zip(*layers, strict=True)]

    def _mask(self, q_KBA: torch.Tensor) -> torch.Tensor:
        return q_KBA.masked_fill(self.invalid_KA[:, None], -torch.inf)


class PlainHead(Head):
    """One linear layer per task (Mnih et al. 2015)."""

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__(num_features, num_actions)
        self.linear = TaskLinear(num_features, num_actions)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self._mask(self.linear(features))


class DuelingHead(Head):
    """A state value and advantages per task (Wang et al. 2016, equation 9): Q = V + A - mean of A over the task's own actions."""

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__(num_features, num_actions)
        self.value = TaskLinear(num_features, [1] * len(num_actions))
        self.advantage = TaskLinear(num_features, num_actions)
        share = (~self.invalid_KA).float() / (~self.invalid_KA).sum(1, keepdim=True)
        self.register_buffer("share_KA1", share[..., None], persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        advantage_KBA = self.advantage(features)
        return self._mask(self.value(features) + advantage_KBA - advantage_KBA @ self.share_KA1)
