"""Base class of learning algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from mtrl_cli.agents.epsilon import EpsilonSchedule
from mtrl_cli.agents.reward_transform import RewardTransform
from mtrl_cli.agents.value_scale import ValueScale
from mtrl_cli.networks.heads import Head
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay.buffers import Replay, Samples


@dataclass
class Losses:
    """Losses of one batch, and the values that they were computed from.

    Attributes:
        loss_KB: float32 `[K, B]`, with gradient.
        error_KB: float32 `[K, B]`, absolute temporal-difference errors.
        q_K: float32 `[K]`, mean value of the chosen actions, in units of scaled rewards.
        target_KB: float32 `[K, B]`, training targets of the network: (target - mean) / scale of the value scale.
    """

    loss_KB: torch.Tensor
    error_KB: torch.Tensor
    q_K: torch.Tensor
    target_KB: torch.Tensor


class Agent(ABC):
    """A learning algorithm over a multi-task network.

    The loop calls `observe` after each environment step. The learner calls `losses` and, after the optimizer step, `after_step`.

    Attributes:
        network: the network that acts and is trained.
        epsilon_schedule: shares of random actions.
        reward_transform: reward factors and value scale; None: rewards are used unscaled.
        batch_size: samples per task and update.
        samples_per_step: replayed samples per environment step.
        learning_starts: steps per task before the first update.
        n_step: rewards per sample.
        batch_key: name of the samples of an update in messages.
        from_rollouts: whether the agent learns from rollouts instead of a replay.
        capturable: whether a CUDA graph can record `losses` and `after_step` (`machine/cuda_graphs.py`).
        updates_per_rollout: updates from each rollout; 0: the agent does not learn from rollouts.
        loss_draws, target_draws: augmented draws of each observation and of each next observation; their losses and targets are averaged.
        period: steps per task between bursts of updates; 1: updates are made as soon as they are due.
        target_period: updates between copies to the target network (`sync_target`); 0: none.
    """

    network: MultiTaskNetwork
    epsilon_schedule: EpsilonSchedule
    reward_transform: RewardTransform | None = None
    batch_size: int
    samples_per_step: float
    learning_starts: int
    n_step: int
    batch_key: ClassVar[str] = "agent.batch_size"
    from_rollouts: ClassVar[bool] = False
    capturable: bool = False
    loss_draws: int = 1
    target_draws: int = 1
    updates_per_rollout: int = 0
    period: int = 1
    target_period: int = 0

    @property
    def value_scale(self) -> ValueScale | None:
        """Scale of the rewards and values."""
        return self.reward_transform.scale if self.reward_transform else None

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads that are rescaled when the value scale changes."""
        return (self.network.head,)

    def epsilon(self, step: int) -> np.ndarray:
        """Share of random actions of each task at a step (per task), float32 `[K]`."""
        return self.epsilon_schedule(step)

    # -- acting -------------------------------------------------------------------------------------------------------------

    def value_to_store(self, value_KN: torch.Tensor) -> torch.Tensor | None:
        """Convert greedy values (float32 `[K, N]`) to the values that the replay stores; None: the replay stores none."""
        return None

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        """Update reward statistics with unscaled rewards (float32) and ends of episodes (bool) of one step of K x N environments."""
        if self.reward_transform:
            self.reward_transform.observe(reward_KN, done_KN)

    # -- learning -----------------------------------------------------------------------------------------------------------

    def before_update(self, replay: Replay) -> None:
        """Prepare the replay for the next update. Not recorded in the CUDA graph of the update."""

    @abstractmethod
    def losses(self, batch: Any) -> Losses:
        """Compute the losses of a `Batch` or, for agents that learn from rollouts, a `RolloutBatch`. Changes no state."""

    def after_step(self, batch: Samples, losses: Losses) -> None:
        """Update value statistics, and a target network that is a moving average, after an optimizer step.

        Args:
            batch, losses: of the update.
        """
        if (scale := self.value_scale) is not None and scale.uses_targets:
            scale.update(losses.target_KB, batch.weight > 0, self.heads)

    def initialise_value_scale(self, batch: Samples) -> None:
        """Initialise value statistics with the targets of the first batch of a run."""
        if (scale := self.value_scale) is not None and scale.uses_targets:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # not compiled: a single call without gradients
                losses = self.losses(batch)
            scale.update(losses.target_KB, batch.weight > 0, self.heads)

    def sync_target(self, names: Collection[str] | None = None) -> None:
        """Copy the network to the target network.

        Args:
            names: parameters that were changed by a reset; None: all parameters and buffers.
        """

    # -- state --------------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return current statistics by name, each float `[K]`."""
        return {} if self.value_scale is None else self.value_scale.metrics()

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state without the network."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""
