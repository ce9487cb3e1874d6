"""The actions taken in each environment since its last seed. Together with the seed they reproduce the environment's state."""

from __future__ import annotations

import numpy as np

MAX_ACTIONS = 256  # an action is stored in one byte
INITIAL_CAPACITY = 1024


class ActionLog:
    """The actions of K tasks with N environments each.

    Attributes:
        lengths: int64 `[K, N]`, number of actions per environment. Set a length to 0 to clear the environment's log.
    """

    def __init__(self, num_tasks: int, num_envs: int) -> None:
        self.lengths = np.zeros((num_tasks, num_envs), np.int64)
        self._actions = np.zeros((num_tasks, num_envs, INITIAL_CAPACITY), np.uint8)

    def record(self, actions: np.ndarray, active: np.ndarray) -> None:
        """Append an action for each environment of the active tasks.

        Args:
            actions: int64 `[K, N]`, each in `[0, MAX_ACTIONS)`.
            active: bool `[K]`.
        """
        self._reserve(int(self.lengths.max()) + 1)
        tasks, envs = np.nonzero(np.broadcast_to(active[:, None], self.lengths.shape))
        self._actions[tasks, envs, self.lengths[tasks, envs]] = actions[tasks, envs]
        self.lengths[active] += 1

    def at(self, task: int, indices: np.ndarray) -> np.ndarray:
        """Return one action of each environment of a task, int64 `[N]`, at `indices`, int64 `[N]`."""
        return self._actions[task, np.arange(self.lengths.shape[1]), indices].astype(np.int64)

    def flat(self) -> np.ndarray:
        """Return all actions as one uint8 array, environment by environment in the order of `lengths.ravel()`."""
        return self._actions[self._is_recorded()]

    def load(self, actions: np.ndarray, lengths: np.ndarray) -> None:
        """Replace the log with the result of `flat` and the `lengths` at that time."""
        self.lengths[:] = lengths
        self._reserve(int(lengths.max()))
        self._actions[self._is_recorded()] = actions

    def _is_recorded(self) -> np.ndarray:
        return np.arange(self._actions.shape[-1]) < self.lengths[..., None]

    def _reserve(self, length: int) -> None:
        """Grow to `length` actions. The capacity at least doubles, so that the cost per step does not grow with the episode."""
        missing = length - self._actions.shape[-1]
        if missing > 0:
            added = max(missing, self._actions.shape[-1])
            self._actions = np.concatenate([self._actions, np.zeros((*self.lengths.shape, added), np.uint8)], axis=-1)
