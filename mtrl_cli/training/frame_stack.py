"""Stacks of the newest frames of every environment."""

from __future__ import annotations

import torch

from mtrl_cli.machine.saved import Saved


class FrameStack(Saved):
    """The newest S frames of K x N environments, zeros before the start of an episode.

    Args:
        num_tasks, num_envs: K and N.
        stack: S.
        frame_shape, dtype: shape and dtype of one frame.
        device: device of the frames.

    Attributes:
        observation: `[K, N, S, *frame]`, newest frame last. Changed in place.
        start: bool `[K, N]`, whether the newest frame is the first of its episode. Changed in place.
    """

    saved = ("observation", "start")

    def __init__(self, num_tasks: int, num_envs: int, stack: int, frame_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.observation = torch.zeros((num_tasks, num_envs, stack, *frame_shape), dtype=dtype, device=device)
        self.start = torch.ones((num_tasks, num_envs), dtype=torch.bool, device=device)

    @property
    def newest(self) -> torch.Tensor:
        """The newest frame, `[K, N, *frame]`."""
        return self.observation[:, :, -1]

    def push(self, frame: torch.Tensor, start: torch.Tensor) -> None:
        """Append a frame `[K, N, *frame]`; `start` (bool `[K, N]`) marks first frames of episodes."""
        older = self.observation[:, :, 1:] * (~start).view(*start.shape, *(1,) * (self.observation.dim() - 2))
        self.observation.copy_(torch.cat([older, frame[:, :, None]], 2))
        self.start.copy_(start)
