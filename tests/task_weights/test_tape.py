"""Tape of one common pass: equal to a backward pass per task, or not used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from mtrl_cli.machine.hardware import missing_for_compile
from mtrl_cli.networks.heads import DuelingHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing, IndependentSharing, Sharing
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, NatureCNN, Torso
from mtrl_cli.task_weights import layers
from mtrl_cli.task_weights.base import TaskGradients
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.tape import Tape, TapedGradients, tape_for
from tests.helpers.structures import observations

Shapes = list[tuple[int, ...]]
ACTIONS = [3, 2, 4]
CASES: list[tuple[Torso, Shapes]] = [
    (MLP(hidden=[8, 6]), [(4,)] * 3),
    (MLP(hidden=[8, 6, 5], layer_norm=True), [(4,), (6,), (2,)]),
    (MinAtarCNN(channels=3, features=5), [(4, 10, 10)] * 3),
    (MinAtarCNN(channels=3, features=5, layer_norm=True), [(4, 10, 10), (7, 10, 10), (6, 10, 10)]),
    (NatureCNN(features=9, width=0.1, layer_norm=True), [(2, 40, 40)] * 3),
    (ImpalaCNN(features=6), [(2, 16, 16)] * 3),
]


def network_of(torso: Torso, shapes: Shapes, kind: type[Sharing] = HardSharing) -> MultiTaskNetwork:
    torch.manual_seed(0)
    return MultiTaskNetwork(kind(torso, shapes), DuelingHead(torso.num_features, ACTIONS), 1.0)


def losses_of(network: nn.Module, observation: torch.Tensor) -> torch.Tensor:
    """Losses `[K, B]` that are not linear in the values."""
    q_KBA = network(observation)
    return (q_KBA.masked_fill(~q_KBA.isfinite(), 0.0) - 0.3).square().sum(2)


def both(network: MultiTaskNetwork, observation: torch.Tensor) -> tuple[TaskGradients, TaskGradients, Tape]:
    """The gradients of one batch by autograd and by tape."""
    shared, own = network.shared_parameters(), network.own_parameters()
    tape = tape_for(network, shared, own, observation[:, :2])
    assert tape is not None
    slow = AutogradGradients(losses_of(network, observation).mean(1), shared, own)
    taps = tape.make_taps(network, observation)
    with tape.recording(taps):
        losses = losses_of(network, observation)
    return slow, TapedGradients(losses, tape, taps, shared, own), tape


def grads(network: nn.Module, act: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Gradient of every parameter after `act`."""
    network.zero_grad(set_to_none=True)
    act()
    found = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # Fused optimizers read a gradient in the memory layout of its parameter.
        assert parameter.grad.stride() == parameter.stride(), name
        found[name] = parameter.grad
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 2e-5 * expected.norm() + 1e-7


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_tape_equals_a_backward_pass_per_task(torso: Torso, shapes: Shapes, batch: int) -> None:
    network = network_of(torso, shapes)
    slow, quick, _ = both(network, observations(shapes, batch=max(batch, 2))[:, :batch])
    assert torch.allclose(quick.loss_K, slow.loss_K)
    assert_close(quick.rows(), slow.rows())
    assert_close(quick.gram(), slow.gram())
    assert not quick.gram().requires_grad  # solvers on the host require a tensor without a graph
    weight_K, gradient_P = torch.tensor([0.2, 0.7, -0.1]), torch.randn(slow.rows().shape[1])
    for method, argument in (("weigh", weight_K), ("combine", weight_K), ("replace", gradient_P)):
        slow, quick, _ = both(network, observations(shapes, batch=max(batch, 2))[:, :batch])
        expected, found = (grads(network, partial(getattr(each, method), argument)) for each in (slow, quick))
        for name, gradient in found.items():
            assert_close(gradient, expected[name])


def test_combine_of_linear_layers_is_equal_with_and_without_rows() -> None:
    """The weighted sum is the same before and after `rows`, and equals that of the rows."""
    torso, shapes = MLP(hidden=[8, 6]), [(4,)] * 3
    network = network_of(torso, shapes)
    _, quick, _ = both(network, observations(shapes, batch=5))
    weight_K = torch.tensor([0.5, 0.2, 0.3])
    without = grads(network, lambda: quick.combine(weight_K))
    rows_KP = quick.rows()
    with_rows = grads(network, lambda: quick.combine(weight_K))
    flat = torch.cat([without[name].flatten() for name, parameter in network.named_parameters() if "sharing" in name])
    assert_close(flat, weight_K @ rows_KP)
    for name, gradient in without.items():
        assert_close(with_rows[name], gradient)


def test_own_parameters_get_a_uniform_share_for_any_weights() -> None:
    network = network_of(MLP(hidden=[8, 6]), [(4,)] * 3)
    observation = observations([(4,)] * 3)
    expected = grads(network, lambda: losses_of(network, observation).mean(1).mean().backward())
    _, quick, _ = both(network, observation)
    found = grads(network, lambda: quick.combine(torch.tensor([5.0, 0.0, -1.0])))
    for name in found:
        if name.startswith("head."):
            assert_close(found[name], expected[name])
        else:
            assert not torch.allclose(found[name], expected[name])


