"""Parallelized Q-learning (Gallici et al. 2024, "Simplifying Deep Temporal Difference Learning"), for all tasks at once."""

from __future__ import annotations

import math
from typing import Any

import torch

from mtrl_cli.agents import targets
from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.replay.buffers import Replay
from mtrl_cli.replay.rollout_buffer import Rollouts
from mtrl_cli.replay.types import RolloutBatch
from mtrl_cli.types import Auto, Fraction, PositiveInt


class PQN(Agent):
    """Parallelized Q-learning: many environments, lambda-returns of rollouts and a normalized network; no replay, no target network.

    The lambda-returns of a rollout of `rollout_length` steps of each environment are computed once, from the values of the network at the
    time of acting. Each rollout is used in `epochs` passes of `minibatches` updates. LayerNorm (`network.layer_norm=true`) keeps the
    updates from diverging (section 3 of the paper).

    Args:
        rollout_length: steps of each environment in a rollout.
        epochs: passes over each rollout.
        minibatches: updates per epoch. The number divides the samples of a rollout.
        trace_decay: lambda of the returns; 0: one-step returns, 1: returns up to the end of the rollout.
        overlap: whether updates from a rollout are spread over the collection of the next rollout: emulators never wait, but samples are up
            to a rollout older. False: all updates are made when a rollout is complete, as in the paper.
        common: see `Agent`. The paper uses the squared error, `huber=0`.
    """

    from_rollouts = True
    batch_key = "a minibatch (agent.rollout_length times env.num_envs, by agent.minibatches)"

    def __init__(
        self,
        *parts: Any,
        rollout_length: PositiveInt,
        epochs: PositiveInt,
        minibatches: PositiveInt,
        trace_decay: Fraction,
        overlap: bool | Auto,
        **common: Any,
    ):
        super().__init__(*parts, **common)
        num_envs = self.value_scale.num_envs
        samples = rollout_length * num_envs
        self.batch_size = samples // minibatches
        self.samples_per_step = float(epochs)
        self.n_step = 1
        self.updates_per_rollout = epochs * minibatches
        # The first rollout is complete after rollout_length + 1 steps. Updates that are spread over the next rollout start at once, so that
        # the last update is made no later than in the step that completes the next rollout.
        self.period = 1 if overlap else samples
        self.learning_starts = num_envs + (samples - math.ceil(self.batch_size / epochs) if overlap else 0)
        self._epochs = epochs
        self._trace_decay = trace_decay

    def value_to_store(self, value_KN: torch.Tensor) -> torch.Tensor:
        return value_KN * self.value_scale.scale_K[:, None] + self.value_scale.mean_K[:, None]

    def before_update(self, replay: Replay) -> None:
        """Compute the returns of the next rollout once all epochs over the open rollout are drawn."""
        assert isinstance(replay, Rollouts)
        if not replay.is_open or replay.epochs_drawn == self._epochs:
            rollout = replay.next_rollout()
            rewards = self.scaled_rewards(rollout.rewards)
            replay.open_next(
                targets.lambda_returns(rewards, rollout.values, rollout.terminated, rollout.truncated, self._gamma, self._trace_decay)
            )

    def losses(self, batch: RolloutBatch) -> Losses:
        head, scale = self.network.head, self.value_scale
        target_KB = (batch.returns - scale.mean_K[:, None]) / scale.scale_K[:, None]
        outputs = targets.of_action(self.network.outputs(batch.observation.flatten(2, 3)), batch.action)
        # Returns need no bootstrap value: the discount is 0, and the outputs stand in for those of a next state.
        loss_KB = head.loss(outputs, outputs.detach(), target_KB, torch.zeros_like(target_KB), self._huber)
        q_KB = head.expectation(outputs.detach())
        return Losses(
            loss_KB=batch.weight * loss_KB,
            error_KB=(target_KB - q_KB).abs(),
            q_K=q_KB.mean(1) * scale.scale_K + scale.mean_K,
            target_KB=target_KB,
        )
