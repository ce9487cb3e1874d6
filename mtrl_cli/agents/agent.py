"""What a learning algorithm is to the loop and to the learner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from mtrl_cli.agents.value_scale import ValueScale
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay.buffers import Batch, Replay


@dataclass
class Losses:
    """What one batch says.

    Attributes:
        loss_KB: float32 `[K, B]`, with its gradient.
        error_KB: float32 `[K, B]`, absolute temporal-difference errors.
        q_K: float32 `[K]`, mean value of the batch's actions, on the scale of the rewards that the value scale gives.
    """

    loss_KB: torch.Tensor
    error_KB: torch.Tensor
    q_K: torch.Tensor


class Agent(ABC):
    """An algorithm over a multi-task network.

    Attributes:
        network: the network that acts and is trained.
        batch_size: samples per task and update.
        samples_per_step: replayed samples per environment step.
        learning_starts: steps per task before the first update.
        n_step: rewards per sample.
        batch_key: what a message calls the samples of an update.
        from_rollouts: whether it learns from rollouts rather than from a replay.
        capturable: whether `losses` and `follow` can be recorded once and replayed (`capture.py`).
        updates_per_rollout: after so many updates other samples are needed, where an agent learns from rollouts; 0: it does not.
        loss_draws, target_draws: how often an augmentation is to draw each observation, and each next one; what they say is averaged.
        period: steps per task from one burst of updates to the next; 1: updates are made as soon as they are due.
        value_scale: the learner's view of rewards; None: it has none that others may take statistics from.
    """

    network: MultiTaskNetwork
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
    value_scale: ValueScale | None = None

    @abstractmethod
    def epsilon(self, step: int) -> np.ndarray:
        """Each task's share of random actions at a step, float32 `[K]`."""

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        """What K x N environments just gave (float32, the game's own) and which episodes ended with it (bool), once per step of each."""

    def kept_value(self, value_KN: torch.Tensor) -> torch.Tensor | None:
        """What the replay is to keep of the best values (float32 `[K, N]`, as the network just gave them) beside a step; None: nothing."""
        return None

    def prepare(self, replay: Replay, step: int, batch_size: int) -> None:
        """Make the replay ready to draw so many samples of each task for the next update, at a step (per task)."""
        replay.prepare(step, batch_size)

    def begin(self, batch: Batch) -> None:
        """Take what must be known of the first batch before anything is learned from it. Called once in a run."""

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """Losses of every sample of every task."""

    def follow(self) -> None:
        """Take in what the losses of an update were worked out from, once its step is made; a part of what is recorded (`capture.py`)."""

    @abstractmethod
    def after_update(self, updates: int) -> None:
        """What follows the `updates`-th update (the target network)."""

    def sync_target(self, names: Collection[str]) -> None:
        """Some of the network's parameters, by name, were changed, not learned (a reset, a source): what follows takes them at once."""

    def metrics(self) -> dict[str, torch.Tensor]:
        """What it has to tell of itself now, by name, each float `[K]`."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State besides the network's."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
