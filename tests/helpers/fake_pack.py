"""A pack of fake environments: fast, reproducible from a seed, and different in shape, actions and length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mtrl_cli.envs.pack import Pack, Received, Task
from mtrl_cli.envs.serial import SerialVectorTask

# name: length of an observation, number of actions, longest episode
TASKS = {"short": (3, 2, 6), "middle": (5, 4, 12), "long": (2, 3, 40)}


class FakeEnv:
    """Environment with noise as observations, which terminates or is truncated after a random number of steps.

    The reward is the action's number, plus 0.1 with probability 0.5.

    Attributes:
        lost_life: a life was lost in the last step; the number of lives is unlimited.
    """

    def __init__(self, task: Task):
        self._task = task
        self._longest = TASKS[task.name][2]
        self.closed = False

    def reset(self, seed: int) -> np.ndarray:
        self._random = np.random.default_rng(seed)
        self._left = int(self._random.integers(1, self._longest + 1))
        self._cut = self._random.random() < 0.3
        self.lost_life = False
        return self._look()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        assert 0 <= action < self._task.num_actions
        assert self._left > 0, "stepped after the end of the episode"
        self._left -= 1
        over = self._left == 0
        self.lost_life = not over and bool(self._random.random() < 0.1)
        return self._look(), action + 0.1 * self._random.integers(2), over and not self._cut, over and self._cut

    def _look(self) -> np.ndarray:
        return self._random.normal(size=self._task.observation_shape).astype(np.float32)

    def close(self) -> None:
        self.closed = True


class FakeVectorTask(SerialVectorTask):
    """In training, a lost life terminates the return but does not end the episode."""

    def __init__(self, envs: Sequence[FakeEnv], task: Task, training: bool):
        super().__init__(envs, task.observation_shape, np.dtype(np.float32))
        self._fakes, self._training = envs, training

    def recv(self) -> Received:
        observation, reward, terminated, truncated, done = super().recv()
        lost = np.array([env.lost_life for env in self._fakes])
        return observation, reward, terminated | (lost & self._training), truncated, done


class FakePack(Pack):
    """Pack of some of the fake environments.

    Attributes:
        envs: all environments created so far.
        training: for each started task, whether it was started for training.
    """

    observation_kind = "vector"

    def __init__(self, tasks: Sequence[str] = tuple(TASKS), num_envs: int = 2, stack: int = 1, scores: bool = True):
        known = (0.0, 10.0) if scores else (None, None)
        made = [Task(name, TASKS[name][:1], TASKS[name][1], tuple("abcd")[: TASKS[name][1]], 1, *known) for name in tasks]
        super().__init__(name="fake", tasks=made, num_envs=num_envs, observation_dtype=np.float32, stack=stack)
        self.envs: list[FakeEnv] = []
        self.training: list[bool] = []

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> FakeVectorTask:
        envs = [FakeEnv(self.tasks[task_index]) for _ in range(num_envs)]
        self.envs += envs
        self.training.append(training)
        return FakeVectorTask(envs, self.tasks[task_index], training)


class PrefersLastAction(nn.Module):
    """A network whose greedy action is each task's last action, for all observations."""

    def __init__(self, pack: Pack):
        super().__init__()
        self._last = torch.tensor([task.num_actions - 1 for task in pack.tasks])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        best = nn.functional.one_hot(self._last, int(self._last.max()) + 1).float()
        return best[:, None].expand(-1, observation.shape[1], -1)
