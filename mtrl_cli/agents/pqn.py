"""Parallelised Q-learning (Gallici et al. 2024, "Simplifying Deep Temporal Difference Learning"), over all tasks at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents import targets
from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.agents.reward_transform import RewardTransform, epsilon_schedule
from mtrl_cli.agents.value_scale import ValueScale
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay.buffers import Batch, Replay
from mtrl_cli.replay.rollout_buffer import Rollouts
from mtrl_cli.types import Auto, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class PQN(Agent):
    """Parallelised Q-learning: no replay and no target network, but many environments, returns of whole rollouts, and a normalised network.

    Every rollout of `rollout_length` steps of each environment is given its lambda-returns once, by the values that the network had
    while it played, and is learned from in `epochs` of `minibatches` updates. LayerNorm is what keeps this from diverging
    (section 3 of the paper): `network.layer_norm=true`.

    Args:
        network: action values of all tasks.
        value_scale: the learner's view of rewards.
        task_names: for settings by task.
        compile_with: what makes a fast function of the losses (torch.compile), or the identity.
        rollout_length: steps of each environment in a rollout.
        epochs: how often every step of a rollout is learned from.
        minibatches: updates per epoch.
        gamma: discount per step.
        trace_decay: lambda of the returns; 0: of one step, 1: of all steps up to the rollout's end.
        huber: as DQN's; 0: squared error, the paper's.
        overlap: whether a rollout is learned from bit by bit while the next one is played, so that the emulators never wait and steps are
            up to a rollout older; false: at once when it is complete, as in the paper. "auto" is decided before an agent is made.
        epsilon_start, epsilon_end, epsilon_steps: share of random actions, and the steps per task over which it falls.
        epsilon_tasks: final epsilon of single tasks, by name.
        reward_factors: as DQN's.

    Raises:
        ValueError: epsilon_tasks or reward_factors name no task of the pack, or a rollout cannot be cut into equal minibatches.
    """

    from_rollouts = True
    batch_key = "a minibatch (agent.rollout_length times env.num_envs, by agent.minibatches)"

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
                f"agent.minibatches={minibatches} cannot cut a rollout into equal parts: it has agent.rollout_length={rollout_length} "
                f"times env.num_envs={num_envs} steps, {samples}; expected a number that divides them"
            )
        self.network, self.value_scale, self.capturable = network, value_scale, value_scale.capturable
        self.batch_size, self.samples_per_step, self.n_step = samples // minibatches, float(epochs), 1
        # The first rollout is complete when rollout_length + 1 steps are made. Of those updates that are spread over the next rollout
        # the first is due at once, so that the last is made no later than in the step that completes that one.
        self.period = 1 if overlap else samples
        self.learning_starts = num_envs + (samples - math.ceil(self.batch_size / epochs) if overlap else 0)
        self.updates_per_rollout = epochs * minibatches
        self._gamma, self._trace_decay, self._huber = gamma, trace_decay, huber
        self._view = RewardTransform(value_scale, task_names, reward_factors)
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._epsilon = epsilon_schedule(task_names, epsilon_start, epsilon_end, epsilon_steps, epsilon_tasks)
        self._compiled_losses = compile_with(self._losses)

    def epsilon(self, step: int) -> np.ndarray:
        return self._epsilon(step)

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        self._view.observe(reward_KN, done_KN)

    def kept_value(self, value_KN: torch.Tensor) -> torch.Tensor | None:
        scale = self._view.scale
        return value_KN * scale.scale_K[:, None] + scale.mean_K[:, None]

    def prepare(self, replay: Replay, step: int, batch_size: int) -> None:
        assert isinstance(replay, Rollouts)
        if not replay.is_open or replay.drawn == self.updates_per_rollout * batch_size:
            rewards, values, terminated, truncated = replay.next_rollout()
            rewards = self._view.rewards(rewards)
            replay.open_next(targets.lambda_returns(rewards, values, terminated, truncated, self._gamma, self._trace_decay))
        super().prepare(replay, step, batch_size)

    def begin(self, batch: Batch) -> None:
        scale = self._view.scale
        scale.follow(_normalised(batch.rewards[..., 0], scale.mean_K, scale.scale_K), batch.weight > 0, (self.network.head,))

    def losses(self, batch: Batch) -> Losses:
        scale = self._view.scale
        loss_KB, error_KB, q_K, target_KB = self._compiled_losses(
            batch.observation.flatten(2, 3), batch.action, batch.rewards[..., 0], batch.weight, scale.mean_K, scale.scale_K
        )
        if torch.is_grad_enabled():  # a look back at the batch of an update is none
            self._seen = target_KB, batch.weight > 0
        return Losses(loss_KB, error_KB, q_K)

    def _losses(
        self,
        observation: torch.Tensor,
        action: torch.Tensor,
        return_KB: torch.Tensor,
        weight: torch.Tensor,
        mean_K: torch.Tensor,
        scale_K: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        head = self.network.head
        target_KB = _normalised(return_KB, mean_K, scale_K)
        outputs = targets.of_action(self.network.outputs(observation), action)
        said = outputs.detach()  # in the place of the next state's, which counts nothing
        loss_KB = weight * head.loss(outputs, said, target_KB, torch.zeros_like(target_KB), self._huber)
        q_KB = head.expectation(said)
        return loss_KB, (target_KB - q_KB).abs(), q_KB.mean(1) * scale_K + mean_K, target_KB

    def follow(self) -> None:
        if self._seen is not None:
            self._view.scale.follow(*self._seen, (self.network.head,))
            self._seen = None

    def after_update(self, updates: int) -> None:
        """There is no target network."""

    def metrics(self) -> dict[str, torch.Tensor]:
        return self._view.scale.metrics()

    def state_dict(self) -> dict[str, Any]:
        return {"value_scale": self._view.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._view.scale.load_state_dict(state["value_scale"])


def _normalised(return_KB: torch.Tensor, mean_K: torch.Tensor, scale_K: torch.Tensor) -> torch.Tensor:
    """Returns as the network is to say them."""
    return (return_KB - mean_K[:, None]) / scale_K[:, None]
