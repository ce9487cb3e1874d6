"""What action values are trained towards, by hand."""

from __future__ import annotations

import pytest
import torch

from mtrl_cli.agents.targets import bootstrap_value, huber, n_step_return, td_target


def test_n_step_return_by_hand() -> None:
    # 1 + 0.5 * 2 + 0.25 * 4 = 3;  -8 + 0.5 * 0 + 0.25 * 6 = -6.5;  windows that end early are filled with zeros: 10 + 0.5 * 4 = 12
    rewards = torch.tensor([[[1.0, 2.0, 4.0], [-8.0, 0.0, 6.0]], [[10.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    assert n_step_return(rewards, 0.5).tolist() == [[3.0, -6.5], [12.0, 0.0]]


def test_without_discount_rewards_are_summed_and_with_none_only_the_first_counts() -> None:
    rewards = torch.tensor([[[1.0, 2.0, 4.0]]])
    assert n_step_return(rewards, 1.0).item() == 7
    assert n_step_return(rewards, 0.0).item() == 1


def test_bootstrap_value_by_hand() -> None:
    # The target network finds action 1 best (5), the online network action 2, which the target network values at 3.
    target = torch.tensor([[[1.0, 5.0, 3.0]]])
    online = torch.tensor([[[0.0, 2.0, 9.0]]])
    assert bootstrap_value(target, target).item() == 5
    assert bootstrap_value(target, online).item() == 3


def test_an_invalid_action_is_never_bootstrapped_from() -> None:
    minus = -torch.inf
    values = torch.tensor([[[-7.0, -9.0, minus, minus]], [[-3.0, -4.0, -1.0, minus]]])
    online = torch.tensor([[[-80.0, -70.0, minus, minus]], [[-1e30, -1e38, -1e31, minus]]])
    assert bootstrap_value(values, values).tolist() == [[-7.0], [-1.0]]
    assert bootstrap_value(values, online).tolist() == [[-9.0], [-3.0]]


def test_td_target_by_hand() -> None:
    # gamma 0.5: three steps on, 2 + 0.125 * 8 = 3; cut short after one step, 2 + 0.5 * 8 = 6; terminated, 2; nothing seen, 0 + 1 * 8
    target = td_target(
        return_KB=torch.tensor([[2.0, 2.0, 2.0, 0.0]]),
        steps_KB=torch.tensor([[3, 1, 3, 0]]),
        terminated_KB=torch.tensor([[False, False, True, False]]),
        value_KB=torch.tensor([[8.0, 8.0, 8.0, 8.0]]),
        gamma=0.5,
    )
    assert target.tolist() == [[3.0, 6.0, 2.0, 8.0]]


def test_nothing_leaks_from_behind_a_terminal_state() -> None:
    """The next value of a terminated window is of no meaning, and may be anything."""
    value = torch.tensor([[torch.inf, -torch.inf, torch.nan]])
    target = td_target(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), value, 0.99)
    assert target.tolist() == [[1.0, 1.0, 1.0]]


def test_huber_by_hand() -> None:
    error = torch.tensor([0.0, 0.5, -1.0, 2.0, -3.0])
    # threshold 1: e^2 / 2 to 1, then |e| - 1/2
    assert huber(error, 1.0).tolist() == [0.0, 0.125, 0.5, 1.5, 2.5]
    # threshold 2: e^2 / 2 to 2, then 2 (|e| - 1)
    assert huber(error, 2.0).tolist() == [0.0, 0.125, 0.5, 2.0, 4.0]
    assert huber(error, 0.0).tolist() == [0.0, 0.125, 0.5, 2.0, 4.5]


@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
def test_huber_agrees_with_torch(threshold: float) -> None:
    error = torch.linspace(-5, 5, 101)
    expected = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=threshold)
    assert torch.allclose(huber(error, threshold), expected)


def test_hubers_gradient_is_the_error_clipped() -> None:
    error = torch.tensor([-4.0, -0.5, 0.5, 4.0], requires_grad=True)
    huber(error, 1.0).sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [-1.0, -0.5, 0.5, 1.0]
