"""Epsilon-greedy actions, and the schedule of epsilon."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mtrl_cli.agents.acting import EpsilonGreedy, EpsilonSchedule
from mtrl_cli.networks.network import MultiTaskNetwork

ACTIONS = [3, 1, 5]


class PrefersLastAction(nn.Module):
    """A network whose greedy action is each task's last action, for all observations."""

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        assert observation.shape[2:] == (4, 2), "frames are stacked as channels"
        q = torch.arange(5.0).expand(*observation.shape[:2], 5)
        return q.masked_fill(torch.arange(5) >= torch.tensor(ACTIONS)[:, None, None], -torch.inf)


def actor(seed: int = 0) -> EpsilonGreedy:
    network: MultiTaskNetwork = PrefersLastAction()  # type: ignore[assignment]
    return EpsilonGreedy(network, ACTIONS, torch.device("cpu"), seed)


def act(actor: EpsilonGreedy, epsilon: list[float], envs: int = 3000) -> torch.Tensor:
    return actor.act(torch.zeros(3, envs, 2, 2, 2), np.array(epsilon, np.float32))


def test_action_is_greedy_for_epsilon_zero() -> None:
    action = act(actor(), [0.0] * 3)
    assert action.dtype == torch.int64
    assert action.shape == (3, 3000)
    assert (action == torch.tensor([[2], [0], [4]])).all()


def test_returned_value_is_the_maximum_for_any_epsilon() -> None:
    _, value_KN = actor().choose(torch.zeros(3, 2, 2, 2, 2), torch.tensor([1.0, 0.5, 0.0]))
    assert value_KN.tolist() == [[2.0, 2.0], [0.0, 0.0], [4.0, 4.0]]


def test_random_actions_are_uniform_over_each_tasks_actions() -> None:
    action = act(actor(), [1.0] * 3)
    for task, number in enumerate(ACTIONS):
        counts = torch.bincount(action[task])
        assert len(counts) == number
        assert (counts / 3000 - 1 / number).abs().max() < 0.04


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 0.9])
def test_random_actions_have_probability_epsilon(epsilon: float) -> None:
    """One of five random actions is the greedy one."""
    other = (act(actor(), [0.0, 1.0, epsilon], envs=20_000)[2] != 4).float().mean()
    assert float(other) == pytest.approx(epsilon * 0.8, abs=0.02)


def test_epsilon_is_task_specific() -> None:
    action = act(actor(), [0.0, 0.0, 1.0])
    assert (action[0] == 2).all()
    assert len(action[2].unique()) == 5


def test_random_actions_differ_between_environments_and_steps() -> None:
    explorer = actor()
    one, two = act(explorer, [1.0] * 3), act(explorer, [1.0] * 3)
    assert not torch.equal(one, two)
    assert len(one[2, :50].unique()) > 1


def test_actions_depend_only_on_the_seed() -> None:
    assert torch.equal(act(actor(1), [0.5] * 3), act(actor(1), [0.5] * 3))
    assert not torch.equal(act(actor(1), [0.5] * 3), act(actor(2), [0.5] * 3))


def test_restored_actor_continues_identically() -> None:
    one, two = actor(1), actor(2)
    act(one, [0.5] * 3)
    two.load_state_dict(one.state_dict())
    assert torch.equal(act(one, [0.5] * 3), act(two, [0.5] * 3))


def test_acting_computes_no_gradient() -> None:
    linear = nn.Linear(4, 2)
    greedy: MultiTaskNetwork = linear  # type: ignore[assignment]
    EpsilonGreedy(greedy, [2], torch.device("cpu"), 0).act(torch.ones(1, 3, 1, 4), np.zeros(1, np.float32))
    assert linear.weight.grad is None


# -- schedule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"), [(0, [1.0, 1.0]), (25, [0.775, 0.875]), (50, [0.55, 0.75]), (100, [0.1, 0.5]), (10**9, [0.1, 0.5])]
)
def test_epsilon_decreases_linearly_to_each_tasks_final_value(step: int, expected: list[float]) -> None:
    epsilon = EpsilonSchedule(1.0, [0.1, 0.5], 100)(step)
    assert epsilon.dtype == np.float32
    assert epsilon == pytest.approx(expected, rel=1e-6)


def test_schedule_of_zero_steps_starts_at_the_final_values() -> None:
    assert EpsilonSchedule(1.0, [0.0, 0.25], 0)(0).tolist() == [0.0, 0.25]


@pytest.mark.parametrize("end", [0.0, 0.001, 0.01, 0.05, 0.1, 1.0])
def test_final_value_is_reached_exactly(end: float) -> None:
    assert EpsilonSchedule(1.0, [end], 10)(10)[0] == np.float32(end)
