"""Deep Q-learning (Mnih et al. 2015) with double Q-learning, n-step returns and any head, over all tasks at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents import targets
from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.agents.reward_transform import RewardTransform, epsilon_schedule
from mtrl_cli.agents.value_scale import ValueScale
from mtrl_cli.augmentation.base import repeated
from mtrl_cli.networks import value_losses
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.networks.regularised import FIRST_ITERATIONS
from mtrl_cli.replay.buffers import Batch
from mtrl_cli.types import Auto, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class DQN(Agent):
    """Deep Q-learning.

    Args:
        network: action values of all tasks.
        value_scale: the learner's view of rewards.
        task_names: for settings by task.
        compile_with: what makes a fast function of the losses (torch.compile), or the identity.
        batch_size: samples per task and update. ("auto" is decided before an agent is made.)
        samples_per_step: replayed samples per environment step; an update is due every batch_size / samples_per_step steps.
        learning_starts: steps per task before the first update.
        gamma: discount per step.
        n_step: rewards per target (Sutton 1988; Hessel et al. 2018).
        double: the online network chooses the next action, the target network values it (van Hasselt et al. 2016).
        huber: error beyond which the loss is linear; 0: squared error everywhere (of quantiles: their plain loss). Heads that give a
            distribution over fixed returns have no such errors.
        target_period: updates between copies to the target network; 0: it follows as a moving average. ("auto" is decided before.)
        target_tau: share of the online network in each step of that moving average (Lillicrap et al. 2016).
        epsilon_start, epsilon_end, epsilon_steps: share of random actions, and the steps per task over which it falls.
        epsilon_tasks: final epsilon of single tasks, by name.
        loss_draws, target_draws: with an augmentation: how often each observation is drawn, and each next one (M and K of Kostrikov et al.
            2021, "DrQ", equations 1 to 3): the loss of a sample is the mean over the ones, and its target the mean over the others.
        reward_factors: what the learner multiplies single tasks' rewards by, before the value scale sees them; for studies of scale.

    Raises:
        ValueError: epsilon_tasks or reward_factors name no task of the pack, or the target network would never move.
    """

    def __init__(
        self,
        network: MultiTaskNetwork,
        value_scale: ValueScale,
        task_names: Sequence[str],
        compile_with: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        batch_size: PositiveInt | Auto,
        samples_per_step: PositiveFloat,
        learning_starts: NonNegativeInt,
        gamma: Fraction,
        n_step: PositiveInt,
        double: bool,
        huber: NonNegativeFloat,
        target_period: NonNegativeInt | Auto,
        target_tau: Fraction,
        epsilon_start: Fraction,
        epsilon_end: Fraction,
        epsilon_steps: NonNegativeInt,
        epsilon_tasks: dict[str, Fraction],
        loss_draws: PositiveInt = 1,
        target_draws: PositiveInt = 1,
        reward_factors: dict[str, PositiveFloat] = {},  # noqa: B006 (a literal, so that the schema can read it)
    ):
        if not target_period and not target_tau:
            raise ValueError("agent.target_period=0 means a moving average, and agent.target_tau=0 never moves it: set one of them")
        self.network, self.value_scale, self.capturable = network, value_scale, value_scale.capturable
        self.target_network = copy.deepcopy(network).requires_grad_(False)
        self._target_spectral_layers = spectral_layers(self.target_network)
        self.batch_size, self.samples_per_step, self.learning_starts = int(batch_size), samples_per_step, learning_starts
        self.n_step, self.loss_draws, self.target_draws = n_step, loss_draws, target_draws
        self._gamma, self._double, self._huber = gamma, double, huber
        self._target_period, self._target_tau = int(target_period), target_tau
        self._view = RewardTransform(value_scale, task_names, reward_factors)
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self.epsilon_schedule = epsilon_schedule(task_names, epsilon_start, epsilon_end, epsilon_steps, epsilon_tasks)
        self._compiled_losses = compile_with(self._losses)

    def epsilon(self, step: int) -> np.ndarray:
        return self.epsilon_schedule(step)

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        self._view.observe(reward_KN, done_KN)

    def begin(self, batch: Batch) -> None:
        if not self._view.scale.follows_targets:
            return
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # once, without gradients: not worth a graph
            target_KB = self._of_batch(batch)[3]
        self._view.scale.follow(target_KB, batch.weight > 0, (self.network.head, self.target_network.head))

    def losses(self, batch: Batch) -> Losses:
        loss_KB, error_KB, q_K, target_KB = self._of_batch(batch)
        if torch.is_grad_enabled():  # a look back at the batch of an update is none
            self._seen = target_KB, batch.weight > 0
        return Losses(loss_KB, error_KB, q_K)

    def _of_batch(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = self._compiled_losses(
            batch.observation.flatten(2, 3),
            batch.action,
            self._view.rewards(batch.rewards),
            batch.steps,
            batch.terminated,
            batch.next_observation.flatten(2, 3),
            batch.weight,
            self._view.scale.mean_K,
            self._view.scale.scale_K,
        )
        return result

    def _losses(
        self,
        observation: torch.Tensor,
        action: torch.Tensor,
        rewards: torch.Tensor,
        steps: torch.Tensor,
        terminated: torch.Tensor,
        next_observation: torch.Tensor,
        weight: torch.Tensor,
        mean_K: torch.Tensor,
        scale_K: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        head = self.network.head
        with torch.no_grad():
            next_outputs = self.target_network.outputs(next_observation)
            choosing_q_KBA = self.network(next_observation) if self._double else head.values(next_outputs)
            next_outputs = targets.bootstrap_value(next_outputs, choosing_q_KBA)
            if next_observation.shape[1] > weight.shape[1]:
                next_outputs = head.mixture(next_outputs.unflatten(1, (-1, weight.shape[1])))
            discount_KB = targets.discount(steps, terminated, self._gamma)
            # What the network bootstraps from is normalised, and so without its share of the mean.
            return_KB = targets.n_step_return(rewards, self._gamma)
            return_KB = (return_KB - (1 - discount_KB) * mean_K[:, None]) / scale_K[:, None]
            target_KB = value_losses.td_target(return_KB, discount_KB, head.expectation(next_outputs))
        outputs = targets.of_action(self.network.outputs(observation), action)
        q_KB = head.expectation(outputs.detach())
        if (draws := observation.shape[1] // weight.shape[1]) == 1:
            loss_KB = weight * head.loss(outputs, next_outputs, return_KB, discount_KB, self._huber)
            return loss_KB, (target_KB - q_KB).abs(), q_KB.mean(1) * scale_K + mean_K, target_KB
        next_outputs, return_KB, discount_KB = (repeated(each, draws) for each in (next_outputs, return_KB, discount_KB))
        loss_KB = weight * targets.mean_of_draws(head.loss(outputs, next_outputs, return_KB, discount_KB, self._huber), draws)
        error_KB = targets.mean_of_draws((repeated(target_KB, draws) - q_KB).abs(), draws)
        return loss_KB, error_KB, q_KB.mean(1) * scale_K + mean_K, target_KB

    def follow(self) -> None:
        if self._seen is not None:
            self._view.scale.follow(*self._seen, (self.network.head, self.target_network.head))
            self._seen = None
        if not self._target_period:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.target_network.parameters()), list(self.network.parameters()), self._target_tau)
            for layer in self._target_spectral_layers:
                layer.power_step(frozen=True)

    def after_update(self, updates: int) -> None:
        if self._target_period and updates % self._target_period == 0:
            self._copy_to_target(list(self.network.state_dict()))

    def sync_target(self, names: Collection[str]) -> None:
        self._copy_to_target(names)
        for layer in self._target_spectral_layers:
            layer.power_step(times=FIRST_ITERATIONS, frozen=True)

    @torch.no_grad()
    def _copy_to_target(self, names: Collection[str]) -> None:
        theirs, mine = self.target_network.state_dict(), self.network.state_dict()
        torch._foreach_copy_([theirs[name] for name in names], [mine[name] for name in names])

    def metrics(self) -> dict[str, torch.Tensor]:
        return self._view.scale.metrics()

    def state_dict(self) -> dict[str, Any]:
        return {"target_network": self.target_network.state_dict(), "value_scale": self._view.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target_network.load_state_dict(state["target_network"])
        self._view.scale.load_state_dict(state.get("value_scale", {}))  # older checkpoints: of a scale without state
