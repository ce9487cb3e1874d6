"""Environments from Gymnasium's registry, with Box observations and Discrete actions.

Vectors (1-D Box) become float32. Components with finite bounds are scaled to [-1, 1]; the other components are unchanged. Images (3-D
uint8 Box) become `[C, H, W]`. Episodes have the time limit of the registration unless `max_episode_steps` is set.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from mtrl_cli.envs.pack import Pack, Task, VectorTask, check_names
from mtrl_cli.envs.scores import scores
from mtrl_cli.envs.serial import SerialVectorTask
from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras
from mtrl_cli.types import Names, NonNegativeInt, PositiveInt

UNBOUNDED = 1e30  # some environments use the largest float32 for "no bound"
DEFAULT_FPS = 30

# Rendering goes to arrays: no window, no sound, and no warning on machines without a screen.
HEADLESS = {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy", "XDG_RUNTIME_DIR": tempfile.gettempdir()}


class GymnasiumPack(Pack):
    """Registered environments by id (CartPole-v1), either all with vector or all with image observations.

    Args:
        tasks: environment ids. Ids such as `package:Env-v0` are refused, because Gymnasium would import the package.
        max_episode_steps: time limit that truncates episodes; 0 keeps the limit of each registration.
    """

    def __init__(self, *, name: str, tasks: Names, num_envs: PositiveInt = 8, max_episode_steps: NonNegativeInt = 0) -> None:
        for each in tasks:
            _refuse_prefix(each)
        check_names(tasks, set(gymnasium.registry), "a registered Gymnasium id")
        self.max_episode_steps = max_episode_steps
        described, spaces = [], []
        for each in tasks:
            env = self._make(each)
            described.append(_task(each, env))
            spaces.append(env.observation_space)
            env.close()
        is_image = len(spaces[0].shape or ()) == 3
        super().__init__(
            name=name,
            tasks=described,
            num_envs=num_envs,
            observation_dtype=np.uint8 if is_image else np.float32,
            observation_scale=max(float(space.high.max()) for space in spaces) if is_image else 1.0,  # type: ignore[attr-defined]
        )
        self.observation_kind = "image" if is_image else "vector"

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> VectorTask:
        """See `Pack.vector`. The environments run one after the other; `num_threads` is ignored."""
        task = self.tasks[task_index]
        envs = [GymnasiumEnv(self._make(task.name)) for _ in range(num_envs)]
        return SerialVectorTask(envs, task.observation_shape, self.observation_dtype)

    def render(self, task_index: int, seed: int, actions: Sequence[int], training: bool = False) -> Iterator[np.ndarray]:
        """See `Pack.render`."""
        name = self.tasks[task_index].name
        if "rgb_array" not in self._metadata(name).get("render_modes", []):
            raise UserError(f"{name} cannot be rendered: it has no render mode rgb_array")
        env = GymnasiumEnv(self._make(name, render_mode="rgb_array"))
        try:
            env.reset(seed)
            yield env.render()
            for action in actions:
                env.step(action)
                yield env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(
                f"{name} cannot be rendered: {' '.join(str(error).split())}\nFor classic control: {extras.install_command('video')}"
            ) from None
        finally:
            env.close()

    def render_fps(self, task_index: int) -> int:
        """See `Pack.render_fps`."""
        return int(self._metadata(self.tasks[task_index].name).get("render_fps", DEFAULT_FPS))

    def _metadata(self, name: str) -> dict[str, Any]:
        env = self._make(name)
        env.close()
        return env.metadata

    def _make(self, name: str, **options: Any) -> gymnasium.Env:
        for variable, value in HEADLESS.items():
            os.environ.setdefault(variable, value)
        limit = self.max_episode_steps or None
        try:
            # The checker slows every step and warns about spaces that `_task` refuses.
            return gymnasium.make(name, max_episode_steps=limit, disable_env_checker=True, **options)
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            raise UserError(f"env.tasks: {name} needs a package that is not installed\n{' '.join(str(error).split())}") from None


class GymnasiumEnv:
    """One environment, a `mtrl_cli.envs.serial.Env`."""

    def __init__(self, env: gymnasium.Env) -> None:
        self._env = env
        self._first_action = int(env.action_space.start)  # type: ignore[attr-defined]
        self._convert = _converter(env.observation_space)

    def reset(self, seed: int | None) -> np.ndarray:
        """See `Env.reset`."""
        return self._convert(self._env.reset(seed=seed)[0])

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """See `Env.step`."""
        observation, reward, terminated, truncated, _ = self._env.step(action + self._first_action)
        return self._convert(observation), float(reward), bool(terminated), bool(truncated)

    def render(self) -> np.ndarray:
        """Return the current frame, RGB uint8 `[H, W, 3]`."""
        return np.asarray(self._env.render(), np.uint8)

    def close(self) -> None:
        """See `Env.close`."""
        self._env.close()


def _refuse_prefix(name: str) -> None:
    package, colon, rest = name.partition(":")
    if colon:
        raise UserError(
            f"env.tasks: ids with a package prefix are not supported, got {name}. Use {rest}\n"
            f"If you trust the package {package} to run code, add trusted_packages=[{package}] to the command line"
        )


def _task(name: str, env: gymnasium.Env) -> Task:
    """Describe an environment. Raises UserError for unsupported spaces."""
    space, actions = env.observation_space, env.action_space
    if not isinstance(actions, Discrete):
        raise UserError(f"env.tasks: the actions of {name} must be Discrete, got {actions}")
    if not isinstance(space, Box) or not (len(space.shape) == 1 or (len(space.shape) == 3 and space.dtype == np.uint8)):
        raise UserError(f"env.tasks: the observations of {name} must be a 1-D Box or a 3-D uint8 Box, got {space!r}")
    try:
        shape = _converter(space)(space.low).shape
    except ValueError:
        raise UserError(
            f"env.tasks: the images of {name} must be [C, H, W] or [H, W, C] with fewer channels than rows and columns, got {space.shape}"
        ) from None
    num_actions = int(actions.n)
    return Task(name, shape, num_actions, tuple(map(str, range(num_actions))), 1, *scores("gymnasium", name))


def _converter(space: Any) -> Callable[[Any], np.ndarray]:
    """Return the function that converts an observation. Raises ValueError if the channel axis of an image is ambiguous."""
    if len(space.shape) == 1:
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        bounded = (np.abs(low) < UNBOUNDED) & (np.abs(high) < UNBOUNDED) & (high > low)
        low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
        center, half = (low + high) / 2, (high - low) / 2
        return lambda observation: ((observation - center) / half).astype(np.float32)
    first, middle, last = space.shape
    if last < min(first, middle):
        return lambda observation: observation.transpose(2, 0, 1)
    if first < min(middle, last):
        return lambda observation: observation
    raise ValueError(space.shape)
