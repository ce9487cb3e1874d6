"""Sharing structures: which parts of a torso tasks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.per_task import PerTask
from mtrl_cli.networks.torsos import Torso


class Sharing(nn.Module, ABC):
    """Observations of all tasks to features of all tasks, in one forward.

    Args:
        torso: the recipe of the parts.
        shapes: each task's own observation shape (frames stacked), before padding.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.num_features = torso.num_features
        self.num_tasks = len(shapes)

    @abstractmethod
    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, *padded shape]` (float) to features `[K, B, num_features]`."""

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where the structure chooses between parts: by name, how each task's samples are spread over the choices, `[K, choices]`.

        Each row sums to 1. Observations are those of `forward`.
        """
        return {}

    @abstractmethod
    def parameter_counts(self) -> tuple[int, list[int]]:
        """Numbers of parameters: those shared by all tasks, and those of each task alone."""


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class HardSharing(Sharing):
    """One torso for all tasks (Caruana 1997). Where tasks differ in observation shape, each has a stem of its own."""

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self._same_shape = len(set(shapes)) == 1
        self.stem = torso.stem(shapes[0]) if self._same_shape else PerTask([torso.stem(shape) for shape in shapes])
        self.body = torso.body(shapes[0])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        stemmed = self.stem(observation.flatten(0, 1)) if self._same_shape else self.stem(observation).flatten(0, 1)
        return self.body(stemmed).unflatten(0, (self.num_tasks, -1))

    def parameter_counts(self) -> tuple[int, list[int]]:
        if isinstance(self.stem, PerTask):
            return _count(self.body), list(self.stem.sizes)
        return _count(self.body) + _count(self.stem), [0] * self.num_tasks


class IndependentSharing(Sharing):
    """Nothing is shared: a torso per task. The baseline that sharing is judged against."""

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.torsos = PerTask([nn.Sequential(torso.stem(shape), torso.body(shape)) for shape in shapes])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.torsos(observation)

    def parameter_counts(self) -> tuple[int, list[int]]:
        return 0, list(self.torsos.sizes)
