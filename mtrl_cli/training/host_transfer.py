"""What emulators and the learner's device hand each other: one copy each way, from and to memory that the device can reach by itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass
class Arrived:
    """A step of K x N environments on the learner's device, and what was sent along. The next one may be written over it.

    Attributes:
        observation: `[K, N, *frame]`.
        reward: float32 `[K, N]`.
        terminated, truncated, done: bool `[K, N]`.
        epsilon_K: float32 `[K]`.
    """

    observation: torch.Tensor
    reward: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    done: torch.Tensor
    epsilon_K: torch.Tensor


class SharedMemory:
    """Emulators and learner on the CPU: nothing is copied. `buffers`: None, the emulators have their own."""

    buffers: tuple[NDArray[np.generic], ...] | None = None

    def bring(
        self, observation: NDArray[np.generic], reward: NDArray[np.float32], flags: NDArray[np.bool_], epsilon_K: NDArray[np.float32]
    ) -> Arrived:
        """See `Pinned.bring`."""
        return Arrived(*(torch.from_numpy(array) for array in (observation, reward, *flags, epsilon_K)))

    def fetch(self, action: torch.Tensor) -> None:
        """See `Pinned.fetch`."""
        self._action = action

    def fetched(self) -> NDArray[np.int64]:
        """See `Pinned.fetched`."""
        return self._action.numpy()


class Pinned:
    """Emulators on the host, the learner on a GPU: everything of a step lies in one block of pinned memory and goes over in one copy.

    Two blocks take turns, so that emulators can write the next observation while one is on its way.

    Args:
        num_tasks, num_envs: K and N.
        frame_shape, dtype: of one frame; dtype as numpy has it.
        device: the learner's.

    Attributes:
        buffers: two arrays `[K, N, *frame]`, zeros: where emulators are to write.
    """

    def __init__(self, num_tasks: int, num_envs: int, frame_shape: tuple[int, ...], dtype: np.dtype, device: torch.device):
        K, N = num_tasks, num_envs
        # Numbers of four bytes first, so that each lies at a multiple of its size.
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
        self._arrived = torch.cuda.Event() if pinned else None

    def bring(
        self, observation: NDArray[np.generic], reward: NDArray[np.float32], flags: NDArray[np.bool_], epsilon_K: NDArray[np.float32]
    ) -> Arrived:
        """Begin to copy a step to the device; what is done there next waits for it by itself.

        Args:
            observation: `[K, N, *frame]`, one of `buffers`.
            reward: `[K, N]`.
            flags: `[3, K, N]`: terminated, truncated, done.
            epsilon_K: `[K]`.
        """
        block = next(index for index, buffer in enumerate(self.buffers) if buffer is observation)
        written = self._written[block]
        written[0][:], written[1][:], written[3][:] = epsilon_K, reward, flags
        self._here.copy_(self._host[block], non_blocking=True)
        epsilon, rewards, frames, (terminated, truncated, done) = self._read
        return Arrived(frames, rewards, terminated, truncated, done, epsilon)

    def fetch(self, action: torch.Tensor) -> None:
        """Begin to copy actions (int64 `[K, N]`) to the host."""
        self._action.copy_(action, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def fetched(self) -> NDArray[np.int64]:
        """The actions, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._action.numpy()


def _split(block: torch.Tensor, parts: list[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
    """Views of a block of bytes, one after the other."""
    views, start = [], 0
    for shape, dtype in parts:
        stop = start + prod(shape) * dtype.itemsize
        views.append(block[start:stop].view(dtype).view(shape))
        start = stop
    return views
