"""Optimizers: clipping, schedules and state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

from mtrl_cli.training.optimizers import SGD, Adam, AdamW, Optimizer, RAdam, RMSprop, lr_factor


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


def adam(of: list[torch.nn.Parameter], max_grad_norm: float = 0.0, weight_decay: float = 0.0) -> Adam:
    return Adam(of, lr=0.1, eps=1e-3, weight_decay=weight_decay, max_grad_norm=max_grad_norm)


def radam(of: list[torch.nn.Parameter], max_grad_norm: float = 0.0) -> RAdam:
    return RAdam(of, lr=0.1, eps=1e-6, weight_decay=0.0, max_grad_norm=max_grad_norm)


def give(of: list[torch.nn.Parameter], scale: float = 1.0) -> None:
    """The gradient [3, 0], [[4]]: of norm 5."""
    of[0].grad, of[1].grad = torch.tensor([3.0, 0.0]) * scale, torch.tensor([[4.0]]) * scale


def step(optimizer: Optimizer) -> torch.Tensor:
    """Clip and step. Returns the gradient norm."""
    norm = optimizer.clip_gradients()
    optimizer.step()
    return norm


@pytest.mark.parametrize(("max_grad_norm", "factor"), [(0.0, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_the_first_step_by_hand(max_grad_norm: float, factor: float) -> None:
    """Adam's bias-corrected first step is lr * g / (|g| + eps), g being the clipped gradient."""
    own = parameters()
    optimizer = adam(own, max_grad_norm)
    give(own)
    norm = step(optimizer)
    assert norm.item() == pytest.approx(5.0)  # before clipping
    three, four = 3 * factor, 4 * factor
    assert own[0].tolist() == pytest.approx([1 - 0.1 * three / (three + 1e-3), 2.0], rel=1e-5)
    assert own[1].item() == pytest.approx(3 - 0.1 * four / (four + 1e-3), rel=1e-5)


def test_step_deletes_the_gradients() -> None:
    own = parameters()
    optimizer = adam(own)
    give(own)
    step(optimizer)
    assert [parameter.grad for parameter in own] == [None, None]


