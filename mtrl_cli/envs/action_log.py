"""What was done in each of K x N environments since it was last seeded: with the seed, enough to play it again."""

from __future__ import annotations

import numpy as np

MOST_ACTIONS = 256  # a journal holds an action in one byte
FIRST_CAPACITY = 1024


class ActionLog:
    """The actions of K tasks with N environments each.

    Attributes:
        lengths: int64 `[K, N]`, how many actions each journal holds; a journal is emptied by setting its length to 0.
    """

    def __init__(self, num_tasks: int, num_envs: int) -> None:
        self.lengths = np.zeros((num_tasks, num_envs), np.int64)
        self._actions = np.zeros((num_tasks, num_envs, FIRST_CAPACITY), np.uint8)

    def record(self, actions: np.ndarray, active: np.ndarray) -> None:
        """Add an action to each journal of the tasks that are active.

        Args:
            actions: int64 `[K, N]`, each at least 0 and below `MOST_ACTIONS`.
            active: bool `[K]`.
        """
        self._reserve(int(self.lengths.max()) + 1)
        tasks, envs = np.nonzero(np.broadcast_to(active[:, None], self.lengths.shape))
        self._actions[tasks, envs, self.lengths[tasks, envs]] = actions[tasks, envs]
        self.lengths[active] += 1

    def at(self, task: int, places: np.ndarray) -> np.ndarray:
        """One action of each environment of a task, int64 `[N]`: those at `places`, int64 `[N]`."""
        return self._actions[task, np.arange(self.lengths.shape[1]), places].astype(np.int64)

    def flat(self) -> np.ndarray:
        """All journals one after the other, in the order of `lengths.ravel()`, uint8."""
        return self._actions[self._written()]

    def load(self, actions: np.ndarray, lengths: np.ndarray) -> None:
        """Take over what `flat` gave, with the `lengths` that there were then."""
        self.lengths[:] = lengths
        self._reserve(int(lengths.max()))
        self._actions[self._written()] = actions

    def _written(self) -> np.ndarray:
        return np.arange(self._actions.shape[-1]) < self.lengths[..., None]

    def _reserve(self, length: int) -> None:
        """Make room for journals of `length` actions, at least doubling, so that a step costs the same however long the game."""
        missing = length - self._actions.shape[-1]
        if missing > 0:
            more = max(missing, self._actions.shape[-1])
            self._actions = np.concatenate([self._actions, np.zeros((*self.lengths.shape, more), np.uint8)], axis=-1)
