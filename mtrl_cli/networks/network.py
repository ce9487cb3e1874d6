"""The multi-task network: a torso, a sharing structure and a head made one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mtrl_cli.networks.heads import Head
from mtrl_cli.networks.per_task import Stacked, TaskOwned
from mtrl_cli.networks.regularised import Dropout
from mtrl_cli.networks.sharing import Sharing


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: those that all tasks share, and those of each task alone."""

    shared: int
    per_task: list[int]

    @property
    def total(self) -> int:
        return self.shared + sum(self.per_task)


class MultiTaskNetwork(nn.Module):
    """Action values of all tasks in one forward.

    Args:
        sharing: observations to features.
        head: features to action values.
        observation_scale: what observations are divided by (255 for bytes of an image).
        autocast: the dtype in which the torso computes, or None for float32. Heads always compute in float32.
    """

    def __init__(self, sharing: Sharing, head: Head, observation_scale: float, autocast: torch.dtype | None = None):
        super().__init__()
        self.sharing = sharing
        self.head = head
        self._scale = 1.0 / observation_scale
        self._autocast = autocast

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` (uint8 or float32) to action values `[K, B, A]` (float32), minus infinity where invalid.

        They are on the learner's scale (see `agents/value_scale.py`), in which the order of a task's actions is that of its own.
        """
        return self.head.values(self.outputs(observation))

    def outputs(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` to what the head says of every action: `[K, B, A]`, or `[K, B, A, Z]` (float32)."""
        return self.head(self.features(observation))

    def features(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` (uint8 or float32) to what heads read: features `[K, B, F]` (float32)."""
        features: torch.Tensor = self._in_precision(self.sharing, observation)
        return features.float()

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """How the sharing structure distributes each task over its choices for observations `[K, B, ...]`: see `Sharing.routing`."""
        found: dict[str, torch.Tensor] = self._in_precision(self.sharing.routing, observation)
        return found

    def _in_precision(self, function: Callable[[torch.Tensor], Any], observation: torch.Tensor) -> Any:
        dtype = self._autocast or torch.float32
        with torch.autocast(observation.device.type, dtype=dtype, enabled=self._autocast is not None):
            return function(observation.to(dtype) * self._scale)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Those that several tasks' losses may reach, as far as they are trained."""
        own = {id(parameter) for parameter in self.own_parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in own]

    def own_parameters(self) -> list[nn.Parameter]:
        """Those whose rows belong to one task each (see `TaskOwned`), as far as they are trained."""
        owned = [parameter for module in self.modules() if isinstance(module, TaskOwned) for parameter in module.parameters()]
        return list({id(parameter): parameter for parameter in owned if parameter.requires_grad}.values())

    @property
    def has_dropout(self) -> bool:
        """Whether a forward with gradients draws at random."""
        structures = [module.structure for module in self.modules() if isinstance(module, Stacked)]
        return any(isinstance(module, Dropout) for each in (self, *structures) for module in each.modules())

    def parameter_counts(self) -> ParameterCounts:
        shared, torsos = self.sharing.parameter_counts()
        return ParameterCounts(shared, [torso + head for torso, head in zip(torsos, self.head.parameter_counts(), strict=True)])
