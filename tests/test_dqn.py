"""DQN: losses worked out by hand on tables of action values, the target network, and its settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fake_tasks import stream_of
from mtrl_cli.agents.dqn import DQN
from mtrl_cli.agents.value_scale import ClipRewards, NoValueScale, ValueScale
from mtrl_cli.networks.heads import PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay import Batch

STATES = 3


class Table(nn.Module):
    """Action values by state, which is observed as a one-hot vector: `[K, STATES, A]`; None is an action that the task does not have."""

    def __init__(self, values: list[list[list[float | None]]]):
        super().__init__()
        self.head = PlainHead(1, [sum(value is not None for value in task[0]) for task in values])
        self.values = nn.Parameter(torch.tensor([[[value or 0.0 for value in state] for state in task] for task in values]))

    def outputs(self, observation: torch.Tensor) -> torch.Tensor:
        return torch.bmm(observation, self.values)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.head.values(self.outputs(observation))


SETTINGS: dict[str, Any] = {
    "batch_size": 3,
    "samples_per_step": 1.0,
    "learning_starts": 0,
    "gamma": 0.5,
    "n_step": 3,
    "double": False,
    "huber": 1.0,
    "target_period": 1,
    "target_tau": 0.0,
    "epsilon_start": 1.0,
    "epsilon_end": 0.1,
    "epsilon_steps": 100,
    "epsilon_tasks": {},
    "reward_factors": {},
}

# One task of three states and two actions.
ONLINE = [[[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]]]
TARGET = [[[0.0, 0.0], [8.0, 2.0], [6.0, 4.0]]]


def agent(online: list, target: list, value_scale: ValueScale | None = None, names: tuple[str, ...] = ("pong",), **changes: Any) -> DQN:
    compile_with: Callable = changes.pop("compile_with", lambda function: function)
    network: MultiTaskNetwork = Table(online)  # type: ignore[assignment]
    made = DQN(network, value_scale or NoValueScale(stream_of(names)), names, compile_with, **(SETTINGS | changes))
    made.target_network.load_state_dict(Table(target).state_dict())
    return made


def one_hot(states: list[list[int]]) -> torch.Tensor:
    """`[K, B, 1, STATES]`: stacks of one frame."""
    return nn.functional.one_hot(torch.tensor(states), STATES).float()[:, :, None]


def batch() -> Batch:
    return Batch(
        observation=one_hot([[0, 1, 2]]),
        action=torch.tensor([[1, 0, 1]]),
        rewards=torch.tensor([[[1.0, 2.0, 4.0], [2.0, 0.0, 0.0], [0.0, 6.0, 0.0]]]),
        steps=torch.tensor([[3, 1, 2]]),
        terminated=torch.tensor([[False, True, False]]),
        next_observation=one_hot([[1, 1, 2]]),
        weight=torch.tensor([[1.0, 0.5, 1.0]]),
        index=torch.zeros(1, 3, dtype=torch.int64),
    )


# -- losses -------------------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    """gamma 0.5; the target network's best values are 8 in state 1 and 6 in state 2.

    1 + 2/2 + 4/4 + 8/8 = 4 against 2: error 2, Huber 1.5
    2, terminated, against 3: error 1, Huber 0.5, weight 0.5
    0 + 6/2 + 6/4 = 4.5 against -1: error 5.5, Huber 5
    """
    losses = agent(ONLINE, TARGET).losses(batch())
    assert losses.error_KB.tolist() == [[2.0, 1.0, 5.5]]
    assert losses.loss_KB.tolist() == [[1.5, 0.25, 5.0]]
    assert losses.q_K.tolist() == [pytest.approx((2 + 3 - 1) / 3)]


def test_double_lets_the_online_network_choose() -> None:
    """In state 1 it prefers action 1, which the target network values at 2: 1 + 1 + 1 + 2/8 = 3.25 against 2. In state 2 both agree."""
    losses = agent(ONLINE, TARGET, double=True).losses(batch())
    assert losses.error_KB.tolist() == [[1.25, 1.0, 5.5]]
    assert losses.loss_KB.tolist() == [[0.75, 0.25, 5.0]]


def test_without_huber_errors_are_squared() -> None:
    assert agent(ONLINE, TARGET, huber=0.0).losses(batch()).loss_KB.tolist() == [[2.0, 0.25, 15.125]]


def test_rewards_are_clipped_one_by_one_in_the_learner_only() -> None:
    """1 + 1/2 + 1/4 + 8/8 = 2.75 against 2; 1 against 3; 1/2 + 6/4 = 2 against -1."""
    given = batch()
    losses = agent(ONLINE, TARGET, ClipRewards(stream_of(["pong"]), limit=1.0)).losses(given)
    assert losses.error_KB.tolist() == [[0.75, 2.0, 3.0]]
    assert given.rewards.max() == 6.0


def test_value_scales() -> None:
    rewards = torch.tensor([-200.0, -0.5, 0.0, 2.0])
    assert ClipRewards(stream_of(["pong"])).rewards(rewards).tolist() == [-1.0, -0.5, 0.0, 1.0]
    assert ClipRewards(stream_of(["pong"]), limit=10.0).rewards(rewards).tolist() == [-10.0, -0.5, 0.0, 2.0]
    assert NoValueScale(stream_of(["pong"])).rewards(rewards).tolist() == rewards.tolist()


@pytest.mark.parametrize("double", [False, True])
def test_the_gradient_passes_through_the_chosen_values_only(double: bool) -> None:
    """d Huber / d q = -clip(error), times the weight; nothing flows into the target."""
    made = agent(ONLINE, TARGET, double=double)
    made.losses(batch()).loss_KB.sum().backward()
    assert made.network.values.grad.tolist() == [[[0.0, -1.0], [0.5, 0.0], [0.0, -1.0]]]
    assert made.target_network.values.grad is None


@pytest.mark.parametrize("double", [False, True])
def test_a_target_never_takes_an_action_that_the_task_does_not_have(double: bool) -> None:
    """The first task has one action, of value -4; the second two. All rewards are 0, so that targets are -4/8 and 3/8."""
    online = [[[-9.0, None]] * 3, [[5.0, 7.0]] * 3]
    target = [[[-4.0, None]] * 3, [[1.0, 3.0]] * 3]
    made = agent(online, target, names=("one", "two"), double=double)
    given = Batch(
        observation=one_hot([[0], [0]]),
        action=torch.tensor([[0], [1]]),
        rewards=torch.zeros(2, 1, 3),
        steps=torch.full((2, 1), 3),
        terminated=torch.zeros(2, 1, dtype=torch.bool),
        next_observation=one_hot([[1], [1]]),
        weight=torch.ones(2, 1),
        index=torch.zeros(2, 1, dtype=torch.int64),
    )
    assert made.losses(given).error_KB.tolist() == [[8.5], [6.625]]


def test_a_sample_of_weight_zero_says_nothing() -> None:
    made, given = agent(ONLINE, TARGET), batch()
    given.weight = torch.tensor([[0.0, 0.0, 0.0]])
    losses = made.losses(given)
    losses.loss_KB.sum().backward()
    assert losses.loss_KB.tolist() == [[0.0, 0.0, 0.0]]
    assert not made.network.values.grad.any()


def test_stacked_frames_reach_the_network_as_channels() -> None:
    seen = []

    class Watching(Table):
        def outputs(self, observation: torch.Tensor) -> torch.Tensor:
            seen.append(observation.shape)
            return super().outputs(observation[..., :STATES])

    made, given = agent(ONLINE, TARGET), batch()
    made.network, made.target_network = Watching(ONLINE), Watching(TARGET)
    given.observation = torch.cat([given.observation] * 2, 2)
    given.next_observation = torch.cat([given.next_observation] * 2, 2)
    made.losses(given)
    assert set(seen) == {(1, 3, 2 * STATES)}


def test_what_compiles_is_given_the_arithmetic() -> None:
    compiled = []

    def compile_with(function: Callable) -> Callable:
        compiled.append(function)
        return function

    made = agent(ONLINE, TARGET, compile_with=compile_with)
    made.losses(batch())
    assert len(compiled) == 1


# -- target network -------------------------------------------------------------------------------------------------------------


def values(network: nn.Module) -> list:
    return network.values.tolist()


def test_by_period_the_target_is_a_copy_every_so_many_updates() -> None:
    made = agent(ONLINE, TARGET, target_period=3)
    for update in range(1, 7):
        with torch.no_grad():
            made.network.values.fill_(update)
        made.after_update(update)
        expected = {1: TARGET[0][1][0], 2: TARGET[0][1][0], 3: 3, 4: 3, 5: 3, 6: 6}[update]
        assert values(made.target_network)[0][1][0] == expected


def test_as_a_moving_average_the_target_goes_a_share_of_the_way_at_every_update() -> None:
    made = agent([[[4.0, 8.0]] * 3], [[[0.0, 0.0]] * 3], target_period=0, target_tau=0.25)
    made.after_update(1)
    assert values(made.target_network) == [[[1.0, 2.0]] * 3]
    made.after_update(2)  # a quarter of what is left: 1 + 3/4, 2 + 6/4
    assert values(made.target_network) == [[[1.75, 3.5]] * 3]


def test_the_target_starts_as_a_copy_that_is_not_trained() -> None:
    network: MultiTaskNetwork = Table(ONLINE)  # type: ignore[assignment]
    made = DQN(network, NoValueScale(stream_of(["pong"])), ["pong"], lambda function: function, **SETTINGS)
    assert values(made.target_network) == ONLINE
    with torch.no_grad():
        made.network.values.zero_()
    assert values(made.target_network) == ONLINE
    assert not any(parameter.requires_grad for parameter in made.target_network.parameters())


def test_the_target_network_is_part_of_the_state() -> None:
    made, fresh = agent(ONLINE, TARGET), agent(ONLINE, ONLINE)
    fresh.load_state_dict(copy.deepcopy(made.state_dict()))
    assert values(fresh.target_network) == TARGET
    assert values(fresh.network) == ONLINE


# -- settings -------------------------------------------------------------------------------------------------------------------


def test_epsilon_of_single_tasks_is_set_by_name() -> None:
    two = [ONLINE[0], ONLINE[0]]
    made = agent(two, two, names=("pong", "qbert"), epsilon_tasks={"qbert": 0.5})
    assert made.epsilon(0).tolist() == [1.0, 1.0]
    assert made.epsilon(100) == pytest.approx(np.array([0.1, 0.5]))


def test_epsilon_of_a_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        agent(ONLINE, TARGET, epsilon_tasks={"pnog": 0.5})
    assert "pnog" in str(refused.value)
    assert "pong" in str(refused.value)


def test_a_target_network_that_would_never_move_is_refused() -> None:
    with pytest.raises(ValueError, match=r"agent\.target_tau"):
        agent(ONLINE, TARGET, target_period=0, target_tau=0.0)
