"""Heads of each task: values, masks, losses and parameter counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtrl_cli.agents.targets import of_action
from mtrl_cli.networks.heads import C51Head, DuelingHead, Head, HLGaussHead, PlainHead, QuantileHead
from mtrl_cli.networks.per_task import TaskLinear, parameter_counts

HEADS = [PlainHead, DuelingHead, C51Head, HLGaussHead, QuantileHead]
ACTIONS = [3, 1, 5, 2]


def features(batch: int = 6, size: int = 7) -> torch.Tensor:
    return torch.randn(len(ACTIONS), batch, size, generator=torch.Generator().manual_seed(0))


def values(head: Head) -> torch.Tensor:
    return head.values(head(features()))


@pytest.mark.parametrize("kind", HEADS)
def test_values_of_missing_actions_are_minus_infinity(kind: type[Head]) -> None:
    q = values(kind(7, ACTIONS))
    assert q.shape == (4, 6, 5)
    for task, number in enumerate(ACTIONS):
        assert q[task, :, :number].isfinite().all()
        assert (q[task, :, number:] == -torch.inf).all()


def test_plain_head_is_a_linear_layer_per_task() -> None:
    head = PlainHead(7, ACTIONS)
    q = values(head)
    for task, number in enumerate(ACTIONS):
        weight, bias = head.linear.weight[task, :, :number], head.linear.bias[task, 0, :number]
        assert torch.allclose(q[task, :, :number], torch.nn.functional.linear(features()[task], weight.T, bias), atol=1e-6)


def test_dueling_mean_is_over_the_tasks_own_actions() -> None:
    """Wang et al. 2016, equation 9, per task."""
    head = DuelingHead(7, ACTIONS)
    q = values(head)
    for task, number in enumerate(ACTIONS):
        value = features()[task] @ head.value.weight[task] + head.value.bias[task]
        advantage = features()[task] @ head.advantage.weight[task, :, :number] + head.advantage.bias[task, :, :number]
        assert torch.allclose(q[task, :, :number], value + advantage - advantage.mean(1, keepdim=True), atol=1e-5)
        # then the mean of a task's action values is its state value
        assert torch.allclose(q[task, :, :number].mean(1, keepdim=True), value, atol=1e-5)


def test_dueling_by_hand() -> None:
    """One feature, 1; value 10; advantages 1 and 3 with mean 2. The padded third action is excluded."""
    head = DuelingHead(1, [2, 3])
    with torch.no_grad():
        for layer in (head.value, head.advantage):
            layer.weight.zero_()
            layer.bias.zero_()
        head.value.bias[0] = 10.0
        head.advantage.bias[0, 0] = torch.tensor([1.0, 3.0, 0.0])
    assert head.values(head(torch.ones(2, 1, 1)))[0, 0].tolist() == [9.0, 11.0, -torch.inf]


@pytest.mark.parametrize("kind", HEADS)
def test_head_parameter_counts_match_linear_layers_without_padding(kind: type[Head]) -> None:
    state_value = 8 if kind is DuelingHead else 0
    each = {C51Head: 51, HLGaussHead: 101, QuantileHead: 51}.get(kind, 1)
    assert parameter_counts(kind(7, ACTIONS), len(ACTIONS))[1] == [8 * number * each + state_value for number in ACTIONS]
    same = kind(7, [4, 4])
    assert sum(parameter_counts(same, 2)[1]) == sum(parameter.numel() for parameter in same.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_loss_of_a_task_has_gradients_in_its_own_head_only(kind: type[Head]) -> None:
    for task, number in enumerate(ACTIONS):
        head = kind(7, ACTIONS)
        values(head)[task, :, :number].square().sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None
            # A single action has no advantage: its deviation from its own mean is always 0.
            assert parameter.grad[task].any() or (number == 1 and "advantage" in name)
            others = [other for other in range(4) if other != task]
            assert not parameter.grad[others].any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", HEADS)
def test_padding_stays_zero_while_training(kind: type[Head], weight_decay: float) -> None:
    head = kind(7, ACTIONS)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1, weight_decay=weight_decay)
    for _ in range(5):
        q = values(head)
        q[q.isfinite()].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [layer for layer in head.modules() if isinstance(layer, TaskLinear)]
    for layer in layers:
        for task in range(4):
            own = layer.sizes[task] // 8
            assert not layer.weight[task, :, own:].any()
            assert not layer.bias[task, :, own:].any()
            assert layer.weight[task, :, :own].all()


def test_task_linear_is_initialised_as_torch_linear() -> None:
    """Weights and biases are uniform between -1 / sqrt(inputs) and 1 / sqrt(inputs), as in torch.nn.Linear."""
    torch.manual_seed(0)
    layer = TaskLinear(25, [400, 300])
    for tensor in (layer.weight, layer.bias):
        own = torch.cat([tensor[0].flatten(), tensor[1, :, :300].flatten()])
        assert own.abs().max() <= 0.2
        assert own.abs().max() > 0.19
        assert abs(own.mean()) < 0.02
        assert abs(own.std() - 0.2 / 3**0.5) < 0.01


# -- losses and scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_learns_the_values_of_a_bandit(kind: type[Head]) -> None:
    """Six states with fixed returns and no next state: the values of the chosen actions become the returns."""
    torch.manual_seed(0)
    head, states = kind(6, ACTIONS), torch.eye(6).expand(4, 6, 6)
    action = torch.tensor([[number * b // 6 for b in range(6)] for number in ACTIONS])
    returns = torch.linspace(-8, 8, 24).reshape(4, 6)[:, torch.tensor([3, 0, 5, 1, 4, 2])]
    nothing = torch.zeros_like(returns)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.3 * 0.985**step
        taken = of_action(head(states), action)
        loss = head.loss(taken, torch.zeros_like(taken), returns, nothing, 0.0 if kind is not QuantileHead else 1.0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    learned = of_action(head.values(head(states)), action)
    assert (learned - returns).abs().max() < 0.2


@pytest.mark.parametrize("kind", HEADS)
def test_loss_has_no_gradient_if_outputs_equal_the_target(kind: type[Head]) -> None:
    """Zero reward and discount 1: the target is the output of the next state, which equals the current output."""
    torch.manual_seed(0)
    head = kind(7, [2])
    outputs = (4 * head(features()[:1])[:, :, 0]).detach()
    if kind is QuantileHead:
        outputs = outputs.sort(-1).values
    if kind is HLGaussHead:  # the target is a Gaussian for any distribution of the next state
        outputs = -((head.value_Z - torch.randn(1, 6, 1)) / (0.75 * 20 / 101)).square() / 2
    now = outputs.clone().requires_grad_()
    head.loss(now, outputs, torch.zeros(1, 6), torch.ones(1, 6), 0.0).sum().backward()
    assert now.grad is not None
    # Quantiles: each of 51 lies within one 51st of its own level. The Gaussian's density in a bin is about that of its centre.
    assert now.grad.abs().max() < {QuantileHead: 1 / 51, HLGaussHead: 0.05}.get(kind, 1e-6)


@pytest.mark.parametrize("kind", [PlainHead, DuelingHead, QuantileHead])
def test_rescale_gives_factor_times_value_plus_offset(kind: type[Head]) -> None:
    head = kind(7, ACTIONS)
    before = values(head)
    factor, offset = torch.tensor([2.0, 0.5, 3.0, 1.0]), torch.tensor([-1.0, 4.0, 0.0, 100.0])
    head.rescale(factor, offset)
    assert torch.allclose(values(head), before * factor[:, None, None] + offset[:, None, None], atol=1e-5)
    for layer in head.modules():
        if isinstance(layer, TaskLinear):
            assert not (layer.bias * ~layer.used_K1O).any()
            assert not (layer.weight * ~layer.used_K1O).any()


@pytest.mark.parametrize("kind", [C51Head, HLGaussHead])
def test_bounded_head_values_stay_in_range_and_refuse_rescale(kind: type[Head]) -> None:
    head = kind(7, ACTIONS, v_min=-3.0, v_max=5.0)
    assert kind.bounded
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1000)
    q = values(head)
    assert q[q.isfinite()].min() >= -3
    assert q[q.isfinite()].max() <= 5
    with pytest.raises(NotImplementedError):
        head.rescale(torch.ones(4), torch.zeros(4))


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (C51Head, {"atoms": 1}, r"network\.head\.atoms must be at least 2, got 1"),
        (HLGaussHead, {"bins": 1}, r"network\.head\.bins must be at least 2, got 1"),
        (C51Head, {"v_min": 2.0, "v_max": 2.0}, r"v_min must be below network\.head\.v_max, got 2 and 2"),
        (HLGaussHead, {"v_min": 20.0}, r"v_min must be below network\.head\.v_max, got 20 and 10"),
    ],
)
def test_empty_support_is_refused(kind: type[Head], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(7, ACTIONS, **keys)
