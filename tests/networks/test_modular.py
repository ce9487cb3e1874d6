"""Soft modularization, against a loop over its modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtrl_cli.networks.modular import SoftModularization
from mtrl_cli.networks.torsos import MLP, MinAtarCNN, Torso
from tests.helpers.structures import IMAGES, VECTORS, Shapes, counts, observations, stem_of_task


def modular(torso: Torso, shapes: Shapes, layers: int, modules: int) -> SoftModularization:
    return SoftModularization(torso, shapes, num_layers=layers, num_modules=modules, module_size=4, routing_size=7)


def with_uneven_routing(sharing: nn.Module) -> None:
    """Set parameters for clearly uneven routing."""
    with torch.no_grad():
        for parameter in sharing.get_submodule("routing_logits").parameters():
            parameter.normal_()


def by_hand(sharing: SoftModularization, encoded: torch.Tensor, vector: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features of one observation and the routing weights: `[modules, modules before]` per layer, `[modules]` for the last."""
    number, layers = sharing.layers[0].get_parameter("stacked.weight").shape[0], len(sharing.layers)
    first, second = sharing.routing_base[1], sharing.routing_base[3]
    base = second(first((encoded * vector).relu()).relu())
    weights: list[torch.Tensor] = []
    for layer in range(layers):
        earlier = torch.cat([each.flatten() for each in weights]) if weights else None
        state = base if earlier is None else sharing.routing_conditions[layer - 1](earlier) * base
        logits = sharing.routing_logits[layer](state.relu())
        rows = logits.split(number)
        weights.append(torch.stack([row.exp() / row.exp().sum() for row in rows]) if layer < layers - 1 else logits.softmax(0))

    def module(layer: int, index: int, x: torch.Tensor) -> torch.Tensor:
        stacked = sharing.layers[layer]
        return stacked.get_parameter("stacked.weight")[index] @ x + stacked.get_parameter("stacked.bias")[index]

    outputs = [module(0, index, encoded) for index in range(number)]
    for layer in range(1, layers):
        inputs = [sum((weights[layer - 1][i, j] * outputs[j] for j in range(number)), torch.zeros(())).relu() for i in range(number)]
        outputs = [module(layer, index, each) for index, each in enumerate(inputs)]
    return sum((weights[-1][j] * outputs[j] for j in range(number)), torch.zeros(())).relu(), weights


@pytest.mark.parametrize(("layers", "modules"), [(2, 2), (4, 3), (3, 1)])
@pytest.mark.parametrize(("torso", "shapes"), [(MLP(hidden=[8, 5]), VECTORS), (MinAtarCNN(channels=3, features=5), [IMAGES[0]] * 3)])
def test_soft_modularization_equals_walk_through_modules(torso: Torso, shapes: Shapes, layers: int, modules: int) -> None:
    sharing, observation = modular(torso, shapes, layers, modules), observations(shapes)
    with_uneven_routing(sharing)
    features, routing = sharing(observation), sharing.routing(observation)
    assert set(routing) == {f"layer{layer}/module{module}" for layer in range(2, layers + 1) for module in range(1, modules + 1)} | {
        "output"
    }
    for task, shape in enumerate(shapes):
        encoded = sharing.body(stem_of_task(sharing, torso, shapes, task)(observation[task, :, : shape[0]]))
        done = [by_hand(sharing, each, sharing.embedding.vectors[task]) for each in encoded]
        assert torch.allclose(features[task], torch.stack([each for each, _ in done]), atol=1e-5)
        for layer in range(layers - 1):
            mean = torch.stack([weights[layer] for _, weights in done]).mean(0)
            for module in range(modules):
                assert torch.allclose(routing[f"layer{layer + 2}/module{module + 1}"][task], mean[module], atol=1e-5)
        assert torch.allclose(routing["output"][task], torch.stack([weights[-1] for _, weights in done]).mean(0), atol=1e-5)


def test_routing_depends_on_the_task_and_on_the_state() -> None:
    torch.manual_seed(0)
    sharing = SoftModularization(MLP(hidden=[32, 32]), [(4,)] * 2, num_layers=3, num_modules=3, module_size=4, routing_size=32)
    with_uneven_routing(sharing)
    same = torch.randn(1, 6, 4).expand(2, -1, -1)
    here, there = sharing.routing(same), sharing.routing(same + 1)
    for name, where in here.items():
        assert not torch.allclose(where[0], where[1]), name
        assert not torch.allclose(where, there[name]), name


def test_routing_starts_nearly_uniform() -> None:
    routing = modular(MLP(hidden=[8, 5]), VECTORS, 3, 4).routing(observations(VECTORS))
    for where in routing.values():
        assert torch.allclose(where, torch.full((3, 4), 0.25), atol=0.01)


def test_soft_modularization_parameter_counts() -> None:
    """2 layers of 3 modules of 4 units on 5 features, a routing network of 7 units, and a vector of 5 per task."""
    body = 8 * 5 + 5
    modules = 3 * (5 * 4 + 4) + 3 * (4 * 4 + 4)
    routing = (5 * 7 + 7) + (7 * 7 + 7) + (7 * 9 + 9) + (9 * 7 + 7) + (7 * 3 + 3)
    sharing = modular(MLP(hidden=[8, 5]), VECTORS, 2, 3)
    assert counts(sharing) == (body + modules + routing, [40 + 5, 56 + 5, 24 + 5])
    assert sharing.num_features == 4
    third = 3 * (4 * 4 + 4) + (18 * 7 + 7) + (7 * 9 + 9)
    assert counts(modular(MLP(hidden=[8, 5]), VECTORS, 3, 3))[0] == body + modules + routing + third


def test_single_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"network\.sharing\.num_layers must be at least 2, got 1"):
        modular(MLP(hidden=[8, 5]), VECTORS, 1, 2)
