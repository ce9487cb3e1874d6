"""Parallelised Q-learning (Gallici et al. 2024, "Simplifying Deep Temporal Difference Learning"), for all tasks at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mtrl_cli.agents import targets
from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.agents.reward_transform import RewardTransform, epsilon_schedule
from mtrl_cli.agents.value_scale import ValueScale
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay.buffers import Replay
from mtrl_cli.replay.rollout_buffer import Rollouts
from mtrl_cli.replay.types import RolloutBatch
from mtrl_cli.types import Auto, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class PQN(Agent):
    """Parallelised Q-learning: many environments, lambda-returns of rollouts and a normalised network; no replay, no target network.

    The lambda-returns of a rollout of `rollout_length` steps of each environment are computed once, from the values of the network at the
    time of acting. Each rollout is learned from in `epochs` of `minibatches` updates. LayerNorm (`network.layer_norm=true`) keeps the
    updates from diverging (section 3 of the paper).

    Args:
        network: action values of all tasks.
        value_scale: scale of rewards and values.
        task_names: for settings by task.
        compile_with: torch.compile, or the identity.
        rollout_length: steps of each environment in a rollout.
        epochs: passes over each rollout.
        minibatches: updates per epoch.
        gamma: discount per step.
        trace_decay: lambda of the returns; 0: one-step returns, 1: returns up to the end of the rollout.
        huber: error beyond which the loss is linear; 0: squared error, as in the paper.
        overlap: spread the updates from a rollout over the collection of the next one, so that the emulators never wait and samples are up
            to a rollout older; false: make all updates when a rollout is complete, as in the paper.
        epsilon_start, epsilon_end, epsilon_steps: share of random actions, and the steps per task over which it falls.
        epsilon_tasks: final epsilon of single tasks, by name.
        reward_factors: factors of the rewards of single tasks, by name, applied before the value scale.

    Raises:
        ValueError: epsilon_tasks or reward_factors names an unknown task, or a rollout cannot be divided into equal minibatches.
    """

    from_rollouts = True
    batch_key = "a minibatch (agent.rollout_length times env.num_envs, by agent.minibatches)"
    reward_transform: RewardTransform

    def __init__(
        self,
        network: MultiTaskNetwork,
        value_scale: ValueScale,
        task_names: Sequence[str],
        compile_with: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        rollout_length: PositiveInt,
        epochs: PositiveInt,
        minibatches: PositiveInt,
        gamma: Fraction,
        trace_decay: Fraction,
        huber: NonNegativeFloat,
        overlap: bool | Auto,
        epsilon_start: Fraction,
        epsilon_end: Fraction,
        epsilon_steps: NonNegativeInt,
        epsilon_tasks: dict[str, Fraction],
        reward_factors: dict[str, PositiveFloat] = {},  # noqa: B006 (a literal, so that the schema can read it)
    ):
        num_envs = value_scale.num_envs
        samples = rollout_length * num_envs
        if samples % minibatches:
            raise ValueError(
                f"agent.minibatches={minibatches} cannot divide a rollout into equal parts: agent.rollout_length={rollout_length} "
                f"times env.num_envs={num_envs} is {samples}; expected a divisor of {samples}"
            )
        self.network = network
        self.capturable = value_scale.capturable
        self.batch_size = samples // minibatches
        self.samples_per_step = float(epochs)
        self.n_step = 1
        self.updates_per_rollout = epochs * minibatches
        # The first rollout is complete after rollout_length + 1 steps. Updates that are spread over the next rollout start at once, so that
        # the last of them is made no later than in the step that completes that rollout.
        self.period = 1 if overlap else samples
        self.learning_starts = num_envs + (samples - math.ceil(self.batch_size / epochs) if overlap else 0)
        self.reward_transform = RewardTransform(value_scale, task_names, reward_factors)
        self.epsilon_schedule = epsilon_schedule(task_names, epsilon_start, epsilon_end, epsilon_steps, epsilon_tasks)
        self._epochs = epochs
        self._gamma = gamma
        self._trace_decay = trace_decay
        self._huber = huber
        self._compiled_losses = compile_with(self._losses)

    def value_to_store(self, value_KN: torch.Tensor) -> torch.Tensor:
        scale = self.reward_transform.scale
        return value_KN * scale.scale_K[:, None] + scale.mean_K[:, None]

    def before_update(self, replay: Replay) -> None:
        """Compute the returns of the next rollout once all epochs over the open one are drawn."""
        assert isinstance(replay, Rollouts)
        if not replay.is_open or replay.epochs_drawn == self._epochs:
            rollout = replay.next_rollout()
            rewards = self.reward_transform(rollout.rewards)
            replay.open_next(
                targets.lambda_returns(rewards, rollout.values, rollout.terminated, rollout.truncated, self._gamma, self._trace_decay)
            )

    def losses(self, batch: RolloutBatch) -> Losses:
        return self._compiled_losses(batch)  # type: ignore[no-any-return]

    def _losses(self, batch: RolloutBatch) -> Losses:
        head, scale = self.network.head, self.reward_transform.scale
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

    def state_dict(self) -> dict[str, Any]:
        return {"value_scale": self.reward_transform.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reward_transform.scale.load_state_dict(state["value_scale"])
