"""A pack: the tasks that one network learns, with their observation shapes and actions. `vector_tasks.py` runs the environments."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mtrl_cli.envs.action_log import MAX_ACTIONS
from mtrl_cli.errors import UserError, unknown

UNSEEDED = -1

Received = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    """One task of a pack.

    Attributes:
        observation_shape: one frame without padding, `[C, H, W]` or `[D]`.
        frames_per_step: emulator frames per environment step.
        symmetric: whether mirrored observations with LEFT and RIGHT exchanged are equally valid.
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
    """N environments of one task. There is no automatic reset: the caller resets `done` environments before the next `send`.

    The arrays that `reset` and `recv` return may be overwritten by the next call.
    """

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Start new episodes in the environments of `mask`, bool `[N]`. The first call must reset all environments.

        After a reset with a seed, all results depend only on the seed and the actions. An `UNSEEDED` reset continues the random state of
        the last episode, so this also holds for the episodes after it. An environment that was never seeded may use any random state.

        Args:
            seeds: int64, a 31-bit seed or `UNSEEDED` for each environment of the mask.

        Returns:
            the observations of all N environments, `[N, *unpadded]`. Environments outside the mask keep their last observation.
        """

    def send(self, actions: np.ndarray) -> None:
        """Begin a step with `actions`, int64 `[N]`, each in `[0, num_actions)`."""

    def recv(self) -> Received:
        """Wait for the step and return observation `[N, *unpadded]`, reward float32 `[N]`, and terminated, truncated, done, bool `[N]`.

        `done`: the episode is over. `terminated`: the learner must not bootstrap from the next state. A lost life may set `terminated`
        without `done`.
        """

    def close(self) -> None:
        """Free the environments."""


class Pack:
    """The tasks that one network learns, and the shape of the array that holds all their observations.

    Subclasses set `observation_kind` to "image" or "vector". Their keyword-only parameters are the keys of `conf/env/*.yaml`.

    Attributes:
        name: name of the suite, also of the folder under `runs/`.
        tasks: in the order of the configuration.
        num_envs: training environments per task.
        observation_shape: one frame, padded to the most channels or the longest vector of all tasks.
        observation_dtype: uint8 for images, float32 for vectors.
        observation_scale: divisor that brings observations to about unit scale.
        stack: number of frames that the learner stacks.
        steps_between_seeds: an episode is seeded if at least this many steps were taken since the last seed; 0 seeds every episode. Higher
            values save time where seeding is slow, and make a resume slower, as all steps since the last seed are replayed.
    """

    observation_kind: str
    steps_between_seeds = 0

    def __init__(
        self, *, name: str, tasks: Sequence[Task], num_envs: int, observation_dtype: Any, observation_scale: float = 1.0, stack: int = 1
    ) -> None:
        for task in tasks:
            if task.num_actions > MAX_ACTIONS:
                raise UserError(f"env.tasks: {task.name} has {task.num_actions} actions; at most {MAX_ACTIONS} are supported")
        self.name = name
        self.tasks = tuple(tasks)
        self.num_envs = num_envs
        self.observation_shape = padded_shape(self.tasks)
        self.observation_dtype = np.dtype(observation_dtype)
        self.observation_scale = observation_scale
        self.stack = stack

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> VectorTask:
        """Create `num_envs` environments of one task, on `num_threads` emulator threads if the emulator is multi-threaded."""
        raise NotImplementedError

    def render(self, task_index: int, seed: int, actions: Sequence[int], training: bool = False) -> Iterator[np.ndarray]:
        """Replay an episode from its seed and actions. Yields the first frame and one frame per action, RGB uint8 `[H, W, 3]`.

        Raises:
            UserError: rendering needs a package that is not installed, or the task cannot be rendered.
        """
        raise NotImplementedError

    def render_fps(self, task_index: int) -> int:
        """Return the number of rendered frames per second at normal speed."""
        raise NotImplementedError


def padded_shape(tasks: Sequence[Task]) -> tuple[int, ...]:
    """Return the smallest shape that holds a frame of each task: the longest vector, or the most channels.

    Raises:
        UserError: the tasks mix vectors and images, or images of different height or width.
    """
    first = tasks[0]
    for task in tasks:
        if len(task.observation_shape) != len(first.observation_shape):
            raise UserError(
                f"env.tasks mixes vectors and images: {first.name} has observations of shape {first.observation_shape},"
                f" {task.name} of shape {task.observation_shape}\nTrain them in separate runs"
            )
        if task.observation_shape[1:] != first.observation_shape[1:]:
            sizes = [f"{each.name} has {'x'.join(map(str, each.observation_shape[1:]))}" for each in (first, task)]
            raise UserError(f"env.tasks: all images must have the same height and width, but {' and '.join(sizes)}")
    return (max(task.observation_shape[0] for task in tasks), *first.observation_shape[1:])


def check_names(names: Sequence[str], known: Collection[str], kind: str, key: str = "env.tasks") -> None:
    """Check that all names are known.

    Args:
        kind: kind of name, for messages: "an Atari game".
        key: configuration key of the names.

    Raises:
        UserError: an unknown name, with a suggestion.
    """
    for name in names:
        if name not in known:
            raise UserError(unknown("task", name, sorted(known), where=f" in {key}: not {kind}"))
