"""Optimizers: clipping, schedules and state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtrl_cli.training.optimizers import SGD, Adam, AdamW, Optimizer, RAdam, RMSprop, lr_factor


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


def adam(of: list[torch.nn.Parameter], max_grad_norm: float = 0.0, weight_decay: float = 0.0) -> Adam:
    return Adam(of, lr=0.1, eps=1e-3, weight_decay=weight_decay, max_grad_norm=max_grad_norm)


def radam(of: list[torch.nn.Parameter], max_grad_norm: float = 0.0) -> RAdam:
    return RAdam(of, lr=0.1, eps=1e-6, weight_decay=0.0, max_grad_norm=max_grad_norm)


def set_known_gradients(of: list[torch.nn.Parameter], scale: float = 1.0) -> None:
    """Set the gradients [3, 0] and [[4]], of norm 5."""
    of[0].grad, of[1].grad = torch.tensor([3.0, 0.0]) * scale, torch.tensor([[4.0]]) * scale


def step(optimizer: Optimizer) -> torch.Tensor:
    """Clip and step. Returns the gradient norm."""
    norm = optimizer.clip_gradients()
    optimizer.step()
    return norm


@pytest.mark.parametrize(("max_grad_norm", "factor"), [(0.0, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_first_step_equals_the_bias_corrected_formula(max_grad_norm: float, factor: float) -> None:
    """Adam's bias-corrected first step is lr * g / (|g| + eps), g being the clipped gradient."""
    own = parameters()
    optimizer = adam(own, max_grad_norm)
    set_known_gradients(own)
    norm = step(optimizer)
    assert norm.item() == pytest.approx(5.0)  # before clipping
    three, four = 3 * factor, 4 * factor
    assert own[0].tolist() == pytest.approx([1 - 0.1 * three / (three + 1e-3), 2.0], rel=1e-5)
    assert own[1].item() == pytest.approx(3 - 0.1 * four / (four + 1e-3), rel=1e-5)


def test_step_deletes_the_gradients() -> None:
    own = parameters()
    optimizer = adam(own)
    set_known_gradients(own)
    step(optimizer)
    assert [parameter.grad for parameter in own] == [None, None]


