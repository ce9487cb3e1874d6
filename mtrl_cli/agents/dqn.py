"""Deep Q-learning (Mnih et al. 2015) with double Q-learning and n-step returns, over all tasks at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents import targets
from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.agents.value_scale import ValueScale
from mtrl_cli.fields import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay import Batch
from mtrl_cli.schedules import EpsilonSchedule


class DQN(Agent):
    """Deep Q-learning.

    Args:
        network: action values of all tasks.
        value_scale: the learner's view of rewards.
        task_names: for settings by task.
        compile_with: what makes a fast function of the losses (torch.compile), or the identity.
        batch_size: samples per task and update.
        samples_per_step: replayed samples per environment step; an update is due every batch_size / samples_per_step steps.
        learning_starts: steps per task before the first update.
        gamma: discount per step.
        n_step: rewards per target (Sutton 1988; Hessel et al. 2018).
        double: the online network chooses the next action, the target network values it (van Hasselt et al. 2016).
        huber: error beyond which the loss is linear; 0: squared error everywhere.
        target_period: updates between copies to the target network; 0: it follows as a moving average.
        target_tau: share of the online network in each step of that moving average (Lillicrap et al. 2016).
        epsilon_start, epsilon_end, epsilon_steps: share of random actions, and the steps per task over which it falls.
        epsilon_tasks: final epsilon of single tasks, by name.

    Raises:
        ValueError: epsilon_tasks names no task of the pack, or the target network would never move.
    """

    def __init__(
        self,
        network: MultiTaskNetwork,
        value_scale: ValueScale,
        task_names: Sequence[str],
        compile_with: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        batch_size: PositiveInt,
        samples_per_step: PositiveFloat,
        learning_starts: NonNegativeInt,
        gamma: Fraction,
        n_step: PositiveInt,
        double: bool,
        huber: NonNegativeFloat,
        target_period: NonNegativeInt,
        target_tau: Fraction,
        epsilon_start: Fraction,
        epsilon_end: Fraction,
        epsilon_steps: NonNegativeInt,
        epsilon_tasks: dict[str, Fraction],
    ):
        unknown = set(epsilon_tasks) - set(task_names)
        if unknown:
            raise ValueError(f"agent.epsilon_tasks names {sorted(unknown)}; the tasks of this run are {list(task_names)}")
        if not target_period and not target_tau:
            raise ValueError("agent.target_period=0 means a moving average, and agent.target_tau=0 never moves it: set one of them")
        self.network = network
        self.target_network = copy.deepcopy(network).requires_grad_(False)
        self.batch_size, self.samples_per_step, self.learning_starts = batch_size, samples_per_step, learning_starts
        self.n_step = n_step
        self._gamma, self._double, self._huber = gamma, double, huber
        self._target_period, self._target_tau = target_period, target_tau
        self._value_scale = value_scale
        ends = [epsilon_tasks.get(name, epsilon_end) for name in task_names]
        self.epsilon_schedule = EpsilonSchedule(epsilon_start, ends, epsilon_steps)
        self._compiled_losses = compile_with(self._losses)

    def epsilon(self, step: int) -> np.ndarray:
        return self.epsilon_schedule(step)

    def losses(self, batch: Batch) -> Losses:
        rewards = self._value_scale.rewards(batch.rewards)
        return Losses(
            *self._compiled_losses(
                batch.observation.flatten(2, 3),
                batch.action,
                rewards,
                batch.steps,
                batch.terminated,
                batch.next_observation.flatten(2, 3),
                batch.weight,
            )
        )

    def _losses(
        self,
        observation: torch.Tensor,
        action: torch.Tensor,
        rewards: torch.Tensor,
        steps: torch.Tensor,
        terminated: torch.Tensor,
        next_observation: torch.Tensor,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            next_q_KBA = self.target_network(next_observation)
            choosing_q_KBA = self.network(next_observation) if self._double else next_q_KBA
            value_KB = targets.bootstrap_value(next_q_KBA, choosing_q_KBA)
            return_KB = targets.n_step_return(rewards, self._gamma)
            target_KB = targets.td_target(return_KB, steps, terminated, value_KB, self._gamma)
        q_KB = self.network(observation).gather(-1, action[..., None]).squeeze(-1)
        error_KB = target_KB - q_KB
        loss_KB = weight * targets.huber(error_KB, self._huber)
        return loss_KB, error_KB.detach().abs(), q_KB.detach().mean(1)

    def after_update(self, updates: int) -> None:
        if self._target_period and updates % self._target_period:
            return
        online: list[torch.Tensor] = list(self.network.parameters())
        target: list[torch.Tensor] = list(self.target_network.parameters())
        with torch.no_grad():
            if self._target_period:
                torch._foreach_copy_(target, online)
            else:
                torch._foreach_lerp_(target, online, self._target_tau)

    def state_dict(self) -> dict[str, Any]:
        return {"target_network": self.target_network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target_network.load_state_dict(state["target_network"])
