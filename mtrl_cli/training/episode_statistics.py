"""Returns and lengths of training episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtrl_cli.machine.saved import Saved
from mtrl_cli.metric_names import TRAIN_LENGTH, TRAIN_RETURN

Total = Callable[[NDArray[Any]], NDArray[Any]]


class EpisodeStatistics(Saved):
    """Returns and lengths of training episodes of K tasks with N environments each.

    `row()` returns means over the episodes that ended since the last call, `recent()` means over the last `window` episodes of each task.
    With several processes, `total` sums an array over the processes, and the means are over the episodes of all processes.
    """

    saved = ("_returns", "_lengths", "_ended_return", "_ended_length", "_ended", "_recent", "_recent_count")

    def __init__(self, tasks: Sequence[str], num_envs: int, window: int = 100):
        self.tasks = tuple(tasks)
        shape = (len(self.tasks), num_envs)
        self._returns = np.zeros(shape, np.float64)
        self._lengths = np.zeros(shape, np.int64)
        self._ended_return = np.zeros(len(self.tasks), np.float64)
        self._ended_length = np.zeros(len(self.tasks), np.int64)
        self._ended = np.zeros(len(self.tasks), np.int64)
        self._recent = np.zeros((len(self.tasks), window), np.float64)
        self._recent_count = np.zeros(len(self.tasks), np.int64)

    def add(self, reward: NDArray[np.floating[Any]], done: NDArray[np.bool_]) -> None:
        """Add one step of every environment: unscaled rewards `[K, N]`, and ends of episodes, bool `[K, N]`."""
        self._returns += reward
        self._lengths += 1
        if not done.any():
            return
        task, env = np.nonzero(done)
        returns, lengths = self._returns[task, env], self._lengths[task, env]
        np.add.at(self._ended_return, task, returns)
        np.add.at(self._ended_length, task, lengths)
        np.add.at(self._ended, task, 1)
        for index, value in zip(task, returns, strict=True):  # rare: once an episode
            self._recent[index, self._recent_count[index] % self._recent.shape[1]] = value
            self._recent_count[index] += 1
        self._returns[task, env] = 0.0
        self._lengths[task, env] = 0

    def row(self, total: Total = lambda array: array) -> dict[str, float]:
        """Return `train/return/<task>` and `train/length/<task>` (in steps) of the episodes that ended since the last call.

        Tasks without such episodes are absent.
        """
        metrics: dict[str, float] = {}
        returns, lengths, ended = total(np.stack([self._ended_return, self._ended_length, self._ended]))
        for index in np.flatnonzero(ended):
            metrics[TRAIN_RETURN + self.tasks[index]] = float(returns[index] / ended[index])
            metrics[TRAIN_LENGTH + self.tasks[index]] = float(lengths[index] / ended[index])
        for ended in (self._ended_return, self._ended_length, self._ended):
            ended[:] = 0
        return metrics

    def recent(self, total: Total = lambda array: array) -> dict[str, float]:
        """Return the mean return of the last `window` episodes of each task; tasks without episodes are absent."""
        held = np.minimum(self._recent_count, self._recent.shape[1])
        returns = [self._recent[index, :count].sum() for index, count in enumerate(held)]
        returns, held = total(np.stack([returns, held]))
        return {task: float(returns[index] / held[index]) for index, task in enumerate(self.tasks) if held[index]}
