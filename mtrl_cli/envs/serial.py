"""N environments written in Python, stepped one after the other, as one `VectorTask`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mtrl_cli.envs.pack import UNSEEDED, Received


class Game(Protocol):
    """One environment. Observations have the task's unpadded shape."""

    def reset(self, seed: int | None) -> np.ndarray:
        """Start an episode and return its first observation. Without a seed, only the random state carries over from the last episode."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Return observation, reward, terminated, truncated."""

    def close(self) -> None:
        """Free the environment's resources."""


class SerialVectorTask:
    """A `VectorTask` of `games`. `send` only stores the actions, and `recv` runs the steps, as there is no background thread."""

    def __init__(self, games: Sequence[Game], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._games = games
        self._observation = np.zeros((len(games), *shape), dtype)
        self._actions: list[int] = []

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See `VectorTask.reset`."""
        for index, seed in zip(np.flatnonzero(mask).tolist(), seeds.tolist(), strict=True):
            self._observation[index] = self._games[index].reset(None if seed == UNSEEDED else seed)
        return self._observation

    def send(self, actions: np.ndarray) -> None:
        """See `VectorTask.send`."""
        self._actions = actions.tolist()

    def recv(self) -> Received:
        """See `VectorTask.recv`."""
        reward = np.zeros(len(self._games), np.float32)
        terminated, truncated = np.zeros((2, len(self._games)), bool)
        for index, (game, action) in enumerate(zip(self._games, self._actions, strict=True)):
            self._observation[index], reward[index], terminated[index], truncated[index] = game.step(action)
        return self._observation, reward, terminated, truncated, terminated | truncated

    def close(self) -> None:
        """See `VectorTask.close`."""
        for game in self._games:
            game.close()
