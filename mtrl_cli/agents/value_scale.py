"""How the scales of tasks' rewards are kept apart. Only the learner sees it: reports show the game's own score."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from mtrl_cli.fields import PositiveFloat


class ValueScale(ABC):
    """Rewards as the learner sees them."""

    @abstractmethod
    def rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """The game's own rewards (float32, any shape) on the learner's scale."""


class NoValueScale(ValueScale):
    """Rewards as they are."""

    def rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        return rewards


class ClipRewards(ValueScale):
    """Rewards clipped to [-limit, limit] (Mnih et al. 2015, Methods).

    Args:
        limit: the largest reward that counts in full.
    """

    def __init__(self, *, limit: PositiveFloat = 1.0):
        self._limit = limit

    def rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        return rewards.clamp(-self._limit, self._limit)
