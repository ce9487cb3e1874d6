"""Sizes, transitions and batches of a replay."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ReplaySpec:
    """Sizes of a run's replay.

    Attributes:
        num_tasks, num_envs: K and N.
        frame_shape, dtype: of one frame.
        stack: frames per observation, S.
        n_step: rewards per sample, n.
        device: of all tensors.
        seed: of the sampling.
        total_steps: steps per task of the whole run, for annealing.
        rollout_length: steps of each environment per rollout; 0 for an agent that does not learn from rollouts.
    """

    num_tasks: int
    num_envs: int
    frame_shape: tuple[int, ...]
    dtype: torch.dtype
    stack: int
    n_step: int
    device: torch.device
    seed: int
    total_steps: int
    rollout_length: int = 0


@dataclass
class Transition:
    """One step of N environments of each of K tasks.

    Attributes:
        frame: `[K, N, *frame]`, the newest frame of the observation in which `action` was chosen.
        start: bool `[K, N]`, whether `frame` is the first of its episode.
        action: int64 `[K, N]`.
        reward: float32 `[K, N]`, unscaled.
        terminated, truncated: bool `[K, N]`; a step that is both counts as terminated.
        done: bool `[K, N]`, whether the episode ended. A lost life terminates a transition without ending the episode.
        value: float32 `[K, N]`, `Agent.value_to_store` of the observation; zeros where the agent stores no value.
    """

    frame: torch.Tensor
    start: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    done: torch.Tensor
    value: torch.Tensor


@dataclass
class Samples:
    """B samples of each of K tasks.

    Attributes:
        observation: `[K, B, S, *frame]`, zeros where a stack reaches before the start of its episode. `[K, M * B, S, *frame]` after an
            augmentation that draws each observation M times (`augmentation.base.Pipeline`); `action` has the same number of samples.
        action: int64 `[K, B]`.
        weight: float32 `[K, B]`, factor on the loss: the importance weight, or 0 for an invalid sample.
        index: int64 `[K, B]`, position in the replay.
    """

    observation: torch.Tensor
    action: torch.Tensor
    weight: torch.Tensor
    index: torch.Tensor


@dataclass
class Batch(Samples):
    """Samples with n-step windows.

    Attributes:
        rewards: float32 `[K, B, n]`, unscaled, zero past the end of the window.
        steps: int64 `[K, B]`, rewards in the window: n, or fewer where the episode ends earlier.
        terminated: bool `[K, B]`, whether the window ends in a terminal state, which has no bootstrap value.
        next_observation: `[K, B, S, *frame]`, the observation after the window. An augmentation may draw it several times.
    """

    rewards: torch.Tensor
    steps: torch.Tensor
    terminated: torch.Tensor
    next_observation: torch.Tensor


@dataclass
class RolloutBatch(Samples):
    """Samples of a rollout.

    Attributes:
        returns: float32 `[K, B]`, lambda-returns of scaled rewards.
    """

    returns: torch.Tensor


@dataclass
class Rollout:
    """T steps of N environments of each of K tasks.

    Attributes:
        rewards: float32 `[K, T, N]`, unscaled.
        values: float32 `[K, T + 1, N]`, stored values of the observations, that after the last step included.
        terminated, truncated: bool `[K, T, N]`; never both.
    """

    rewards: torch.Tensor
    values: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
