"""Multi-task network: torso, sharing structure and head in one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mtrl_cli.networks.heads import Head
from mtrl_cli.networks.per_task import Stacked, TaskOwned, parameter_counts
from mtrl_cli.networks.regularised import Dropout
from mtrl_cli.networks.sharing import Sharing


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters that all tasks share, and number of each task's own parameters."""

    shared: int
    per_task: list[int]

    @property
    def total(self) -> int:
        return self.shared + sum(self.per_task)


class MultiTaskNetwork(nn.Module):
    """Action values of all tasks in one forward pass.

    Args:
        sharing: observations to features.
        head: features to action values.
        observation_scale: divisor of observations (255 for image bytes).
        autocast: dtype of the torso, or None for float32. Heads always compute in float32.
    """

    def __init__(self, sharing: Sharing, head: Head, observation_scale: float, autocast: torch.dtype | None = None):
        super().__init__()
        self.sharing = sharing
        self.head = head
        self._scale = 1.0 / observation_scale
        self._autocast = autocast

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` (uint8 or float32) to action values `[K, B, A]` (float32), minus infinity for invalid actions.

        The values are on the learner's scale (see `agents/value_scale.py`), which keeps the order of a task's actions.
        """
        return self.head.values(self.outputs(observation))

    def outputs(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` to head outputs for every action: `[K, B, A]` or `[K, B, A, Z]` (float32)."""
        return self.head(self.features(observation))

    def features(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` (uint8 or float32) to features `[K, B, F]` (float32), the input of the heads."""
        features: torch.Tensor = self._in_precision(self.sharing, observation)
        return features.float()

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Routing weights of the sharing structure for observations `[K, B, ...]`: see `Sharing.routing`."""
        weights: dict[str, torch.Tensor] = self._in_precision(self.sharing.routing, observation)
        return weights

    def _in_precision(self, function: Callable[[torch.Tensor], Any], observation: torch.Tensor) -> Any:
        dtype = self._autocast or torch.float32
        with torch.autocast(observation.device.type, dtype=dtype, enabled=self._autocast is not None):
            return function(observation.to(dtype) * self._scale)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters in which the losses of several tasks may have a gradient."""
        own = {id(parameter) for parameter in self.own_parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in own]

    def own_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters whose rows belong to one task each (see `TaskOwned`)."""
        owned = [parameter for module in self.modules() if isinstance(module, TaskOwned) for parameter in module.parameters()]
        return list({id(parameter): parameter for parameter in owned if parameter.requires_grad}.values())

    @property
    def has_dropout(self) -> bool:
        """Whether a forward pass with gradients draws random numbers."""
        structures = [module.structure for module in self.modules() if isinstance(module, Stacked)]
        return any(isinstance(module, Dropout) for each in (self, *structures) for module in each.modules())

    def parameter_counts(self) -> ParameterCounts:
        return ParameterCounts(*parameter_counts(self, self.sharing.num_tasks))
