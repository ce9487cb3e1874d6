"""The five MinAtar games (Young and Tian 2019) from the optional package `minatar`.

Observations are `[C, 10, 10]` of 0 and 1, where C is the number of object types in the game, 4 to 10. Some games may never end, so
episodes are truncated after `max_episode_steps`; the published scores were measured without this limit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from mtrl_cli.envs.pack import Pack, Task, VectorTask, check_names
from mtrl_cli.envs.scores import scores
from mtrl_cli.envs.serial import SerialVectorTask
from mtrl_cli.machine import extras
from mtrl_cli.types import Fraction, Names, PositiveInt

GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
ACTION_MEANINGS = ("NOOP", "LEFT", "UP", "RIGHT", "DOWN", "FIRE")
FRAMES_PER_SECOND = 10
PIXELS_PER_CELL = 16  # per side, in rendered frames

# Black, and one color per channel. A cell shows the last of its channels.
PALETTE = np.array(
    [
        (0, 0, 0), (230, 230, 230), (230, 80, 60), (60, 160, 230), (250, 200, 60), (90, 200, 110),
        (190, 110, 220), (240, 140, 50), (80, 210, 210), (150, 150, 150), (230, 120, 170),
    ],
    np.uint8,
)  # fmt: skip


class MinAtarPack(Pack):
    """MinAtar games by name. The defaults are those of the paper: sticky actions, difficulty ramping and minimal action sets.

    Args:
        sticky: probability of repeating the last action.
        symmetric: the games that augmentation=flip may mirror.
    """

    observation_kind = "image"

    def __init__(
        self,
        *,
        name: str,
        tasks: Names,
        num_envs: PositiveInt = 8,
        sticky: Fraction = 0.1,
        difficulty_ramping: bool = True,
        minimal_actions: bool = True,
        max_episode_steps: PositiveInt = 10_000,
        symmetric: list[str] = [],  # noqa: B006 (a literal, because the schema reads the source)
    ) -> None:
        check_names(tasks, GAMES, "a MinAtar game")
        check_names(symmetric, GAMES, "a MinAtar game", "env.symmetric")
        self._symmetric = symmetric
        self._package = _import_minatar()
        self.sticky = sticky
        self.difficulty_ramping = difficulty_ramping
        self.minimal_actions = minimal_actions
        self.max_episode_steps = max_episode_steps
        super().__init__(name=name, tasks=[self._task(game) for game in tasks], num_envs=num_envs, observation_dtype=np.uint8)

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> VectorTask:
        """See `Pack.vector`."""
        envs = [self._env(self.tasks[task_index].name) for _ in range(num_envs)]
        return SerialVectorTask(envs, self.tasks[task_index].observation_shape, self.observation_dtype)

    def render(self, task_index: int, seed: int, actions: Sequence[int], training: bool = False) -> Iterator[np.ndarray]:
        """See `Pack.render`."""
        env = self._env(self.tasks[task_index].name)
        yield _draw(env.reset(seed))
        for action in actions:
            yield _draw(env.step(action)[0])

    def render_fps(self, task_index: int) -> int:
        """See `Pack.render_fps`."""
        return FRAMES_PER_SECOND

    def _task(self, name: str) -> Task:
        env = self._env(name)
        meanings = tuple(ACTION_MEANINGS[action] for action in env.actions)
        return Task(name, env.reset(0).shape, len(meanings), meanings, 1, *scores("minatar", name), name in self._symmetric)

    def _env(self, name: str) -> MinAtarEnv:
        environment = self._package.Environment(name, sticky_action_prob=self.sticky, difficulty_ramping=self.difficulty_ramping)
        actions = environment.minimal_action_set() if self.minimal_actions else list(range(len(ACTION_MEANINGS)))
        return MinAtarEnv(environment, actions, self.max_episode_steps)


class MinAtarEnv:
    """One environment, a `mtrl_cli.envs.serial.Env`. `actions` maps the task's actions to MinAtar's."""

    def __init__(self, environment: Any, actions: Sequence[int], max_episode_steps: int) -> None:
        self._environment = environment
        self._max_episode_steps = max_episode_steps
        self._steps = 0
        self.actions = list(actions)

    def reset(self, seed: int | None) -> np.ndarray:
        """See `Env.reset`."""
        if seed is not None:
            self._environment.seed(seed)
        self._environment.last_action = 0  # not cleared by MinAtar's reset; the first sticky action would repeat it
        self._environment.reset()
        self._steps = 0
        return self._observation()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """See `Env.step`."""
        reward, terminated = self._environment.act(self.actions[action])
        self._steps += 1
        return self._observation(), reward, terminated, self._steps >= self._max_episode_steps and not terminated

    def close(self) -> None:
        """Do nothing."""

    def _observation(self) -> np.ndarray:
        """uint8 `[C, 10, 10]`."""
        state: np.ndarray = self._environment.state()
        return state.transpose(2, 0, 1).view(np.uint8)


def _draw(observation: np.ndarray) -> np.ndarray:
    """Draw an observation `[C, 10, 10]` as RGB uint8 `[160, 160, 3]`."""
    colors = np.arange(1, len(observation) + 1)[:, None, None]
    image = PALETTE[(observation * colors).max(axis=0)]
    return image.repeat(PIXELS_PER_CELL, axis=0).repeat(PIXELS_PER_CELL, axis=1)


def _import_minatar() -> ModuleType:
    """Import minatar without its warning about missing plotting packages, which `_draw` does not need."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return import_module("minatar")
    except ImportError:
        raise extras.missing("env=minatar_pack", "minatar", "minatar") from None
    finally:
        logging.disable(disabled)
