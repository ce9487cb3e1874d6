"""Deep Q-learning (Mnih et al. 2015) with double Q-learning, n-step returns and any head, for all tasks at once."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch

from mtrl_cli.agents import targets
from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.augmentation.base import repeated
from mtrl_cli.networks import value_losses
from mtrl_cli.networks.heads import Head
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.networks.regularised import FIRST_ITERATIONS
from mtrl_cli.replay.buffers import Batch, Samples
from mtrl_cli.types import Auto, Fraction, NonNegativeInt, PositiveFloat, PositiveInt


class DQN(Agent):
    """Deep Q-learning.

    Args:
        batch_size: samples per task and update.
        samples_per_step: replayed samples per environment step; an update is due every batch_size / samples_per_step steps.
        learning_starts: steps per task before the first update.
        n_step: rewards per target (Sutton 1988; Hessel et al. 2018).
        double: select the next action with the online network and evaluate it with the target network (van Hasselt et al. 2016).
        target_period: updates between copies to the target network; 0: the target network is a moving average.
        target_tau: weight of the online network in each step of the moving average (Lillicrap et al. 2016).
        loss_draws, target_draws: augmented draws of each observation and of each next observation (M and K of Kostrikov et al. 2021, "DrQ",
            equations 1 to 3). Losses are averaged over loss_draws, targets over target_draws.
        common: see `Agent`.
    """

    saved = ("target_network", "value_scale")

    def __init__(
        self,
        *parts: Any,
        batch_size: PositiveInt | Auto,
        samples_per_step: PositiveFloat,
        learning_starts: NonNegativeInt,
        n_step: PositiveInt,
        double: bool,
        target_period: NonNegativeInt | Auto,
        target_tau: Fraction,
        loss_draws: PositiveInt = 1,
        target_draws: PositiveInt = 1,
        **common: Any,
    ):
        super().__init__(*parts, **common)
        self.target_network = copy.deepcopy(self.network).requires_grad_(False)
        self.batch_size = int(batch_size)
        self.samples_per_step = samples_per_step
        self.learning_starts = learning_starts
        self.n_step = n_step
        self.loss_draws = loss_draws
        self.target_draws = target_draws
        self.target_period = int(target_period)
        self._double = double
        self._target_tau = target_tau
        self._target_spectral_layers = spectral_layers(self.target_network)

    @property
    def heads(self) -> tuple[Head, ...]:
        return (self.network.head, self.target_network.head)

    def losses(self, batch: Batch) -> Losses:
        head, scale, B = self.network.head, self.value_scale, batch.weight.shape[1]
        observation, next_observation = batch.observation.flatten(2, 3), batch.next_observation.flatten(2, 3)

        with torch.no_grad():
            next_outputs = self.target_network.outputs(next_observation)
            selection_q_KBA = self.network(next_observation) if self._double else head.values(next_outputs)
            next_outputs = targets.bootstrap_value(next_outputs, selection_q_KBA)
            if next_observation.shape[1] > B:
                next_outputs = head.mixture(next_outputs.unflatten(1, (-1, B)))
            discount_KB = targets.discount(batch.steps, batch.terminated, self._gamma)
            return_KB = targets.n_step_return(self.scaled_rewards(batch.rewards), self._gamma)
            # The bootstrap value is normalized: its part of the mean is already subtracted.
            return_KB = (return_KB - (1 - discount_KB) * scale.mean_K[:, None]) / scale.scale_K[:, None]
            target_KB = value_losses.td_target(return_KB, discount_KB, head.expectation(next_outputs))

        outputs = targets.of_action(self.network.outputs(observation), batch.action)
        q_KB = head.expectation(outputs.detach())
        if (draws := observation.shape[1] // B) == 1:
            loss_KB = head.loss(outputs, next_outputs, return_KB, discount_KB, self._huber)
            error_KB = (target_KB - q_KB).abs()
        else:
            next_outputs, return_KB, discount_KB = (repeated(each, draws) for each in (next_outputs, return_KB, discount_KB))
            loss_KB = targets.mean_of_draws(head.loss(outputs, next_outputs, return_KB, discount_KB, self._huber), draws)
            error_KB = targets.mean_of_draws((repeated(target_KB, draws) - q_KB).abs(), draws)
        return Losses(
            loss_KB=batch.weight * loss_KB, error_KB=error_KB, q_K=q_KB.mean(1) * scale.scale_K + scale.mean_K, target_KB=target_KB
        )

    @torch.no_grad()
    def after_step(self, batch: Samples, losses: Losses) -> None:
        super().after_step(batch, losses)
        if not self.target_period:
            torch._foreach_lerp_(list(self.target_network.parameters()), list(self.network.parameters()), self._target_tau)
            for layer in self._target_spectral_layers:
                layer.power_step(frozen=True)

    @torch.no_grad()
    def sync_target(self, names: Collection[str] | None = None) -> None:
        target, source = self.target_network.state_dict(), self.network.state_dict()
        copied = source if names is None else names
        torch._foreach_copy_([target[name] for name in copied], [source[name] for name in copied])
        if names is not None:  # the singular vectors of changed weights are not among the names
            for layer in self._target_spectral_layers:
                layer.power_step(times=FIRST_ITERATIONS, frozen=True)
