"""Optimizers: clipping, forgetting gradients, and going on from a state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

from mtrl_cli.optimizers import Adam, Optimizer, RAdam


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


def adam(of: list[torch.nn.Parameter], max_grad_norm: float = 0.0, weight_decay: float = 0.0) -> Adam:
    return Adam(of, lr=0.1, eps=1e-3, weight_decay=weight_decay, max_grad_norm=max_grad_norm)


def radam(of: list[torch.nn.Parameter], max_grad_norm: float = 0.0) -> RAdam:
    return RAdam(of, lr=0.1, eps=1e-6, weight_decay=0.0, max_grad_norm=max_grad_norm)


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


@pytest.mark.parametrize("make", [adam, radam])
def test_it_goes_on_identically_from_its_state(make: Callable[..., Optimizer]) -> None:
    own = parameters()
    optimizer = make(own, max_grad_norm=1.0)
    for turn in range(3):
        give(own, turn + 1.0)
        optimizer.step()
    twin_parameters = copy.deepcopy(own)
    twin = make(twin_parameters, max_grad_norm=1.0)
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


def test_radam_by_its_formulas() -> None:
    """Liu et al. 2020, algorithm 2: while the variance is not tractable (rho_t <= 5), steps of the corrected mean; then rectified ones."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = RAdam([parameter], lr=0.1, eps=1e-12, weight_decay=0.0, max_grad_norm=2.5)
    beta1, beta2, mean, square, value = 0.9, 0.999, 0.0, 0.0, 0.0
    rho_inf = 2 / (1 - beta2) - 1
    rectified = 0
    for t in range(1, 12):
        given = float(t % 4)
        gradient = min(given, 2.5)  # clipped
        mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        step = mean / (1 - beta1**t)
        if rho > 5:
            rectified += 1
            factor = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            step *= factor / math.sqrt(square / (1 - beta2**t))
        value -= 0.1 * step
        parameter.grad = torch.full((1,), given)
        optimizer.step()
        assert parameter.item() == pytest.approx(value, rel=1e-4)
    assert 0 < rectified < 11


@pytest.mark.parametrize("kind", [Adam, RAdam])
def test_moments_take_the_layout_of_their_parameter_whatever_a_file_made_of_it(kind: type[Optimizer]) -> None:
    """Images of a GPU's network are kept channel by channel within a pixel; a checkpoint's tensors are not."""

    def made(channels_last: bool) -> torch.nn.Parameter:
        weight = torch.arange(72.0).view(4, 3, 2, 3) / 72
        return torch.nn.Parameter(weight.to(memory_format=torch.channels_last) if channels_last else weight)

    def move(parameter: torch.nn.Parameter, optimizer: Optimizer, number: int) -> None:
        gradient = torch.sin(torch.arange(72.0) * (number + 1)).view(4, 3, 2, 3)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    settings = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.0, "max_grad_norm": 0.0}
    plain, images = made(False), made(True)
    one, other = kind([plain], **settings), kind([images], **settings)  # type: ignore[call-arg, arg-type]
    for number in range(3):
        move(plain, one, number)
    images.data.copy_(plain.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for number in range(3, 9):
        move(plain, one, number)
        move(images, other, number)
    assert torch.allclose(plain, images, atol=1e-6)
