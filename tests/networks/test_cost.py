"""Multiply-adds of a forward pass, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from mtrl_cli.networks.cost import multiply_adds
from mtrl_cli.networks.heads import DuelingHead, Head, PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing, IndependentSharing, Sharing
from mtrl_cli.networks.torsos import MLP, NatureCNN, Torso
from tests.helpers.structures import Shapes

# Outputs times inputs of each layer: convolutions at 20x20, 9x9 and 7x7 positions, then 7*7*64 inputs to 512.
NATURE = 20 * 20 * 32 * (4 * 8 * 8) + 9 * 9 * 64 * (32 * 4 * 4) + 7 * 7 * 64 * (64 * 3 * 3) + 512 * (7 * 7 * 64)


def cost(torso: Torso, sharing: type[Sharing], head: type[Head], shapes: Shapes, actions: list[int], device: str = "meta") -> int:
    padded = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    with torch.device(device):
        network = MultiTaskNetwork(sharing(torso, shapes), head(torso.num_features, actions), 1.0)
    return multiply_adds(network, padded)


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("sharing", [HardSharing, IndependentSharing])
def test_nature_multiply_adds(sharing: type[Sharing], tasks: int) -> None:
    assert NATURE == 9_342_976
    assert cost(NatureCNN(), sharing, PlainHead, [(4, 84, 84)] * tasks, [6] * tasks) == NATURE + 512 * 6


@pytest.mark.parametrize("sharing", [HardSharing, IndependentSharing])
def test_padding_of_mlp_and_heads_is_counted(sharing: type[Sharing]) -> None:
    shapes: Shapes = [(4,), (6,), (2,)]
    assert cost(MLP(hidden=[20, 30]), sharing, PlainHead, shapes, [2, 5, 3]) == 6 * 20 + 20 * 30 + 30 * 5
    # Value, advantages, and the mean over them.
    assert cost(MLP(hidden=[20, 30]), sharing, DuelingHead, shapes, [2, 5, 3]) == 6 * 20 + 20 * 30 + 30 * (1 + 5) + 5


def test_cost_is_the_same_on_any_device() -> None:
    for device in ("cpu", "meta"):
        assert cost(NatureCNN(width=0.1, features=8), IndependentSharing, PlainHead, [(4, 40, 40)] * 2, [3, 2], device) == (
            9 * 9 * 3 * 256 + 3 * 3 * 6 * (3 * 16) + 6 * (6 * 9) + 8 * 6 + 8 * 3
        )
