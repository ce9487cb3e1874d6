"""What a replay is told of its run, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ReplaySpec:
    """What a replay must know of its run.

    Attributes:
        num_tasks, num_envs: K and N.
        frame_shape, dtype: of one frame.
        stack: frames per observation, S.
        n_step: rewards per sample, n.
        device: where it is kept.
        seed: of the sampling.
        total_steps: steps per task of the whole run (for annealing).
        rollout_length: steps of each environment per rollout, where the agent learns from these.
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
class Batch:
    """B samples of each of K tasks.

    Attributes:
        observation, next_observation: `[K, B, S, *frame]`, zeros where a stack reaches before its episode's start; where an augmentation
            draws each several times (`augmentation.base.Pipeline`) as many times B, and so is the action.
        action: int64 `[K, B]`.
        rewards: float32 `[K, B, n]`, the game's own, zero past the window's end.
        steps: int64 `[K, B]`, how many rewards the window has: n, or fewer where its episode ends before.
        terminated: bool `[K, B]`, the window ends in a terminal state: nothing is bootstrapped.
        weight: float32 `[K, B]`, factor on the loss: importance weights; 0 for a sample that could not be drawn.
        index: int64 `[K, B]`, where it lies (for priorities).
    """

    observation: torch.Tensor
    action: torch.Tensor
    rewards: torch.Tensor
    steps: torch.Tensor
    terminated: torch.Tensor
    next_observation: torch.Tensor
    weight: torch.Tensor
    index: torch.Tensor
