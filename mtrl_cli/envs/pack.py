"""A pack: the suite of tasks that a configuration describes, with their shapes and actions. What plays it is in `task_pack.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mtrl_cli.envs.action_log import MOST_ACTIONS
from mtrl_cli.errors import UserError

UNSEEDED = -1

Received = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    """One game of a pack, as it is by itself: its observation (one frame, unpadded, `[C, H, W]` or `[D]`), its actions and its scores.

    `symmetric`: it looks and plays the same in a mirror, with LEFT for RIGHT.
    """

    name: str
    observation_shape: tuple[int, ...]
    num_actions: int
    action_meanings: tuple[str, ...]
    frames_per_step: int
    random_score: float | None
    reference_score: float | None
    symmetric: bool = False


class VectorTask(Protocol):
    """N environments of one task. Nothing restarts by itself: whoever sees `done` resets before the next `send`.

    What `reset` and `recv` return may be written over by the next call.
    """

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Start new episodes where `mask` (bool `[N]`) holds, from `seeds` (int64, 31 bits, one for each). The first call is for all.

        A seed must make all that follows depend on nothing but itself and the actions, over any number of episodes that start `UNSEEDED`:
        with the random numbers that the one before left. (An environment that was never seeded may take any.)

        Returns:
            the observations of all N environments, `[N, *own shape]`; those that were not reset keep theirs.
        """

    def send(self, actions: np.ndarray) -> None:
        """Begin a step with `actions`, int64 `[N]`, each at least 0 and below the task's number of actions."""

    def recv(self) -> Received:
        """Wait for the step: observation `[N, *own shape]`, reward float32, terminated, truncated and done, bool, `[N]`.

        `done`: the game is over or cut off. `terminated`: nothing of value comes after for the learner, which a lost life may mean as well.
        """

    def close(self) -> None:
        """Free the environments."""


class Pack:
    """The tasks that one network is to learn, and how their observations share one array.

    Subclasses set `observation_kind` to "image" or "vector". Their keyword-only parameters are the keys of `conf/env/*.yaml`.

    Attributes:
        name: of the suite; runs are filed under it.
        tasks: in the configuration's order.
        num_envs: environments per task, in training.
        observation_shape: one frame, padded: to the most channels, or to the longest vector.
        observation_dtype: uint8 for images, float32 for vectors.
        observation_scale: what a network divides observations by to get about unit size.
        stack: how many frames the learner stacks.
        steps_between_seeds: an episode is seeded if at least so many steps were taken since the last seed; 0: each one. More costs less
            where seeding is slow, and makes a resume slower, which plays all steps since the last seed again.
    """

    observation_kind: str
    steps_between_seeds = 0

    def __init__(
        self, *, name: str, tasks: Sequence[Task], num_envs: int, observation_dtype: Any, observation_scale: float = 1.0, stack: int = 1
    ) -> None:
        for task in tasks:
            if task.num_actions > MOST_ACTIONS:
                raise UserError(f"env.tasks: {task.name} has {task.num_actions} actions; at most {MOST_ACTIONS} are supported")
        self.name = name
        self.tasks = tuple(tasks)
        self.num_envs = num_envs
        self.observation_shape = padded_shape(self.tasks)
        self.observation_dtype = np.dtype(observation_dtype)
        self.observation_scale = observation_scale
        self.stack = stack

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> VectorTask:
        """`num_envs` environments of one task, on `num_threads` threads where the emulator has its own."""
        raise NotImplementedError

    def render(self, task_index: int, seed: int, actions: Sequence[int], training: bool = False) -> Iterator[np.ndarray]:
        """Play an episode again from its seed and actions: its first frame, then one for each action, RGB uint8 `[H, W, 3]`.

        Raises:
            UserError: a package that drawing needs is not installed, or the task cannot be drawn.
        """
        raise NotImplementedError

    def render_fps(self, task_index: int) -> int:
        """How many of `render`'s frames make a second at the game's own speed."""
        raise NotImplementedError


def padded_shape(tasks: Sequence[Task]) -> tuple[int, ...]:
    """The smallest shape that holds each task's frame: vectors to the longest, images to the most channels.

    Raises:
        UserError: vectors and images together, or images of different height or width.
    """
    first = tasks[0]
    for task in tasks:
        if len(task.observation_shape) != len(first.observation_shape):
            raise UserError(
                f"env.tasks mixes vectors and images: {first.name} has observations of shape {first.observation_shape},"
                f" {task.name} of {task.observation_shape}\nA pack holds one kind of observation; put them in separate runs"
            )
        if task.observation_shape[1:] != first.observation_shape[1:]:
            sizes = [f"{each.name} has {'x'.join(map(str, each.observation_shape[1:]))}" for each in (first, task)]
            raise UserError(f"env.tasks: the images of one pack need one height and width, but {' and '.join(sizes)}")
    return (max(task.observation_shape[0] for task in tasks), *first.observation_shape[1:])
