"""Any environments that gymnasium has registered, with Box observations and Discrete actions.

Vectors (1-D Box) become float32, each component that has finite bounds scaled from them to [-1, 1], the others left as they are.
Images (3-D uint8 Box) become `[C, H, W]`. Episodes may be as long as the id was registered with, or `max_episode_steps` if that is given.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from mtrl_cli.envs.names import check_names
from mtrl_cli.envs.pack import Pack, Task, VectorTask
from mtrl_cli.envs.scores import scores
from mtrl_cli.envs.serial import SerialVectorTask
from mtrl_cli.errors import UserError
from mtrl_cli.types import Names, NonNegativeInt, PositiveInt

UNBOUNDED = 1e30  # some environments write the largest float32 for "no bound"
USUAL_FRAMES_PER_SECOND = 30

Convert = Callable[[Any], np.ndarray]


class GymnasiumPack(Pack):
    """Registered environments by id (CartPole-v1), all with vectors or all with images: `observation_kind` is decided from their spaces.

    Args:
        tasks: their ids. Gymnasium would import the package of an id like `package:Env-v0`; such ids are refused.
        max_episode_steps: steps after which an episode is truncated; 0: what each id was registered with.
    """

    def __init__(
        self,
        *,
        name: str,
        tasks: Names,
        num_envs: PositiveInt = 8,
        max_episode_steps: NonNegativeInt = 0,
    ) -> None:
        for each in tasks:
            _refuse_prefix(each)
        check_names(tasks, set(gymnasium.registry), "an id that gymnasium has registered")
        self.max_episode_steps = max_episode_steps
        described, kinds, highest = [], [], []
        for each in tasks:
            env = self._make(each)
            described.append(_task(each, env))
            kinds.append("vector" if len(env.observation_space.shape or ()) == 1 else "image")
            highest.append(float(env.observation_space.high.max()))  # type: ignore[attr-defined]
            env.close()
        images = kinds[0] == "image"
        super().__init__(
            name=name,
            tasks=described,
            num_envs=num_envs,
            observation_dtype=np.uint8 if images else np.float32,
            observation_scale=max(highest) if images else 1.0,
        )
        self.observation_kind = kinds[0]

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> VectorTask:
        """See `Pack.vector`. The environments are played one after the other; `num_threads` has no use here."""
        task = self.tasks[task_index]
        games = [GymnasiumGame(self._make(task.name)) for _ in range(num_envs)]
        return SerialVectorTask(games, task.observation_shape, self.observation_dtype)

    def render(self, task_index: int, seed: int, actions: Sequence[int], training: bool = False) -> Iterator[np.ndarray]:
        """See `Pack.render`."""
        name = self.tasks[task_index].name
        if "rgb_array" not in self._metadata(name).get("render_modes", []):
            raise UserError(f"{name} cannot be drawn: it has no render mode rgb_array")
        game = GymnasiumGame(self._make(name, render_mode="rgb_array"))
        try:
            game.reset(seed)
            yield game.picture()
            for action in actions:
                game.step(action)
                yield game.picture()
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(
                f"{name} cannot be drawn: {' '.join(str(error).split())}\nFor classic control: pip install 'mtrl_cli[video]'"
            ) from None
        finally:
            game.close()

    def render_fps(self, task_index: int) -> int:
        """See `Pack.render_fps`."""
        return int(self._metadata(self.tasks[task_index].name).get("render_fps", USUAL_FRAMES_PER_SECOND))

    def _metadata(self, name: str) -> dict[str, Any]:
        env = self._make(name)
        env.close()
        return env.metadata

    def _make(self, name: str, **options: Any) -> gymnasium.Env:
        # Pictures are drawn into arrays: no window, no sound, and no complaint where there is no screen.
        for variable, value in (
            ("PYGAME_HIDE_SUPPORT_PROMPT", "1"),
            ("SDL_VIDEODRIVER", "dummy"),
            ("XDG_RUNTIME_DIR", tempfile.gettempdir()),
        ):
            os.environ.setdefault(variable, value)
        limit = self.max_episode_steps or None
        try:
            # The checker warns about spaces that we refuse with a plain line, and slows every step.
            return gymnasium.make(name, max_episode_steps=limit, disable_env_checker=True, **options)
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            raise UserError(f"env.tasks: {name} needs a package that is not installed\n{' '.join(str(error).split())}") from None


class GymnasiumGame:
    """One environment, a `mtrl_cli.envs.serial.Game`."""

    def __init__(self, env: gymnasium.Env) -> None:
        self._env = env
        self._start = int(env.action_space.start)  # type: ignore[attr-defined]
        self._convert = _converter(env.observation_space)

    def reset(self, seed: int | None) -> np.ndarray:
        """Start an episode; without a seed, with the random numbers that the last one left."""
        return self._convert(self._env.reset(seed=seed)[0])

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Returns observation, reward, terminated, truncated."""
        observation, reward, terminated, truncated, _ = self._env.step(action + self._start)
        return self._convert(observation), float(reward), bool(terminated), bool(truncated)

    def picture(self) -> np.ndarray:
        """RGB uint8 `[H, W, 3]` of the moment."""
        return np.asarray(self._env.render(), np.uint8)

    def close(self) -> None:
        """Free the environment."""
        self._env.close()


def _refuse_prefix(name: str) -> None:
    package, colon, rest = name.partition(":")
    if colon:
        raise UserError(
            f"env.tasks: {name}: an id with a package in front is not taken; give the id alone, {rest}\n"
            f"If you trust the package {package} with running code, name it on the command line: trusted_packages=[{package}]"
        )


def _task(name: str, env: gymnasium.Env) -> Task:
    """Raises UserError for spaces other than ours."""
    space, actions = env.observation_space, env.action_space
    if not isinstance(actions, Discrete):
        raise UserError(f"env.tasks: {name} has actions {actions}; expected Discrete")
    if not isinstance(space, Box) or not (len(space.shape) == 1 or (len(space.shape) == 3 and space.dtype == np.uint8)):
        raise UserError(f"env.tasks: {name} has observations {space!r}; expected a Box of one dimension, or of three in uint8")
    try:
        shape = _converter(space)(space.low).shape
    except ValueError:
        raise UserError(f"env.tasks: {name} has images of shape {space.shape}; expected [C, H, W] or [H, W, C] with few channels") from None
    random_score, reference_score = scores("gymnasium", name)
    return Task(name, shape, int(actions.n), tuple(map(str, range(int(actions.n)))), 1, random_score, reference_score)


def _converter(space: Any) -> Convert:
    """What turns an observation of a Box into ours. Raises ValueError for an image whose channels cannot be told from its sides."""
    if len(space.shape) == 1:
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        bounded = (np.abs(low) < UNBOUNDED) & (np.abs(high) < UNBOUNDED) & (high > low)
        low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
        centre, half = (low + high) / 2, (high - low) / 2
        return lambda observation: ((observation - centre) / half).astype(np.float32)
    first, middle, last = space.shape
    if last < min(first, middle):
        return lambda observation: observation.transpose(2, 0, 1)
    if first < min(middle, last):
        return lambda observation: observation
    raise ValueError(space.shape)
