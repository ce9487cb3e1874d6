"""Torsos and shapes for tests of expert-based structures."""

from __future__ import annotations

import torch
from torch import nn

from mtrl_cli.networks.per_task import Stacked
from mtrl_cli.networks.sharing import Sharing
from mtrl_cli.networks.torsos import MLP, MinAtarCNN, NatureCNN, Torso
from tests.helpers.structures import IMAGES, VECTORS, Shapes, stem_of_task

SAME, SAME_IMAGES = [(4,)] * 3, [(4, 10, 10)] * 3
CASES = [
    (MLP(hidden=[8, 6]), VECTORS),
    (MLP(hidden=[8, 7, 6], layer_norm=True), VECTORS),
    (MLP(hidden=[8, 6]), SAME),
    (MLP(hidden=[6], layer_norm=True), SAME),
    (MinAtarCNN(channels=3, features=6), IMAGES),
    (MinAtarCNN(channels=3, features=6, layer_norm=True), SAME_IMAGES),
    (NatureCNN(features=6, width=0.1), [(2, 44, 40), (3, 44, 40)]),
]


def row(stacked: Stacked, index: int, module: nn.Module) -> nn.Module:
    """Copy one of the stacked modules' parameters into `module`, which has the same layers in the same order."""
    names = sorted(name for name, _ in module.named_parameters())
    with torch.no_grad():
        for name, stacked_name in zip(names, sorted(stacked.stacked), strict=True):
            parameter = module.get_parameter(name)
            parameter.copy_(stacked.stacked[stacked_name][index][tuple(slice(size) for size in parameter.shape)])
    return module


def read_by_experts(sharing: Sharing, torso: Torso, shapes: Shapes, task: int, x: torch.Tensor) -> torch.Tensor:
    """Pass one sample `[1, ...]` through its task's stem, unless the stem is part of the experts."""
    return stem_of_task(sharing, torso, shapes, task)(x[:, : shapes[task][0]])
