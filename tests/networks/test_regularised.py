"""Dropout and spectral normalisation: known answers, and all sharing structures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mtrl_cli.networks.heads import DuelingHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import tagged
from mtrl_cli.networks.per_task import PerTask, spectral_layers
from mtrl_cli.networks.regularised import Dropout, SpectralLinear, dropout_generator, power_step
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, NatureCNN, Torso
from mtrl_cli.task_weights.tape import tape_for
from tests.helpers.structures import STRUCTURES, Shapes, observations, structure

CPU = torch.device("cpu")
SHAPES: Shapes = [(4,)] * 3


def torsos(**options: object) -> list[tuple[Torso, Shapes]]:
    """All torsos."""
    return [
        (MLP(hidden=[8, 6], **options), [(4,), (6,), (2,)]),  # type: ignore[arg-type]
        (MLP(hidden=[8], **options), SHAPES),  # type: ignore[arg-type]
        (MinAtarCNN(channels=3, features=6, **options), [(4, 10, 10)] * 2),  # type: ignore[arg-type]
        (NatureCNN(width=0.1, features=6, **options), [(4, 36, 36)] * 2),  # type: ignore[arg-type]
        (ImpalaCNN(width=0.2, features=6, **options), [(4, 9, 9)] * 2),  # type: ignore[arg-type]
    ]


def network_of(name: str, torso: Torso, shapes: Shapes) -> MultiTaskNetwork:
    sharing = structure(name, tagged(torso), shapes)
    return MultiTaskNetwork(sharing, DuelingHead(sharing.num_features, [2] * len(shapes)), 1.0)


# -- dropout ------------------------------------------------------------------------------------------------------------------


def test_dropout_zeroes_a_share_and_scales_the_rest() -> None:
    """A share of the values is zero; the others are scaled by 1 / (1 - share), and only these have gradients."""
    generator = dropout_generator(CPU, 3)
    x = torch.ones(200, 50, requires_grad=True)
    y = Dropout(0.25)(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    state = generator.get_state()
    with torch.no_grad():
        assert torch.equal(Dropout(0.25)(x), x)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(("torso", "shapes"), torsos(dropout=0.4))
@pytest.mark.parametrize("name", STRUCTURES)
def test_dropout_is_active_only_with_gradients(name: str, torso: Torso, shapes: Shapes) -> None:
    network, observation = network_of(name, torso, shapes), observations(shapes)
    assert network.has_dropout
    with torch.no_grad():
        assert torch.equal(network(observation), network(observation))
    generator = dropout_generator(CPU, 1)
    first, second = network(observation), network(observation)
    assert not torch.equal(first, second)
    generator.manual_seed(1)
    assert torch.equal(network(observation), first)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_stacked_modules_and_samples_have_separate_dropout(one_by_one: bool) -> None:
    stacked = PerTask([nn.Sequential(nn.Identity(), nn.Linear(1, 64), Dropout(0.5)) for _ in range(2)])
    stacked.one_by_one = one_by_one
    for parameter in stacked.parameters():
        nn.init.ones_(parameter)
    dropped = stacked(torch.ones(2, 3, 1)) == 0
    assert len({str(row.tolist()) for row in dropped.flatten(0, 1)}) == 6


def test_disabled_regularisation_does_not_change_the_network() -> None:
    for (plain, shapes), (with_keys, _) in zip(torsos(), torsos(dropout=0.0, spectral_norm=False), strict=True):
        torch.manual_seed(0)
        one = network_of("hard", plain, shapes)
        torch.manual_seed(0)
        other = network_of("hard", with_keys, shapes)
        assert [str(module) for module in one.modules()] == [str(module) for module in other.modules()]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), other.parameters(), strict=True))
        assert not one.has_dropout
        assert not spectral_layers(one)


def test_tape_supports_dropout_and_keeps_the_generator_state() -> None:
    network = network_of("hard", MLP(hidden=[8, 6], layer_norm=True, dropout=0.4), SHAPES)
    generator = dropout_generator(CPU, 5)
    state = generator.get_state()
    tape = tape_for(network, network.shared_parameters(), network.own_parameters(), observations(SHAPES))
    assert tape is not None
    assert torch.equal(generator.get_state(), state)


# -- spectral norm ------------------------------------------------------------------------------------------------------------


def test_power_steps_converge_to_the_largest_singular_value() -> None:
    """One matrix and a stack of matrices, against the singular value decomposition."""
    weight = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    left, right = torch.ones(3, 5) / 5**0.5, torch.ones(3, 4) / 2
    power_step(weight, left, right, times=200)
    found = torch.einsum("mo,moi,mi->m", left, weight, right)
    assert torch.allclose(found, torch.linalg.matrix_norm(weight, 2), rtol=1e-4)
    one_left, one_right = torch.ones(5) / 5**0.5, torch.ones(4) / 2
    power_step(weight[1], one_left, one_right, times=200)
    assert torch.allclose(one_left, left[1], atol=1e-5)


def test_spectral_linear_agrees_with_torch_and_its_gradient() -> None:
    torch.manual_seed(0)
    layer, plain = SpectralLinear(6, 5), nn.Linear(6, 5)
    layer.power_step(times=200)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    theirs = nn.utils.parametrizations.spectral_norm(plain, n_power_iterations=200)
    x = torch.randn(7, 6)
    mine_y, their_y = layer(x), theirs(x)
    assert torch.allclose(mine_y, their_y, atol=1e-5)
    mine_y.square().sum().backward()
    their_y.square().sum().backward()
    gradient = theirs.parametrizations.weight.original.grad  # type: ignore[union-attr]
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, gradient, atol=1e-4)


@pytest.mark.parametrize(("torso", "shapes"), torsos(spectral_norm=True))
@pytest.mark.parametrize("name", STRUCTURES)
def test_last_layer_is_normalised_in_every_structure_and_vectors_are_saved(name: str, torso: Torso, shapes: Shapes) -> None:
    """Doubled weights (without bias) give the same features. The vectors follow changed weights of trained layers only."""
    if name == "paco":
        with pytest.raises(ValueError, match=r"network\.spectral_norm"):
            structure(name, torso, shapes)
        return
    network, observation = network_of(name, torso, shapes), observations(shapes)
    layers = spectral_layers(network)
    assert layers
    names = [name for name in network.state_dict() if name.endswith(("left", "right"))]
    assert names
    assert not any(name in dict(network.named_parameters()) for name in names)
    with torch.no_grad():
        before = network.sharing(observation)
        for layer in layers:
            for weight in _weights(layer):
                weight.mul_(2)
        assert torch.allclose(network.sharing(observation), before, atol=1e-4)
        for layer in layers:
            for weight in _weights(layer):
                weight.add_(torch.randn(weight.shape))
    state = copy.deepcopy(network.state_dict())
    for layer in layers:
        layer.power_step(times=3)
    assert any(not torch.equal(network.state_dict()[name], state[name]) for name in names)
    network.load_state_dict(state)
    network.requires_grad_(False)
    for layer in layers:
        layer.power_step(times=3)
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in names)


def _weights(layer: nn.Module) -> list[torch.Tensor]:
    if isinstance(layer, SpectralLinear):
        return [layer.weight]
    return [layer.stacked[f"{name}.weight".replace(".", ":")] for name in layer.spectral]  # type: ignore[union-attr, index]


def test_only_the_last_mlp_layer_is_normalised() -> None:
    body = MLP(hidden=[8, 7, 6], spectral_norm=True).body((4,))
    assert [type(block[0]) for block in body] == [nn.Linear, SpectralLinear]  # type: ignore[index]
    assert not any(isinstance(module, SpectralLinear) for module in MLP(hidden=[8, 7], spectral_norm=True).stem((4,)).modules())
