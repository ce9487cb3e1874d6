"""Base class of learning algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mtrl_cli.agents.acting import EpsilonSchedule
from mtrl_cli.agents.value_scale import ValueScale
from mtrl_cli.machine.saved import Saved
from mtrl_cli.networks.heads import Head
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay.buffers import Replay, Samples
from mtrl_cli.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat


@dataclass
class Losses:
    """Losses of one batch, and values for priorities, metrics and value statistics.

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


class Agent(Saved, ABC):
    """A learning algorithm over a multi-task network.

    The loop calls `observe` after each environment step. The learner calls `losses` and, after the optimizer step, `after_step`.
    The keyword-only parameters are keys of every agent whose constructor passes further keywords (`**common`) to this constructor.

    Args:
        network: network of the action values of all tasks.
        value_scale: scale of rewards and values.
        task_names: names of the tasks, for task-specific settings.
        compile_with: function that compiles functions: torch.compile, or the identity.
        gamma: discount per step.
        huber: error beyond which the loss is linear; 0: squared error everywhere, or the plain quantile loss. Not used by heads that
            predict a distribution over fixed returns.
        epsilon_start, epsilon_end, epsilon_steps: first and final probability of a random action, and steps per task from first to final.
        epsilon_tasks: final epsilon of single tasks, by name.
        reward_factors: factors of the rewards of single tasks, by name, applied before the value scale.

    Attributes:
        network: the network that acts and is trained.
        epsilon: probability of a random action in each task, by step (per task).
        value_scale: scale of rewards and values.
        batch_size: samples per task and update.
        samples_per_step: replayed samples per environment step.
        learning_starts: steps per task before the first update.
        n_step: rewards per sample.
        batch_key: name of the samples of an update in messages.
        from_rollouts: whether the agent learns from rollouts instead of a replay.
        capturable: whether a CUDA graph can record `losses` and `after_step` (`machine/cuda_graphs.py`).
        updates_per_rollout: updates from each rollout; 0: the agent does not learn from rollouts.
        loss_draws, target_draws: augmented draws of each observation and of each next observation; losses and targets are their means.
        period: steps per task between bursts of updates; 1: updates are made as soon as they are due.
        target_period: updates between copies to the target network (`sync_target`); 0: no copies.
    """

    saved: ClassVar[tuple[str, ...]] = ("value_scale",)
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

    def __init__(
        self,
        network: MultiTaskNetwork,
        value_scale: ValueScale,
        task_names: Sequence[str],
        compile_with: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        gamma: Fraction,
        huber: NonNegativeFloat,
        epsilon_start: Fraction,
        epsilon_end: Fraction,
        epsilon_steps: NonNegativeInt,
        epsilon_tasks: dict[str, Fraction],
        reward_factors: dict[str, PositiveFloat] = {},  # noqa: B006 (a literal, so that the schema can read it)
    ):
        self.network = network
        self.value_scale = value_scale
        self.capturable = value_scale.capturable
        self.epsilon = EpsilonSchedule(epsilon_start, [epsilon_tasks.get(name, epsilon_end) for name in task_names], epsilon_steps)
        factors = [reward_factors.get(name, 1.0) for name in task_names]
        self._reward_factor_K = torch.tensor(factors, device=value_scale.mean_K.device) if reward_factors else None
        self._gamma = gamma
        self._huber = huber
        self.losses = compile_with(self.losses)  # type: ignore[method-assign]

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads that are rescaled when the value scale changes."""
        return (self.network.head,)

    # -- acting -------------------------------------------------------------------------------------------------------------

    def value_to_store(self, value_KN: torch.Tensor) -> torch.Tensor | None:
        """Convert greedy values (float32 `[K, N]`) to the values that the replay stores; None: the replay stores none."""
        return None

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        """Update reward statistics with unscaled rewards (float32) and ends of episodes (bool) of one step of K x N environments."""
        self.value_scale.observe(self._times_factors(reward_KN), done_KN)

    def _times_factors(self, reward: torch.Tensor) -> torch.Tensor:
        """Multiply rewards (float32 `[K, ...]`) by the factors of the tasks."""
        return reward if self._reward_factor_K is None else reward * self._reward_factor_K.view(-1, *[1] * (reward.dim() - 1))

    # -- learning -----------------------------------------------------------------------------------------------------------

    def before_update(self, replay: Replay) -> None:
        """Prepare the replay for the next update. Not recorded in the CUDA graph of the update."""

    def scaled_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Scale rewards, float32 `[K, ..., ...]`."""
        return self.value_scale.rewards(self._times_factors(rewards))

    @abstractmethod
    def losses(self, batch: Any) -> Losses:
        """Compute the losses of a `Batch` or, for agents that learn from rollouts, a `RolloutBatch`. Changes no state."""

    def after_step(self, batch: Samples, losses: Losses) -> None:
        """Update value statistics, and a target network that is a moving average, after an optimizer step.

        Args:
            batch, losses: batch and losses of the update.
        """
        if self.value_scale.uses_targets:
            self.value_scale.update(losses.target_KB, batch.weight > 0, self.heads)

    def initialise_value_scale(self, batch: Samples) -> None:
        """Initialize value statistics with the targets of the first batch of a run."""
        if self.value_scale.uses_targets:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # not compiled: a single call without gradients
                losses = self.losses(batch)
            self.value_scale.update(losses.target_KB, batch.weight > 0, self.heads)

    def sync_target(self, names: Collection[str] | None = None) -> None:
        """Copy the network to the target network.

        Args:
            names: parameters that were changed by a reset; None: all parameters and buffers.
        """

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return current statistics by name, each float `[K]`."""
        return self.value_scale.metrics()
