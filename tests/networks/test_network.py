"""Multi-task network: masks for random packs, independence and order of tasks."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.agents.targets import bootstrap_value
from mtrl_cli.networks.heads import DuelingHead, Head, PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing, IndependentSharing, Sharing
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, NatureCNN, Torso
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.losses import Uniform
from tests.helpers.fake_tasks import tasks_of
from tests.helpers.structures import Shapes, observations

KINDS = list(itertools.product([HardSharing, IndependentSharing], [PlainHead, DuelingHead]))


def network_of(
    sharing: type[Sharing], head: type[Head], shapes: Shapes, actions: list[int], torso: Torso | None = None, **options: object
) -> MultiTaskNetwork:
    recipe = torso or (MLP(hidden=[8, 6]) if len(shapes[0]) == 1 else MinAtarCNN(channels=3, features=6))
    structure = sharing(recipe, shapes)
    return MultiTaskNetwork(structure, head(structure.num_features, actions), **({"observation_scale": 1.0} | options))


def random_pack(seed: int) -> tuple[Shapes, list[int]]:
    """Observation shapes and numbers of actions of 1 to 5 tasks."""
    draw = random.Random(seed)
    tasks = draw.randint(1, 5)
    tail = draw.choice([(), (10, 10)])
    return [(draw.randint(1, 6), *tail) for _ in range(tasks)], [draw.randint(1, 9) for _ in range(tasks)]


# -- masks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("sharing", "head"), KINDS)
def test_missing_action_is_never_chosen(sharing: type[Sharing], head: type[Head], seed: int) -> None:
    """Neither argmax, exploration nor targets choose a missing action, for any parameters. All own actions are reachable."""
    torch.manual_seed(seed)
    shapes, actions = random_pack(seed)
    online, target = (network_of(sharing, head, shapes, actions) for _ in range(2))
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.mul_(30 * torch.randn(()))
    observation = observations(shapes, batch=40, seed=seed)
    number_K1 = torch.tensor(actions)[:, None]
    q_KBA = online(observation)
    assert q_KBA.shape == (len(actions), 40, max(actions))
    assert torch.equal(q_KBA.isfinite(), (torch.arange(max(actions)) < number_K1)[:, None].expand_as(q_KBA))
    assert (q_KBA.argmax(-1) < number_K1).all()
    next_q_KBA = target(observation)
    for choosing_KBA in (q_KBA, next_q_KBA):
        assert bootstrap_value(next_q_KBA, choosing_KBA).isfinite().all()
    actor = EpsilonGreedy(online, actions, torch.device("cpu"), seed)
    for epsilon in (0.0, 0.5, 1.0):
        acted = actor.act(observation[:, :, None], np.full(len(actions), epsilon, np.float32))
        assert ((acted >= 0) & (acted < number_K1)).all()


@pytest.mark.parametrize(("sharing", "head"), KINDS)
def test_gradient_through_masked_values_is_finite(sharing: type[Sharing], head: type[Head]) -> None:
    network = network_of(sharing, head, [(4,), (2,)], [2, 5])
    action = torch.zeros(2, 4, 1, dtype=torch.int64)
    network(observations([(4,), (2,)])).gather(-1, action).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


# -- counts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharing", "head"), KINDS)
def test_counts_of_equal_tasks_sum_to_all_parameters(sharing: type[Sharing], head: type[Head]) -> None:
    network = network_of(sharing, head, [(4,)] * 3, [2] * 3)
    counts = network.parameter_counts()
    assert counts.total == sum(parameter.numel() for parameter in network.parameters())
    assert len(set(counts.per_task)) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("head", [PlainHead, DuelingHead])
def test_padding_is_not_counted(head: type[Head], seed: int) -> None:
    """Against single-task networks, which have no padding: independent tasks have the same counts, hard sharing has one body."""
    shapes, actions = random_pack(seed)
    single = [network_of(IndependentSharing, head, [shape], [number]) for shape, number in zip(shapes, actions, strict=True)]
    separate = [sum(parameter.numel() for parameter in network.parameters()) for network in single]
    independent = network_of(IndependentSharing, head, shapes, actions).parameter_counts()
    assert (independent.shared, independent.per_task) == (0, separate)
    hard = network_of(HardSharing, head, shapes, actions).parameter_counts()
    assert [hard.shared + own for own in hard.per_task] == separate
    assert hard.total == hard.shared + sum(hard.per_task)


# -- independence and order -----------------------------------------------------------------------------------------------------


def own_rows(network: MultiTaskNetwork) -> dict[str, bool]:
    """Each parameter by name, and whether its first dimension is the task."""
    return {name: name.startswith("head.") or ".stacked." in name for name, _ in network.named_parameters()}


@pytest.mark.parametrize("shapes", [[(4,)] * 3, [(4,), (6,), (2,)]])
@pytest.mark.parametrize(("sharing", "head"), KINDS)
def test_loss_of_a_task_has_gradients_in_own_and_shared_parameters_only(sharing: type[Sharing], head: type[Head], shapes: Shapes) -> None:
    for task, number in enumerate((2, 4, 3)):
        network = network_of(sharing, head, shapes, [2, 4, 3])
        network(observations(shapes))[task, :, :number].square().sum().backward()
        of_tasks = own_rows(network)
        assert any(not own for own in of_tasks.values()) == (sharing is HardSharing)
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            if of_tasks[name]:
                assert parameter.grad.flatten(1).any(1).tolist() == [each == task for each in range(3)], name
            else:
                assert parameter.grad.any(), name


@pytest.mark.parametrize("shapes", [[(4,)] * 3, [(4,), (6,), (2,)]])
@pytest.mark.parametrize(("sharing", "head"), KINDS)
def test_the_order_of_tasks_does_not_matter(sharing: type[Sharing], head: type[Head], shapes: Shapes) -> None:
    """Permuted tasks with permuted parameters give permuted values and the same gradients in shared parameters."""
    actions, order = [2, 4, 3], [2, 0, 1]
    network = network_of(sharing, head, shapes, actions)
    permuted = network_of(sharing, head, [shapes[task] for task in order], [actions[task] for task in order])
    of_tasks = own_rows(network)
    state = network.state_dict()
    permuted.load_state_dict({name: tensor[order] if of_tasks[name] else tensor for name, tensor in state.items()})
    observation = observations(shapes)
    q_KBA, q_permuted = network(observation), permuted(observation[order])
    assert torch.allclose(q_permuted, q_KBA[order], atol=1e-6)
    for each, q in ((network, q_KBA), (permuted, q_permuted)):
        loss_K = q.masked_fill(~q.isfinite(), 0.0).square().sum(-1).mean(1)
        gradients = AutogradGradients(loss_K, each.shared_parameters(), each.own_parameters())
        weight_K = Uniform(tasks_of("abc")).backward(gradients)
        assert weight_K.tolist() == pytest.approx([1 / 3] * 3)
    for (name, one), (_, other) in zip(network.named_parameters(), permuted.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad[order] if of_tasks[name] else one.grad, other.grad, atol=1e-6), name


# -- numbers --------------------------------------------------------------------------------------------------------------------


def test_image_bytes_are_scaled() -> None:
    scaled = network_of(HardSharing, PlainHead, [(4, 10, 10)], [3], observation_scale=255.0)
    plain = network_of(HardSharing, PlainHead, [(4, 10, 10)], [3])
    plain.load_state_dict(scaled.state_dict())
    pixels = torch.randint(256, (1, 5, 4, 10, 10), dtype=torch.uint8)
    assert torch.allclose(scaled(pixels), plain(pixels.float() / 255), atol=1e-6)


@pytest.mark.parametrize(
    "torso", [MinAtarCNN(channels=3, features=6, layer_norm=True), ImpalaCNN(features=6), NatureCNN(features=6, width=0.1)]
)
@pytest.mark.parametrize("channels", [(4, 4), (2, 4)])
@pytest.mark.parametrize("sharing", [HardSharing, IndependentSharing])
def test_bfloat16_values_are_float32_and_close(sharing: type[Sharing], channels: tuple[int, int], torso: Torso) -> None:
    shapes: Shapes = [(number, 40, 40) for number in channels]
    exact = network_of(sharing, DuelingHead, shapes, [3, 2], torso, observation_scale=255.0)
    fast = network_of(sharing, DuelingHead, shapes, [3, 2], torso, observation_scale=255.0, autocast=torch.bfloat16)
    fast.load_state_dict(exact.state_dict())
    pixels = (observations(shapes).abs() * 60).clamp_max(255).to(torch.uint8)
    q, q_fast = exact(pixels), fast(pixels)
    assert q_fast.dtype == torch.float32
    assert torch.equal(q_fast.isfinite(), q.isfinite())
    assert not torch.equal(q_fast, q)
    assert torch.allclose(q_fast, q, atol=0.05)
    q_fast[:, :, :2].square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in fast.parameters())
