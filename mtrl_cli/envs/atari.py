"""Atari 2600 games through ale-py's C++ vector environment, one vector environment per game.

Observations are 84x84 grayscale, the maximum of the last two of four emulator frames. The learner stacks frames. Rewards are unclipped.
An episode is truncated after 108,000 frames (30 minutes).

Protocols:
- machado (Machado et al. 2018, section 5): sticky actions with probability 0.25 per emulator frame, no no-op starts, and no special
  handling of lost lives. Training and evaluation are the same.
- nature (Mnih et al. 2015): no sticky actions; an episode starts with up to 30 no-ops (ale-py draws 0 to 29); in training, a lost life
  sets `terminated` while the episode continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv

from mtrl_cli.envs.pack import Pack, Received, Task, check_names
from mtrl_cli.envs.scores import scores
from mtrl_cli.types import Names, PositiveInt

SIZE = 84
FRAMES_PER_STEP = 4
FRAMES_PER_SECOND = 60
MAX_FRAMES = 108_000

# Two-player ROMs: ale-py ends the process when one of them is loaded.
TWO_PLAYER_GAMES = {"combat", "joust", "maze_craze", "warlords"}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "machado": {"repeat_action_probability": 0.25, "noop_max": 0},
    "nature": {"repeat_action_probability": 0.0, "noop_max": 30},
}


class AtariPack(Pack):
    """Atari games by ROM name (pong, space_invaders), each with its minimal action set unless `full_action_space`.

    Args:
        symmetric: the games that augmentation=flip may mirror.
    """

    observation_kind = "image"
    steps_between_seeds = 4_000  # a seeded reset takes as long as about 200 steps

    def __init__(
        self,
        *,
        name: str,
        tasks: Names,
        num_envs: PositiveInt = 8,
        protocol: Literal["machado", "nature"] = "machado",
        full_action_space: bool = False,
        stack: PositiveInt = 4,
        symmetric: list[str] = [],  # noqa: B006 (a literal, because the schema reads the source)
    ) -> None:
        known = set(roms.get_all_rom_ids()) - TWO_PLAYER_GAMES
        check_names(tasks, known, "an Atari game")
        check_names(symmetric, known, "an Atari game", "env.symmetric")
        self.protocol = protocol
        self.full_action_space = full_action_space
        described = [_task(game, full_action_space, game in symmetric) for game in tasks]
        super().__init__(name=name, tasks=described, num_envs=num_envs, observation_dtype=np.uint8, observation_scale=255.0, stack=stack)

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> AtariVectorTask:
        """See `Pack.vector`."""
        env = self._make(task_index, num_envs, num_threads, img_height=SIZE, img_width=SIZE, grayscale=True)
        return AtariVectorTask(env, lost_life_terminates=training and self.protocol == "nature")

    def render(self, task_index: int, seed: int, actions: Sequence[int], training: bool = False) -> Iterator[np.ndarray]:
        """See `Pack.render`. Frames have the console's resolution and colors, which do not affect the game."""
        _, (height, width), _ = _rom(self.tasks[task_index].name)
        env = self._make(task_index, 1, 1, img_height=height, img_width=width, grayscale=False)
        observation, _ = env.reset(seed=np.array([seed], np.int64))
        yield observation[0, 0]
        for action in actions:
            observation, *_ = env.step(np.array([action], np.int64))
            yield observation[0, 0]

    def render_fps(self, task_index: int) -> int:
        """See `Pack.render_fps`."""
        return FRAMES_PER_SECOND // FRAMES_PER_STEP

    def _make(self, task_index: int, num_envs: int, num_threads: int, **image: Any) -> AtariVectorEnv:
        return AtariVectorEnv(
            self.tasks[task_index].name,
            num_envs,
            num_threads=num_threads,
            max_num_frames_per_episode=MAX_FRAMES,  # excludes the no-ops at the start
            full_action_space=self.full_action_space,
            stack_num=1,
            frameskip=FRAMES_PER_STEP,
            maxpool=True,
            reward_clipping=False,
            use_fire_reset=False,  # in neither protocol
            **PROTOCOLS[self.protocol],
            **image,
        )


class AtariVectorTask:
    """A `VectorTask` of one game.

    A seeded reset reloads the ROM, so that everything after it depends only on the seed and the actions. It takes 0.12 s of one core.
    A reset without a seed takes less than 0.01 s and continues the random state of sticky actions and no-op starts. Both must directly
    follow `done`: in the next step ale-py would restart the game itself.
    """

    def __init__(self, env: AtariVectorEnv, lost_life_terminates: bool) -> None:
        self._env = env
        self._lost_life_terminates = lost_life_terminates
        self._lives = np.zeros(env.num_envs, np.int32)

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See `VectorTask.reset`. `UNSEEDED` (-1) has the same meaning in ale-py."""
        observation, info = self._env.reset(seed=seeds, options={"reset_mask": mask})
        self._lives = info["lives"]
        return observation

    def send(self, actions: np.ndarray) -> None:
        """See `VectorTask.send`."""
        self._env.send(actions)

    def recv(self) -> Received:
        """See `VectorTask.recv`.

        Lives are compared here because ale-py's `life_loss_info` does not distinguish a lost life from the end of the game.
        """
        observation, reward, terminated, truncated, info = self._env.recv()
        done = terminated | truncated
        if self._lost_life_terminates:
            terminated = terminated | (info["lives"] < self._lives)
        self._lives = info["lives"]
        return observation, reward.astype(np.float32), terminated, truncated, done

    def close(self) -> None:
        """See `VectorTask.close`."""
        self._env.close()
        del self._env  # the destructor of the C++ object joins its threads


@cache
def _rom(game: str) -> tuple[tuple[str, ...], tuple[int, int], tuple[str, ...]]:
    """Return a game's minimal action set, its screen (height, width), and its full action set."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator = ALEInterface()
    path = roms.get_rom_path(game)
    assert path is not None, game
    emulator.loadROM(path)
    minimal, full = (tuple(action.name for action in actions) for actions in (emulator.getMinimalActionSet(), emulator.getLegalActionSet()))
    return minimal, emulator.getScreenDims(), full


def _task(game: str, full_action_space: bool, symmetric: bool) -> Task:
    minimal, _, full = _rom(game)
    meanings = full if full_action_space else minimal
    return Task(game, (1, SIZE, SIZE), len(meanings), meanings, FRAMES_PER_STEP, *scores("atari", game), symmetric)
