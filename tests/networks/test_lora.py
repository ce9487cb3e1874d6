"""Low-rank adapters: zero at the start, then a product of matrices per task."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mtrl_cli.networks.lora import LowRank, add_adapters
from mtrl_cli.networks.parts import tagged
from mtrl_cli.networks.per_task import parameter_counts
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, NatureCNN, Torso
from tests.helpers.structures import STRUCTURES, VECTORS, counts, observations, structure

ONCE = ["film", "hard", "input_adapters", "mtan", "soft_modular", "task_embedding"]
"""Structures that run one torso for all tasks' samples."""


@pytest.mark.parametrize("name", STRUCTURES)
def test_adapters_start_as_identity_or_are_refused(name: str) -> None:
    sharing = structure(name, tagged(MLP(hidden=[8, 7, 5])), VECTORS)
    before, plain = sharing(observations(VECTORS)), copy.deepcopy(sharing.state_dict())
    if name not in ONCE:
        with pytest.raises(ValueError, match="needs one torso that all tasks share"):
            add_adapters(sharing, 2)
        return
    shared, own = counts(sharing)
    add_adapters(sharing, 2)
    assert torch.equal(sharing(observations(VECTORS)), before)
    assert set(plain) < set(sharing.state_dict())
    assert counts(sharing) == (shared, [each + 2 * (8 + 7) + 2 * (7 + 5) for each in own])


def test_adapter_of_linear_layer_adds_a_matrix_product_per_task() -> None:
    layer = nn.Linear(6, 4)
    adapter = LowRank(layer, 3, 2)
    nn.init.normal_(adapter.up)
    x = torch.randn(3, 5, 6)
    added = adapter(x.flatten(0, 1)).unflatten(0, (3, 5))
    for task in range(3):
        merged = layer.weight + adapter.up[task] @ adapter.down[task]
        assert torch.allclose(layer(x[task]) + added[task], nn.functional.linear(x[task], merged, layer.bias), atol=1e-5)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"dilation": 2}])
def test_adapter_of_convolution_equals_merged_low_rank_weight(options: dict[str, int]) -> None:
    layer = nn.Conv2d(3, 5, 3, **options)
    adapter = LowRank(layer, 2, 2)
    nn.init.normal_(adapter.up)
    x = torch.randn(2, 4, 3, 9, 9)
    added = adapter(x.flatten(0, 1)).unflatten(0, (2, 4))
    for task in range(2):
        merged = layer.weight + torch.einsum("or,rchw->ochw", adapter.up[task], adapter.down[task])
        expected = nn.functional.conv2d(x[task], merged, layer.bias, **options)  # type: ignore[arg-type]
        assert torch.allclose(layer(x[task]) + added[task], expected, atol=1e-5)


@pytest.mark.parametrize("torso", [NatureCNN(width=0.1, features=6), ImpalaCNN(width=0.2, features=6)])
def test_every_torso_layer_is_adapted_per_task(torso: Torso) -> None:
    sharing = structure("hard", tagged(torso), [(2, 36, 36)] * 2)
    layers = [module for module in sharing.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    add_adapters(sharing, 1)
    adapters = [module for module in sharing.modules() if isinstance(module, LowRank)]
    assert len(adapters) == len(layers)
    assert parameter_counts(sharing, 2)[1] == [sum(adapter.sizes[0] for adapter in adapters)] * 2
    seen = observations([(2, 36, 36)] * 2)
    before = sharing(seen)
    for adapter in adapters:
        nn.init.normal_(adapter.up.data[1])
    after = sharing(seen)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_adapters_need_a_shared_layer() -> None:
    with pytest.raises(ValueError, match="needs a shared layer in the torso, got none"):
        add_adapters(structure("hard", tagged(MLP(hidden=[8])), VECTORS), 2)
