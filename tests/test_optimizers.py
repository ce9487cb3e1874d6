"""Optimizers: clipping, forgetting gradients, and going on from a state."""

from __future__ import annotations

import copy

import pytest
import torch

from mtrl_cli.optimizers import Adam


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


def adam(of: list[torch.nn.Parameter], max_grad_norm: float = 0.0, weight_decay: float = 0.0) -> Adam:
    return Adam(of, lr=0.1, eps=1e-3, weight_decay=weight_decay, max_grad_norm=max_grad_norm)


def give(of: list[torch.nn.Parameter], scale: float = 1.0) -> None:
    """The gradient [3, 0], [[4]]: of norm 5."""
    of[0].grad, of[1].grad = torch.tensor([3.0, 0.0]) * scale, torch.tensor([[4.0]]) * scale


@pytest.mark.parametrize(("max_grad_norm", "factor"), [(0.0, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_the_first_step_by_hand(max_grad_norm: float, factor: float) -> None:
    """Adam's bias-corrected first step is lr * g / (|g| + eps), g being the clipped gradient."""
    own = parameters()
    optimizer = adam(own, max_grad_norm)
    give(own)
    norm = optimizer.step()
    assert norm.item() == pytest.approx(5.0)  # before clipping
    three, four = 3 * factor, 4 * factor
    assert own[0].tolist() == pytest.approx([1 - 0.1 * three / (three + 1e-3), 2.0], rel=1e-5)
    assert own[1].item() == pytest.approx(3 - 0.1 * four / (four + 1e-3), rel=1e-5)


def test_gradients_are_forgotten_after_a_step() -> None:
    own = parameters()
    optimizer = adam(own)
    give(own)
    optimizer.step()
    assert [parameter.grad for parameter in own] == [None, None]


def test_many_steps_agree_with_torchs_adam() -> None:
    own, plain = parameters(), parameters()
    optimizer = adam(own, max_grad_norm=2.0, weight_decay=0.01)
    reference = torch.optim.Adam(plain, lr=0.1, eps=1e-3, weight_decay=0.01)
    for turn in range(20):
        give(own, turn - 7.0)
        give(plain, turn - 7.0)
        torch.nn.utils.clip_grad_norm_(plain, 2.0)
        optimizer.step()
        reference.step()
    for ours, theirs in zip(own, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_it_goes_on_identically_from_its_state() -> None:
    own = parameters()
    optimizer = adam(own, max_grad_norm=1.0)
    for turn in range(3):
        give(own, turn + 1.0)
        optimizer.step()
    twin_parameters = copy.deepcopy(own)
    twin = adam(twin_parameters, max_grad_norm=1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for turn in range(3):
        for each, of in ((optimizer, own), (twin, twin_parameters)):
            give(of, turn - 1.5)
            each.step()
    for ours, theirs in zip(own, twin_parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_the_state_from_before_the_first_step_is_empty() -> None:
    own = parameters()
    optimizer = adam(own)
    assert optimizer.state_dict() == {}
    optimizer.load_state_dict({})
    give(own)
    optimizer.step()
    assert sorted(optimizer.state_dict()) == ["0", "1"]


def test_step_size_falls_linearly_over_the_run() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Adam([parameter], lr=0.1, lr_final=0.2, eps=1e-12, weight_decay=0.0, max_grad_norm=0.0)
    for progress, lr in ((0.0, 0.1), (0.5, 0.06), (1.0, 0.02), (2.0, 0.02)):
        # With one constant gradient, an Adam step has the length of its step size.
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.at(progress)
        optimizer.step()
        assert before - parameter.item() == pytest.approx(lr, rel=1e-4)
