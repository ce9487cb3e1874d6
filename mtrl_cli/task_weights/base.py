"""How the losses of tasks become one gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch


class TaskWeights(ABC):
    """Losses of all tasks to gradients of all parameters."""

    @abstractmethod
    def backward(self, loss_K: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        """Add the weighted gradient to each parameter's `grad`.

        Args:
            loss_K: float32 `[K]`, each task's mean loss.
            parameters: those to be trained.

        Returns:
            The weights used, float32 `[K]`, detached.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the weights have learned so far."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