def test_linear_gram_equals_inner_products_of_rows() -> None:
    """For few samples, inner products are less work than rows; for many samples, rows are."""
    for samples, size, quick in ((2, 30, True), (40, 3, False)):
        layer = nn.Linear(size, size + 1)
        x, d = torch.randn(3, samples, size), torch.randn(3, samples, size + 1)
        found = layers.linear_gram(layer, x, d)
        assert (found is not None) == quick
        if found is not None:
            row_KP = torch.cat([each.flatten(1) for each in layers.rows(layer, x, d).values()], 1)
            assert_close(found, row_KP @ row_KP.T)


# -- where it would not be right ------------------------------------------------------------------------------------------------


class UnsupportedUse(nn.Module):
    """Network that uses its shared layer in a way that a tape does not support."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.layer = nn.Linear(4, 4)
        self.own = nn.Parameter(torch.randn(3, 1, 4))
        self.free = nn.Parameter(torch.randn(4)) if way == "no layer" else None

    def forward(self, x_KBI: torch.Tensor) -> torch.Tensor:
        if self.way == "twice":
            return self.own * self.layer(self.layer(x_KBI))
        if self.way == "batch first":
            return self.own * self.layer(x_KBI.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, 3)).transpose(0, 1)
        if self.way == "one task":
            return self.own * torch.stack([self.layer(x_KBI[0]), x_KBI[1], x_KBI[2]])
        if self.way == "no layer":
            return self.own * self.layer(x_KBI) * self.free
        return self.own * self.layer(x_KBI)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_no_tape_for_a_convolution_with_reflected_padding(mode: str) -> None:
    network = network_of(NatureCNN(features=6, width=0.1), [(2, 40, 40)] * 3)
    first = network.sharing.stem[0]  # type: ignore[index]
    network.sharing.stem[0] = nn.Conv2d(2, first.out_channels, 8, 4, padding=0, padding_mode=mode)  # type: ignore[index, operator]
    network.sharing.stem[0].padding = (2, 2)  # type: ignore[index, union-attr]
    network.sharing.stem[0]._reversed_padding_repeated_twice = [2, 2, 2, 2]  # type: ignore[index, union-attr]
    observation = observations([(2, 40, 40)] * 3, batch=2)
    network.sharing.body = NatureCNN(features=6, width=0.1).body((2, 44, 44))  # type: ignore[assignment]
    assert tape_for(network, network.shared_parameters(), network.own_parameters(), observation) is None


@pytest.mark.parametrize("way", ["twice", "batch first", "one task", "no layer"])
def test_no_tape_for_an_unsupported_use_of_a_layer(way: str) -> None:
    network, observation = UnsupportedUse(way), torch.randn(3, 2, 4)
    before = network(observation)
    shared = [parameter for name, parameter in network.named_parameters() if name != "own"]
    assert tape_for(network, shared, [network.own], observation) is None
    assert torch.equal(network(observation), before)
    assert not network.layer._forward_hooks


def test_tape_for_a_plain_use_of_the_same_layer() -> None:
    network = UnsupportedUse("plain")
    assert tape_for(network, list(network.layer.parameters()), [network.own], torch.randn(3, 2, 4)) is not None


def test_no_tape_without_shared_parameters() -> None:
    network = network_of(MLP(hidden=[8, 6]), [(4,)] * 3, IndependentSharing)
    assert tape_for(network, network.shared_parameters(), network.own_parameters(), torch.randn(3, 2, 4)) is None


# -- aside ------------------------------------------------------------------------------------------------------------------------


def test_network_is_unchanged_outside_a_recording() -> None:
    torso, shapes = MLP(hidden=[8, 6]), [(4,)] * 3
    network, observation = network_of(torso, shapes), observations(shapes)
    expected = grads(network, lambda: losses_of(network, observation).sum().backward())
    both(network, observation)
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, found in grads(network, lambda: losses_of(network, observation).sum().backward()).items():
        assert torch.equal(found, expected[name])


def test_tape_in_bfloat16_agrees_to_precision() -> None:
    shapes = [(4, 10, 10)] * 3
    network = network_of(MinAtarCNN(channels=4, features=16, layer_norm=True), shapes)
    network._autocast = torch.bfloat16
    slow, quick, _ = both(network, observations(shapes, batch=8))
    assert (quick.rows() - slow.rows()).norm() < 0.02 * slow.rows().norm()
    assert (quick.gram() - slow.gram()).norm() < 0.02 * slow.gram().norm()


@pytest.mark.skipif(missing_for_compile() is not None, reason=f"torch.compile cannot work here: {missing_for_compile()}")
def test_tape_of_a_compiled_network_is_equal() -> None:
    torso, shapes = MLP(hidden=[8, 6], layer_norm=True), [(4,)] * 3
    network = network_of(torso, shapes)
    shared, own = network.shared_parameters(), network.own_parameters()
    observation = observations(shapes)
    tape = tape_for(network, shared, own, observation)
    assert tape is not None
    compiled = torch.compile(lambda observation: losses_of(network, observation), dynamic=False)
    taps = tape.make_taps(network, observation)
    for seed in range(3):
        observation = observations(shapes, seed=seed)
        slow = AutogradGradients(losses_of(network, observation).mean(1), shared, own)
        with tape.recording(taps):
            losses = compiled(observation)
        assert_close(TapedGradients(losses, tape, taps, shared, own).rows(), slow.rows())
