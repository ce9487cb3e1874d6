"""Sharing structures whose parameters are mixtures of a basis of parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.experts import WHOLE, parts_of, stemmed
from mtrl_cli.networks.per_task import Stacked, TaskVectors
from mtrl_cli.networks.sharing import Sharing
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class Composed(Stacked):
    """Modules of which none is evaluated itself: mixtures of their parameters are.

    Raises:
        ValueError: a layer of spectral norm one, whose norm would be known of none of the mixtures.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__(modules)
        if self.spectral:
            raise ValueError(
                "network.spectral_norm=true does not go with network/sharing=paco, which mixes a layer's weights anew in every forward: "
                "choose another structure, or network.layer_norm"
            )

    def mixed(self, x_KB: torch.Tensor, weight_KM: torch.Tensor) -> torch.Tensor:
        """Inputs `[K, B, ...]` through K modules, each with its mixture of the M sets of parameters, in the dtype of the inputs."""
        # In float32, as parameters are kept: autocast would mix rounded ones.
        with torch.autocast(x_KB.device.type, enabled=False):
            parameters = {
                name: _mixture(weight_KM, parameter).to(x_KB.dtype) for name, parameter in self._parameters_in(torch.float32).items()
            }
        return self._call_each(parameters, x_KB, len(weight_KM))


def _mixture(weight_KM: torch.Tensor, parameter_M: torch.Tensor) -> torch.Tensor:
    return (weight_KM @ parameter_M.flatten(1)).unflatten(1, parameter_M.shape[1:])


class PaCo(Sharing):
    """Parameter-compositional sharing (Sun et al. 2022, "PaCo: Parameter-Compositional Multi-Task Reinforcement Learning", figure 2):
    all parameters of a task's torso are a mixture of a basis that tasks share, with weights of the task's own: theta = Phi w.

    As in the official code's configuration the weights are any numbers, and all sets of the basis start out equal. Here a
    task's first weights are random with sum one, so that every task starts with a freshly initialised torso. Normalisation's
    parameters are mixed like all others (the paper's formula; the official layers share them). The head is a task's own and not mixed, and
    training is not interrupted to reset a task's weights when its loss explodes, as the paper does.
    A whole torso is mixed where tasks observe one shape, else its body.

    Args:
        bases: how many sets of parameters; 5 in the official configuration for 10 tasks.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, bases: PositiveInt = 5):
        super().__init__(torso, shapes)
        parts = parts_of(torso, shapes, least=WHOLE)
        first = nn.Sequential(*parts.blocks())
        self.stem, self.basis = parts.stem, Composed([copy.deepcopy(first) for _ in range(bases)])
        weight_KM = torch.randn(self.num_tasks, bases)
        self.weights = TaskVectors(weight_KM + (1 - weight_KM.sum(1, keepdim=True)) / bases)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.basis.mixed(stemmed(self.stem, observation), self.weights())

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each basis' share in a task's weights, by absolute value."""
        size_KM = self.weights().abs()
        return {"bases": size_KM / size_KM.sum(1, keepdim=True)}
