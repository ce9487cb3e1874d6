"""Targets of action values: n-step returns, bootstrapping and lambda-returns against hand-computed values."""

from __future__ import annotations

import pytest
import torch

from mtrl_cli.agents.targets import bootstrap_value, discount, lambda_returns, n_step_return, of_action
from mtrl_cli.networks.value_losses import td_target


def test_n_step_return_is_the_discounted_sum_of_rewards() -> None:
    # 1 + 0.5 * 2 + 0.25 * 4 = 3;  -8 + 0.5 * 0 + 0.25 * 6 = -6.5;  windows that end early are padded with zeros: 10 + 0.5 * 4 = 12
    rewards = torch.tensor([[[1.0, 2.0, 4.0], [-8.0, 0.0, 6.0]], [[10.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    assert n_step_return(rewards, 0.5).tolist() == [[3.0, -6.5], [12.0, 0.0]]


def test_n_step_return_for_discounts_one_and_zero() -> None:
    rewards = torch.tensor([[[1.0, 2.0, 4.0]]])
    assert n_step_return(rewards, 1.0).item() == 7
    assert n_step_return(rewards, 0.0).item() == 1


def test_double_q_learning_evaluates_the_online_action_with_the_target_network() -> None:
    # Action 1 is greedy for the target network (5), action 2 for the online network. The target network values action 2 at 3.
    target = torch.tensor([[[1.0, 5.0, 3.0]]])
    online = torch.tensor([[[0.0, 2.0, 9.0]]])
    assert bootstrap_value(target, target).item() == 5
    assert bootstrap_value(target, online).item() == 3


def test_invalid_action_is_never_bootstrapped_from() -> None:
    minus = -torch.inf
    values = torch.tensor([[[-7.0, -9.0, minus, minus]], [[-3.0, -4.0, -1.0, minus]]])
    online = torch.tensor([[[-80.0, -70.0, minus, minus]], [[-1e30, -1e38, -1e31, minus]]])
    assert bootstrap_value(values, values).tolist() == [[-7.0], [-1.0]]
    assert bootstrap_value(values, online).tolist() == [[-9.0], [-3.0]]


def test_td_target_bootstraps_unless_terminated() -> None:
    # gamma 0.5: after three steps, 2 + 0.125 * 8 = 3; truncated after one step, 2 + 0.5 * 8 = 6; terminated, 2; zero steps, 0 + 1 * 8
    discount_KB = discount(torch.tensor([[3, 1, 3, 0]]), torch.tensor([[False, False, True, False]]), 0.5)
    assert discount_KB.tolist() == [[0.125, 0.5, 0.0, 1.0]]
    target = td_target(torch.tensor([[2.0, 2.0, 2.0, 0.0]]), discount_KB, torch.full((1, 4), 8.0))
    assert target.tolist() == [[3.0, 6.0, 2.0, 8.0]]


def test_value_after_a_terminal_state_is_ignored() -> None:
    """The value after a terminated window is undefined and must not affect the target."""
    value = torch.tensor([[torch.inf, -torch.inf, torch.nan]])
    target = td_target(torch.ones(1, 3), discount(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), 0.99), value)
    assert target.tolist() == [[1.0, 1.0, 1.0]]


def test_of_action_selects_values_or_distributions() -> None:
    outputs = torch.randn(2, 3, 4, 5)
    action = torch.randint(4, (2, 3))
    for k in range(2):
        for b in range(3):
            assert torch.equal(of_action(outputs, action)[k, b], outputs[k, b, action[k, b]])
            assert torch.equal(of_action(outputs[..., 0], action)[k, b], outputs[k, b, action[k, b], 0])
    # The greedy action of three is the second, with the distribution [1, 2].
    next_outputs = torch.tensor([[[[9.0, 9.0], [1.0, 2.0], [0.0, 0.0]]]])
    assert bootstrap_value(next_outputs, torch.tensor([[[0.0, 7.0, 5.0]]])).tolist() == [[[1.0, 2.0]]]


# -- lambda-returns -----------------------------------------------------------------------------------------------------------


def returns_of(
    rewards: list[float], values: list[float], trace_decay: float, terminated: tuple[int, ...] = (), truncated: tuple[int, ...] = ()
) -> list[float]:
    """Lambda-returns of one environment with gamma 0.5; `terminated` and `truncated` are step numbers."""

    def column(numbers: list) -> torch.Tensor:
        return torch.tensor(numbers)[None, :, None]

    ends = [column([step in where for step in range(len(rewards))]) for where in (terminated, truncated)]
    return lambda_returns(column(rewards), column(values), *ends, 0.5, trace_decay).flatten().tolist()


def test_lambda_returns_equal_hand_computed_values() -> None:
    """G_2 = 4 + 0.5 * 16 = 12; G_1 = 2 + 0.5 * (0.5 * 6 + 0.5 * 12) = 6.5; G_0 = 1 + 0.5 * (0.5 * 10 + 0.5 * 6.5) = 5.125."""
    assert returns_of([1.0, 2.0, 4.0], [99.0, 10.0, 6.0, 16.0], 0.5) == [5.125, 6.5, 12.0]


def test_lambda_zero_gives_one_step_returns_and_lambda_one_the_whole_rollout() -> None:
    # 1 + 10/2, 2 + 6/2, 4 + 16/2;  1 + 2/2 + 4/4 + 16/8, 2 + 4/2 + 16/4, 4 + 16/2
    assert returns_of([1.0, 2.0, 4.0], [99.0, 10.0, 6.0, 16.0], 0.0) == [6.0, 5.0, 12.0]
    assert returns_of([1.0, 2.0, 4.0], [99.0, 10.0, 6.0, 16.0], 1.0) == [5.0, 8.0, 12.0]


def test_return_includes_nothing_of_the_next_episode() -> None:
    """Step 1 ends an episode. If terminated, its return is its reward; if truncated, step 0 bootstraps from its value."""
    ended = returns_of([1.0, 2.0, 4.0], [99.0, 10.0, 6.0, 16.0], 0.5, terminated=(1,))
    assert ended == [1 + 0.5 * (0.5 * 10 + 0.5 * 2), 2.0, 12.0]
    cut = returns_of([1.0, 2.0, 4.0], [99.0, 10.0, 6.0, 16.0], 0.5, truncated=(1,))
    assert cut == [1 + 0.5 * 10, 10.0, 12.0]
    assert returns_of([1.0, 2.0], [0.0, 0.0, 16.0], 0.5, terminated=(1,)) == [1.5, 2.0]


def reference_return(rewards: list, values: list, terminated: list, truncated: list, t: int, gamma: float, trace_decay: float) -> float:
    """Return the weighted sum of all n-step returns from a step, each summed separately (Sutton and Barto 2018, equation 12.3)."""
    if truncated[t]:
        return values[t]

    def n_step(n: int) -> float:
        total = 0.0
        for k in range(n):
            if truncated[t + k]:
                return total + gamma**k * values[t + k]
            total += gamma**k * rewards[t + k]
            if terminated[t + k]:
                return total
        return total + gamma**n * values[t + n]

    longest = len(rewards) - t
    shares = [(1 - trace_decay) * trace_decay ** (n - 1) for n in range(1, longest)] + [trace_decay ** (longest - 1)]
    return sum(share * n_step(n) for n, share in enumerate(shares, start=1))


@pytest.mark.parametrize("seed", range(8))
def test_lambda_returns_are_the_weighted_sum_of_all_n_step_returns(seed: int) -> None:
    torch.manual_seed(seed)
    K, T, N, gamma, trace_decay = 2, 1 + 2 * seed, 3, 0.9, [0.0, 0.3, 0.65, 0.95, 1.0][seed % 5]
    rewards, values = torch.randn(K, T, N), torch.randn(K, T + 1, N)
    draw = torch.rand(K, T, N)
    terminated, truncated = draw < 0.2, (draw >= 0.2) & (draw < 0.4)
    found = lambda_returns(rewards, values, terminated, truncated, gamma, trace_decay)
    for k in range(K):
        for n in range(N):
            columns = [each[k, :, n].tolist() for each in (rewards, values, terminated, truncated)]
            expected = [reference_return(*columns, t, gamma, trace_decay) for t in range(T)]
            assert found[k, :, n].tolist() == pytest.approx(expected, abs=1e-5)
