"""N environments written in Python, stepped one after the other, as one `VectorTask`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mtrl_cli.envs.pack import UNSEEDED, Received


class Env(Protocol):
    """One environment. Observations have the task's unpadded shape."""

    def reset(self, seed: int | None) -> np.ndarray:
        """Start an episode and return its first observation. Without a seed, only the random state carries over from the last episode."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Return observation, reward, terminated, truncated."""

    def close(self) -> None:
        """Free the environment's resources."""


class SerialVectorTask:
    """A `VectorTask` of `envs`. `send` only stores the actions, and `recv` runs the steps, as there is no background thread."""

    def __init__(self, envs: Sequence[Env], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._envs = envs
        self._observation = np.zeros((len(envs), *shape), dtype)
        self._actions: list[int] = []

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See `VectorTask.reset`."""
        for index, seed in zip(np.flatnonzero(mask).tolist(), seeds.tolist(), strict=True):
            self._observation[index] = self._envs[index].reset(None if seed == UNSEEDED else seed)
        return self._observation

    def send(self, actions: np.ndarray) -> None:
        """See `VectorTask.send`."""
        self._actions = actions.tolist()

    def recv(self) -> Received:
        """See `VectorTask.recv`."""
        reward = np.zeros(len(self._envs), np.float32)
        terminated, truncated = np.zeros((2, len(self._envs)), bool)
        for index, (env, action) in enumerate(zip(self._envs, self._actions, strict=True)):
            self._observation[index], reward[index], terminated[index], truncated[index] = env.step(action)
        return self._observation, reward, terminated, truncated, terminated | truncated

    def close(self) -> None:
        """See `VectorTask.close`."""
        for env in self._envs:
            env.close()