def test_many_steps_agree_with_torchs_adam() -> None:
    own, plain = parameters(), parameters()
    optimizer = adam(own, max_grad_norm=2.0, weight_decay=0.01)
    reference = torch.optim.Adam(plain, lr=0.1, eps=1e-3, weight_decay=0.01)
    for turn in range(20):
        set_known_gradients(own, turn - 7.0)
        set_known_gradients(plain, turn - 7.0)
        torch.nn.utils.clip_grad_norm_(plain, 2.0)
        step(optimizer)
        reference.step()
    for ours, theirs in zip(own, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("make", [adam, radam])
def test_restored_optimizer_makes_identical_steps(make: Callable[..., Optimizer]) -> None:
    own = parameters()
    optimizer = make(own, max_grad_norm=1.0)
    for turn in range(3):
        set_known_gradients(own, turn + 1.0)
        step(optimizer)
    twin_parameters = copy.deepcopy(own)
    twin = make(twin_parameters, max_grad_norm=1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for turn in range(3):
        for each, of in ((optimizer, own), (twin, twin_parameters)):
            set_known_gradients(of, turn - 1.5)
            step(each)
    for ours, theirs in zip(own, twin_parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_state_before_the_first_step_is_empty() -> None:
    own = parameters()
    optimizer = adam(own)
    assert optimizer.state_dict() == {}
    optimizer.load_state_dict({})
    set_known_gradients(own)
    step(optimizer)
    assert sorted(optimizer.state_dict()) == ["0", "1"]


def test_learning_rate_falls_linearly_over_the_run() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Adam([parameter], lr=0.1, lr_final=0.2, eps=1e-12, weight_decay=0.0, max_grad_norm=0.0)
    for progress, lr in ((0.0, 0.1), (0.5, 0.06), (1.0, 0.02), (2.0, 0.02)):
        # With a constant gradient, the length of an Adam step is the learning rate.
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.set_lr(progress)
        step(optimizer)
        assert before - parameter.item() == pytest.approx(lr, rel=1e-4)


def test_radam_equals_its_published_formulas() -> None:
    """Liu et al. 2020, algorithm 2: while the variance is not tractable (rho_t <= 5), steps of the corrected mean; then rectified steps."""
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
        update = mean / (1 - beta1**t)
        if rho > 5:
            rectified += 1
            factor = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            update *= factor / math.sqrt(square / (1 - beta2**t))
        value -= 0.1 * update
        parameter.grad = torch.full((1,), given)
        step(optimizer)
        assert parameter.item() == pytest.approx(value, rel=1e-4)
    assert 0 < rectified < 11


@pytest.mark.parametrize("kind", [Adam, RAdam])
def test_loaded_moments_take_the_memory_layout_of_their_parameter(kind: type[Optimizer]) -> None:
    """Image networks on a GPU use channels-last parameters; tensors of a checkpoint are contiguous."""

    def made(channels_last: bool) -> torch.nn.Parameter:
        weight = torch.arange(72.0).view(4, 3, 2, 3) / 72
        return torch.nn.Parameter(weight.to(memory_format=torch.channels_last) if channels_last else weight)

    def move(parameter: torch.nn.Parameter, optimizer: Optimizer, number: int) -> None:
        gradient = torch.sin(torch.arange(72.0) * (number + 1)).view(4, 3, 2, 3)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        step(optimizer)

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


# -- schedules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.8, 0.6, 0.2, 0.2]),
        # cos(pi / 4) is 0.70711: 0.2 + 0.8 * 1.70711 / 2.
        ("cosine", [1.0, 0.882843, 0.6, 0.2, 0.2]),
    ],
)
def test_schedules_equal_hand_computed_fractions_of_lr(schedule: str, shares: list[float]) -> None:
    found = [lr_factor(schedule, 0.2, progress) for progress in (0.0, 0.25, 0.5, 1.0, 1.5)]
    assert found == pytest.approx(shares, abs=1e-6)


def step_sizes(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer._optimizer.param_groups]


def test_learning_rate_before_learning_starts_is_zero_only_with_a_warm_up() -> None:
    """Updates timed by a benchmark are made at step 0."""
    plain, warmed = (Adam(parameters(), lr=0.1, warm_up=steps, eps=1e-3, weight_decay=0.0, max_grad_norm=0.0) for steps in (0, 40))
    for optimizer, lr in ((plain, 0.1), (warmed, 0.0)):
        optimizer.set_lr(0.0, learning_for=-100)
        assert optimizer._optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_warm_up_rises_linearly_and_then_follows_the_schedule() -> None:
    optimizer = Adam(parameters(), lr=0.1, lr_final=0.5, warm_up=40, eps=1e-3, weight_decay=0.0, max_grad_norm=0.0)
    # Half-way through the run the linear schedule is at 0.75 of lr.
    for learning_for, lr in ((0, 0.0), (10, 0.01875), (39, 0.073125), (40, 0.075), (1000, 0.075)):
        optimizer.set_lr(0.5, learning_for)
        assert step_sizes(optimizer) == pytest.approx([lr])


def test_cosine_schedule_with_a_constant_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lr_final=0"):
        Adam(parameters(), lr=0.1, schedule="cosine", eps=1e-3, weight_decay=0.0, max_grad_norm=0.0)


# -- factors, parts without a gradient, and torch's own -----------------------------------------------------------------------

COMMON = {"lr": 0.05, "max_grad_norm": 1.5}
DECAY = {"weight_decay": 0.01}
OPTIONS: list[tuple[type[Optimizer], dict[str, object]]] = [
    (Adam, {"eps": 1e-4, **DECAY}),
    (AdamW, {"eps": 1e-4, "weight_decay": 0.1}),
    (RAdam, {"eps": 1e-4, **DECAY}),
    (RMSprop, {"alpha": 0.9, "eps": 1e-4, "momentum": 0.5, "centred": True, **DECAY}),
    (SGD, {"momentum": 0.9, "nesterov": True, **DECAY}),
    (SGD, {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
]
every_optimizer = pytest.mark.parametrize(("kind", "options"), OPTIONS)
KINDS = ["torso", "heads", "torso", "sharing"]


def four(seed: int = 0) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((3, 2), (4,), (2, 2), (5,))]


def set_gradients(parameters: list[torch.nn.Parameter], turn: int, frozen: tuple[int, ...] = ()) -> None:
    """Set random gradients, seeded by `turn`. Frozen parameters get the gradient None."""
    random = torch.Generator().manual_seed(100 + turn)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=random)
        parameter.grad = None if index in frozen else gradient


@every_optimizer
def test_steps_with_factors_and_a_temporarily_frozen_part_agree_with_torch(kind: type[Optimizer], options: dict[str, object]) -> None:
    """The reference is one plain torch optimizer per parameter; the frozen parameter's is created when it is unfrozen."""
    own, plain = four(), four()
    optimizer = kind(own, KINDS, factors={"torso": 0.1, "heads": 2.0}, **options, **COMMON)  # type: ignore[arg-type]
    factors, unfreeze_turn = [0.1, 2.0, 0.1, 1.0], 8
    reference: type[torch.optim.Optimizer] = getattr(torch.optim, kind.__name__)
    reference_options: dict[str, Any] = {"centered" if name == "centred" else name: value for name, value in options.items()}
    each: dict[int, torch.optim.Optimizer] = {}
    before = own[2].detach().clone()
    for turn in range(20):
        frozen = (2,) if turn < unfreeze_turn else ()
        if turn == unfreeze_turn:
            assert torch.equal(own[2], before)  # neither moved nor decayed
            assert sorted(optimizer.state_dict()) in (["0", "1", "3"], [])
        set_gradients(own, turn, frozen)
        set_gradients(plain, turn, frozen)
        torch.nn.utils.clip_grad_norm_(plain, 1.5)
        optimizer.set_lr(turn / 40)
        step(optimizer)
        for index, parameter in enumerate(plain):
            if index not in frozen:
                made = each.setdefault(index, reference([parameter], lr=0.05 * factors[index], **reference_options))
                made.step()
    for ours, theirs in zip(own, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@every_optimizer
def test_state_is_restored_by_position_independent_of_groups(kind: type[Optimizer], options: dict[str, object]) -> None:
    """Moments are restored with other factors, and a parameter without state gets it with its first gradient."""

    def made(trained: list[torch.nn.Parameter], **factors: float) -> Optimizer:
        return kind(trained, KINDS, factors=factors, **options, **COMMON)  # type: ignore[arg-type]

    own = four()
    optimizer = made(own, torso=0.1, heads=2.0)
    for turn in range(3):
        set_gradients(own, turn, frozen=(0,))
        step(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    assert "0" not in state
    twin_parameters = copy.deepcopy(own)
    twin = made(twin_parameters, torso=0.1, heads=2.0)
    twin.load_state_dict(copy.deepcopy(state))
    for turn in range(3, 7):
        for one, trained in ((optimizer, own), (twin, twin_parameters)):
            set_gradients(trained, turn)
            step(one)
    for ours, theirs in zip(own, twin_parameters, strict=True):
        assert torch.equal(ours, theirs)
    regrouped = made(four(), sharing=3.0)
    regrouped.load_state_dict(copy.deepcopy(state))
    for index, values in regrouped.state_dict().items():
        assert {name: value.tolist() for name, value in values.items()} == {name: value.tolist() for name, value in state[index].items()}


@every_optimizer
def test_parameters_with_reset_state_are_updated_as_by_a_new_optimizer(kind: type[Optimizer], options: dict[str, object]) -> None:
    own = four()
    optimizer = kind(own, **options, **COMMON)  # type: ignore[arg-type]
    for turn in range(5):
        set_gradients(own, turn)
        step(optimizer)
    optimizer.reset_state(own[:2])
    new_parameters = copy.deepcopy(own)
    new = kind(new_parameters, **options, **COMMON)  # type: ignore[arg-type]
    for turn in range(5, 8):
        for one, trained in ((optimizer, own), (new, new_parameters)):
            set_gradients(trained, turn)
            step(one)
    assert torch.equal(own[0], new_parameters[0])
    assert torch.equal(own[1], new_parameters[1])
    assert not options["weight_decay"] or not torch.equal(own[2], new_parameters[2])  # plain SGD has no state


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.momentum"):
        SGD(four(), momentum=0.0, nesterov=True, weight_decay=0.0, **COMMON)


def test_factors_without_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="requires the part of the network"):
        Adam(four(), factors={"torso": 0.1}, eps=1e-3, weight_decay=0.0, **COMMON)
