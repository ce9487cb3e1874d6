"""Transfers between emulators on the host and the device of the learner: one copy per step in each direction."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from mtrl_cli.envs.vector_tasks import Step

FloatArray = NDArray[np.float32]


class SharedMemory:
    """Emulators and learner on the CPU: nothing is copied. `buffers` is None: `VectorTasks` allocates its buffers."""

    buffers: tuple[NDArray[np.generic], ...] | None = None

    def to_device(self, step: Step[np.ndarray], epsilon_K: FloatArray) -> tuple[Step[torch.Tensor], torch.Tensor]:
        """See `Pinned.to_device`."""
        return Step(*map(torch.from_numpy, vars(step).values())), torch.from_numpy(epsilon_K)

    def start_fetch(self, action: torch.Tensor) -> None:
        """See `Pinned.start_fetch`."""
        self._action = action

    def fetch(self) -> NDArray[np.int64]:
        """See `Pinned.fetch`."""
        return self._action.numpy()


class Pinned:
    """Emulators on the host, learner on a GPU: a step is one block of pinned memory, transferred in one copy.

    Two blocks alternate, so that emulators can write the next observation during a copy.

    Args:
        num_tasks, num_envs: K and N.
        frame_shape, dtype: shape and numpy dtype of one frame.
        device: device of the learner.

    Attributes:
        buffers: two arrays `[K, N, *frame]`, zeros, that the emulators write to.
    """

    def __init__(self, num_tasks: int, num_envs: int, frame_shape: tuple[int, ...], dtype: np.dtype, device: torch.device):
        K, N = num_tasks, num_envs
        # Four-byte values first, so that every part is aligned.
        parts: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((K,), torch.float32),
            ((K, N), torch.float32),
            ((K, N, *frame_shape), torch.from_numpy(np.empty(0, dtype)).dtype),
            ((3, K, N), torch.bool),
        ]
        size = sum(prod(shape) * dtype.itemsize for shape, dtype in parts)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._here = torch.zeros(size, dtype=torch.uint8, device=device)
        self._written = [[part.numpy() for part in _split(block, parts)] for block in self._host]
        self._read = _split(self._here, parts)
        self.buffers = tuple(written[2] for written in self._written)
        self._action = torch.zeros((K, N), dtype=torch.int64, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None

    def to_device(self, step: Step[np.ndarray], epsilon_K: FloatArray) -> tuple[Step[torch.Tensor], torch.Tensor]:
        """Start to copy a step to the device. Later operations on the device wait for the copy; the next call overwrites the result.

        Args:
            step: step whose observation is one of `buffers`.
            epsilon_K: `[K]`, epsilon of the next actions.
        """
        block = next(index for index, buffer in enumerate(self.buffers) if buffer is step.observation)
        epsilon, reward, _, flags = self._written[block]
        epsilon[:] = epsilon_K
        reward[:] = step.reward
        np.stack((step.terminated, step.truncated, step.done), out=flags)
        self._here.copy_(self._host[block], non_blocking=True)
        epsilon_on_device, rewards, frames, (terminated, truncated, done) = self._read
        return Step(frames, rewards, terminated, truncated, done), epsilon_on_device

    def start_fetch(self, action: torch.Tensor) -> None:
        """Start to copy actions (int64 `[K, N]`) to the host."""
        self._action.copy_(action, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def fetch(self) -> NDArray[np.int64]:
        """Wait for the copied actions and return them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._action.numpy()


def _split(block: torch.Tensor, parts: list[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
    """Split a block of bytes into consecutive views."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in parts]
    return [view.view(dtype).view(shape) for view, (shape, dtype) in zip(block.split(sizes), parts, strict=True)]
