"""What action values are trained towards, by hand."""

from __future__ import annotations

import torch

from mtrl_cli.agents.targets import bootstrap_value, discount, n_step_return, of_action
from mtrl_cli.networks.value_losses import td_target


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
    discount_KB = discount(torch.tensor([[3, 1, 3, 0]]), torch.tensor([[False, False, True, False]]), 0.5)
    assert discount_KB.tolist() == [[0.125, 0.5, 0.0, 1.0]]
    target = td_target(torch.tensor([[2.0, 2.0, 2.0, 0.0]]), discount_KB, torch.full((1, 4), 8.0))
    assert target.tolist() == [[3.0, 6.0, 2.0, 8.0]]


def test_nothing_leaks_from_behind_a_terminal_state() -> None:
    """The next value of a terminated window is of no meaning, and may be anything."""
    value = torch.tensor([[torch.inf, -torch.inf, torch.nan]])
    target = td_target(torch.ones(1, 3), discount(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), 0.99), value)
    assert target.tolist() == [[1.0, 1.0, 1.0]]


def test_what_is_said_of_one_action_is_its_value_or_its_whole_distribution() -> None:
    outputs = torch.randn(2, 3, 4, 5)
    action = torch.randint(4, (2, 3))
    for k in range(2):
        for b in range(3):
            assert torch.equal(of_action(outputs, action)[k, b], outputs[k, b, action[k, b]])
            assert torch.equal(of_action(outputs[..., 0], action)[k, b], outputs[k, b, action[k, b], 0])
    # The best of three actions, of value 1 + 2, is the second.
    next_outputs = torch.tensor([[[[9.0, 9.0], [1.0, 2.0], [0.0, 0.0]]]])
    assert bootstrap_value(next_outputs, torch.tensor([[[0.0, 7.0, 5.0]]])).tolist() == [[[1.0, 2.0]]]
