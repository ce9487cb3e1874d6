"""Sharing structures whose parameters are mixtures of a basis of parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from mtrl_cli.networks.experts import ALL_BLOCKS, encode, split_torso
from mtrl_cli.networks.per_task import Stacked, TaskVectors
from mtrl_cli.networks.sharing import Sharing
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class PaCo(Sharing):
    """Parameter-compositional sharing (Sun et al. 2022, "PaCo: Parameter-Compositional Multi-Task Reinforcement Learning", figure 2).

    All parameters of a task's torso are a mixture of a shared basis, with weights of the task: theta = Phi w. As in the configuration of
    the official code, weights are unconstrained and all sets of the basis are equal at the start. Differences:

    - The first weights of a task are random with sum one, so every task starts with a freshly initialised torso.
    - Parameters of normalisation layers are mixed like all others, as in the paper's formula; the official layers share them.
    - The head of a task is not mixed.
    - A task's weights are not reset when its loss explodes.

    If all tasks have one observation shape, the whole torso is mixed, else the body.

    Args:
        bases: number of parameter sets; 5 in the official configuration for 10 tasks.

    Raises:
        ValueError: the torso has spectral normalisation, which needs a norm per mixture.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, bases: PositiveInt = 5):
        super().__init__(torso, shapes)
        split = split_torso(torso, shapes, least=ALL_BLOCKS)
        first = split.expert()
        self.stem = split.stem
        self.basis = Stacked([copy.deepcopy(first) for _ in range(bases)])
        if self.basis.spectral:
            raise ValueError(
                "network.spectral_norm=true is not supported by network/sharing=paco, which mixes weights in every forward pass: "
                "choose another structure, or use network.layer_norm=true"
            )
        weight_KM = torch.randn(self.num_tasks, bases)
        self.weights = TaskVectors(weight_KM + (1 - weight_KM.sum(1, keepdim=True)) / bases)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.basis.mixed(encode(self.stem, observation), self.weights())

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Share of each basis in a task's weights, by absolute value."""
        size_KM = self.weights().abs()
        return {"bases": size_KM / size_KM.sum(1, keepdim=True)}