def test_many_steps_agree_with_torchs_adam() -> None:
    own, plain = parameters(), parameters()
    optimizer = adam(own, max_grad_norm=2.0, weight_decay=0.01)
    reference = torch.optim.Adam(plain, lr=0.1, eps=1e-3, weight_decay=0.01)
    for turn in range(20):
        give(own, turn - 7.0)
        give(plain, turn - 7.0)
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
        give(own, turn + 1.0)
        step(optimizer)
    twin_parameters = copy.deepcopy(own)
    twin = make(twin_parameters, max_grad_norm=1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for turn in range(3):
        for each, of in ((optimizer, own), (twin, twin_parameters)):
            give(of, turn - 1.5)
            step(each)
    for ours, theirs in zip(own, twin_parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_state_before_the_first_step_is_empty() -> None:
    own = parameters()
    optimizer = adam(own)
    assert optimizer.state_dict() == {}
    optimizer.load_state_dict({})
    give(own)
    step(optimizer)
    assert sorted(optimizer.state_dict()) == ["0", "1"]


def test_learning_rate_falls_linearly_over_the_run() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Adam([parameter], lr=0.1, lr_final=0.2, eps=1e-12, weight_decay=0.0, max_grad_norm=0.0)
    for progress, lr in ((0.0, 0.1), (0.5, 0.06), (1.0, 0.02), (2.0, 0.02)):
        # With one constant gradient, an Adam step has the length of its step size.
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.set_lr(progress)
        step(optimizer)
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
        step(optimizer)
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
def test_schedules_by_hand(schedule: str, shares: list[float]) -> None:
    found = [lr_factor(schedule, 0.2, progress) for progress in (0.0, 0.25, 0.5, 1.0, 1.5)]  # type: ignore[arg-type]
    assert found == pytest.approx(shares, abs=1e-6)


def step_sizes(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer._optimizer.param_groups]


def test_before_learning_was_due_a_warm_up_stands_at_nothing_and_none_changes_nothing() -> None:
    """Where an update is timed, it is made at step 0."""
    plain, warmed = (Adam(parameters(), lr=0.1, warm_up=steps, eps=1e-3, weight_decay=0.0, max_grad_norm=0.0) for steps in (0, 40))
    for optimizer, lr in ((plain, 0.1), (warmed, 0.0)):
        optimizer.set_lr(0.0, learning_for=-100)
        assert optimizer._optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_warm_up_grows_from_nothing_and_then_leaves_the_schedule_alone() -> None:
    optimizer = Adam(parameters(), lr=0.1, lr_final=0.5, warm_up=40, eps=1e-3, weight_decay=0.0, max_grad_norm=0.0)
    # Half way through the run the linear schedule leaves 0.75 of lr.
    for learning_for, lr in ((0, 0.0), (10, 0.01875), (39, 0.073125), (40, 0.075), (1000, 0.075)):
        optimizer.set_lr(0.5, learning_for)
        assert step_sizes(optimizer) == pytest.approx([lr])


def test_a_cosine_that_goes_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lr_final=0"):
        Adam(parameters(), lr=0.1, schedule="cosine", eps=1e-3, weight_decay=0.0, max_grad_norm=0.0)


# -- factors, parts without a gradient, and torch's own -----------------------------------------------------------------------

COMMON = {"lr": 0.05, "max_grad_norm": 1.5}
ALL: list[tuple[type[Optimizer], dict[str, object], type[torch.optim.Optimizer], dict[str, object]]] = [
    (Adam, {"eps": 1e-4, "weight_decay": 0.01}, torch.optim.Adam, {"eps": 1e-4, "weight_decay": 0.01}),
    (AdamW, {"eps": 1e-4, "weight_decay": 0.1}, torch.optim.AdamW, {"eps": 1e-4, "weight_decay": 0.1}),
    (RAdam, {"eps": 1e-4, "weight_decay": 0.01}, torch.optim.RAdam, {"eps": 1e-4, "weight_decay": 0.01}),
    (
        RMSprop,
        {"alpha": 0.9, "eps": 1e-4, "momentum": 0.5, "centred": True, "weight_decay": 0.01},
        torch.optim.RMSprop,
        {"alpha": 0.9, "eps": 1e-4, "momentum": 0.5, "centered": True, "weight_decay": 0.01},
    ),
    (
        SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    (SGD, {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}, torch.optim.SGD, {}),
]
KINDS = ["torso", "heads", "torso", "sharing"]


def four(seed: int = 0) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((3, 2), (4,), (2, 2), (5,))]


def pull(of: list[torch.nn.Parameter], turn: int, frozen: tuple[int, ...] = ()) -> None:
    """Gradients of a turn; those of frozen parameters are None."""
    random = torch.Generator().manual_seed(100 + turn)
    for index, parameter in enumerate(of):
        gradient = torch.randn(parameter.shape, generator=random)
        parameter.grad = None if index in frozen else gradient


@pytest.mark.parametrize(("kind", "options", "reference", "its"), ALL)
def test_twenty_steps_with_factors_and_a_part_that_is_frozen_and_thawed_agree_with_torchs_own(
    kind: type[Optimizer], options: dict[str, object], reference: type[torch.optim.Optimizer], its: dict[str, object]
) -> None:
    """The oracle has a plain optimizer for each parameter, that of the frozen one made when it thaws: so it knows of no groups."""
    own, plain = four(), four()
    optimizer = kind(own, KINDS, factors={"torso": 0.1, "heads": 2.0}, **options, **COMMON)  # type: ignore[arg-type]
    factors, thaws = [0.1, 2.0, 0.1, 1.0], 8
    each: dict[int, torch.optim.Optimizer] = {}
    before = own[2].detach().clone()
    for turn in range(20):
        frozen = (2,) if turn < thaws else ()
        if turn == thaws:
            assert torch.equal(own[2], before)  # neither moved nor decayed
            assert sorted(optimizer.state_dict()) in (["0", "1", "3"], [])
        pull(own, turn, frozen)
        pull(plain, turn, frozen)
        torch.nn.utils.clip_grad_norm_(plain, 1.5)
        optimizer.set_lr(turn / 40)
        step(optimizer)
        for index, parameter in enumerate(plain):
            if index not in frozen:
                made = each.setdefault(index, reference([parameter], lr=0.05 * factors[index], **its))  # type: ignore[call-arg]
                made.step()
    for ours, theirs in zip(own, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("kind", "options", "reference", "its"), ALL)
def test_a_state_goes_on_by_position_whatever_the_groups_and_whatever_has_none_yet(
    kind: type[Optimizer], options: dict[str, object], reference: type[torch.optim.Optimizer], its: dict[str, object]
) -> None:
    """A parameter's moments are its own with other factors, and one that never moved begins when it does."""

    def made(of: list[torch.nn.Parameter], **factors: float) -> Optimizer:
        return kind(of, KINDS, factors=factors, **options, **COMMON)  # type: ignore[arg-type]

    own = four()
    optimizer = made(own, torso=0.1, heads=2.0)
    for turn in range(3):
        pull(own, turn, frozen=(0,))
        step(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    assert "0" not in state
    twin_parameters = copy.deepcopy(own)
    twin = made(twin_parameters, torso=0.1, heads=2.0)
    twin.load_state_dict(copy.deepcopy(state))
    for turn in range(3, 7):
        for one, of in ((optimizer, own), (twin, twin_parameters)):
            pull(of, turn)
            step(one)
    for ours, theirs in zip(own, twin_parameters, strict=True):
        assert torch.equal(ours, theirs)
    regrouped = made(four(), sharing=3.0)
    regrouped.load_state_dict(copy.deepcopy(state))
    for index, values in regrouped.state_dict().items():
        assert {name: value.tolist() for name, value in values.items()} == {name: value.tolist() for name, value in state[index].items()}


@pytest.mark.parametrize(("kind", "options", "reference", "its"), ALL)
def test_what_is_forgotten_moves_like_new(
    kind: type[Optimizer], options: dict[str, object], reference: type[torch.optim.Optimizer], its: dict[str, object]
) -> None:
    own = four()
    optimizer = kind(own, **options, **COMMON)  # type: ignore[arg-type]
    for turn in range(5):
        pull(own, turn)
        step(optimizer)
    optimizer.reset_state(own[:2])
    new_parameters = copy.deepcopy(own)
    new = kind(new_parameters, **options, **COMMON)  # type: ignore[arg-type]
    for turn in range(5, 8):
        for one, of in ((optimizer, own), (new, new_parameters)):
            pull(of, turn)
            step(one)
    assert torch.equal(own[0], new_parameters[0])
    assert torch.equal(own[1], new_parameters[1])
    assert not options["weight_decay"] or not torch.equal(own[2], new_parameters[2])  # plain SGD has nothing to forget


def test_factors_without_known_parts_and_nesterov_without_momentum_are_refused() -> None:
    with pytest.raises(ValueError, match="parts of this network"):
        Adam(four(), factors={"torso": 0.1}, eps=1e-3, weight_decay=0.0, **COMMON)
    with pytest.raises(ValueError, match=r"optimizer\.momentum"):
        SGD(four(), momentum=0.0, nesterov=True, weight_decay=0.0, **COMMON)
