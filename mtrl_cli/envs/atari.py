"""Atari 2600 games through ale-py's C++ vector environment, one for each game.

Frames are 84x84, grey, the maximum of the last two of four emulator frames, one frame a step: stacking is the learner's. Rewards are the
game's own. A game is cut off (truncated) after 108,000 frames, half an hour.

Protocols:
- machado (Machado et al. 2018, section 5): with probability 0.25 the emulator repeats the last action, in each frame; no no-op starts,
  and losing a life means nothing. Training and evaluation are the same.
- nature (Mnih et al. 2015): actions are always taken; a game starts with up to 30 no-ops (ale-py draws 0 to 29); in training, a lost life
  is `terminated`, and the game goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv

from mtrl_cli.envs.names import check_names
from mtrl_cli.envs.pack import Pack, Received, Task
from mtrl_cli.envs.scores import scores
from mtrl_cli.types import Names, PositiveInt

SIZE = 84
FRAMES_PER_STEP = 4
FRAMES_PER_SECOND = 60
MOST_FRAMES = 108_000

# ROMs that only two can play: ale-py ends the process when asked for one of them.
WITHOUT_SINGLE_PLAYER = {"combat", "joust", "maze_craze", "warlords"}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "machado": {"repeat_action_probability": 0.25, "noop_max": 0},
    "nature": {"repeat_action_probability": 0.0, "noop_max": 30},
}


class AtariPack(Pack):
    """Atari games by their ROM names (pong, space_invaders), each with its minimal set of actions unless `full_action_space`."""

    observation_kind = "image"
    steps_between_seeds = 4_000  # a seed costs as much as some 200 steps

    def __init__(
        self,
        *,
        name: str,
        tasks: Names,
        num_envs: PositiveInt = 8,
        protocol: Literal["machado", "nature"] = "machado",
        full_action_space: bool = False,
        stack: PositiveInt = 4,
        symmetric: list[str] = [],  # noqa: B006 (a literal, so that the schema can read it)
    ) -> None:
        known = set(roms.get_all_rom_ids()) - WITHOUT_SINGLE_PLAYER
        check_names(tasks, known, "an Atari game")
        if symmetric:
            check_names(symmetric, known, "an Atari game", "env.symmetric")
        self.protocol = protocol
        self.full_action_space = full_action_space
        described = [_task(game, full_action_space, game in symmetric) for game in tasks]
        super().__init__(name=name, tasks=described, num_envs=num_envs, observation_dtype=np.uint8, observation_scale=255.0, stack=stack)

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> AtariVectorTask:
        """See `Pack.vector`."""
        env = self._emulators(task_index, num_envs, num_threads, img_height=SIZE, img_width=SIZE, grayscale=True)
        return AtariVectorTask(env, lost_life_terminates=training and self.protocol == "nature")

    def render(self, task_index: int, seed: int, actions: Sequence[int], training: bool = False) -> Iterator[np.ndarray]:
        """See `Pack.render`. Frames have the console's own size and colours; size and colour do not change the game."""
        _, (height, width), _ = _rom(self.tasks[task_index].name)
        env = self._emulators(task_index, 1, 1, img_height=height, img_width=width, grayscale=False)
        observation, _ = env.reset(seed=np.array([seed], np.int64))
        yield observation[0, 0]
        for action in actions:
            observation, *_ = env.step(np.array([action], np.int64))
            yield observation[0, 0]

    def render_fps(self, task_index: int) -> int:
        """See `Pack.render_fps`."""
        return FRAMES_PER_SECOND // FRAMES_PER_STEP

    def _emulators(self, task_index: int, num_envs: int, num_threads: int, **picture: Any) -> AtariVectorEnv:
        return AtariVectorEnv(
            self.tasks[task_index].name,
            num_envs,
            num_threads=num_threads,
            max_num_frames_per_episode=MOST_FRAMES,  # counted in frames since the start, no-ops left out
            full_action_space=self.full_action_space,
            stack_num=1,
            frameskip=FRAMES_PER_STEP,
            maxpool=True,
            reward_clipping=False,
            use_fire_reset=False,  # in neither protocol
            **PROTOCOLS[self.protocol],
            **picture,
        )


class AtariVectorTask:
    """A `VectorTask` of one game; see `mtrl_cli.envs.pack`.

    A seeded reset loads the ROM anew, which makes all that follows depend on nothing but the seed and the actions, and takes 0.12 s of a
    core. Without a seed the game restarts within 0.01 s, and sticky actions and no-op starts go on with the random numbers as they are.
    Both must come right after `done`: in the next step ale-py would restart the game by itself.
    """

    def __init__(self, env: AtariVectorEnv, lost_life_terminates: bool) -> None:
        self._env = env
        self._lost_life_terminates = lost_life_terminates
        self._lives = np.zeros(env.num_envs, np.int32)

    def reset(self, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See `VectorTask.reset`. To ale-py, too, -1 means without a seed."""
        observation, info = self._env.reset(seed=seeds, options={"reset_mask": mask})
        self._lives = info["lives"]
        return observation

    def send(self, actions: np.ndarray) -> None:
        """See `VectorTask.send`."""
        self._env.send(actions)

    def recv(self) -> Received:
        """See `VectorTask.recv`.

        Lives are compared here rather than by ale-py's `life_loss_info`, which says `terminated` for a lost life and for the end alike.
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
        del self._env  # the C++ object joins its threads as it goes


@cache
def _rom(game: str) -> tuple[tuple[str, ...], tuple[int, int], tuple[str, ...]]:
    """A game's minimal set of actions, its screen's height and width, and all actions, by asking an emulator."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator = ALEInterface()
    path = roms.get_rom_path(game)
    assert path is not None, game
    emulator.loadROM(path)
    minimal, full = (tuple(action.name for action in actions) for actions in (emulator.getMinimalActionSet(), emulator.getLegalActionSet()))
    return minimal, emulator.getScreenDims(), full


def _task(game: str, full_action_space: bool, symmetric: bool = False) -> Task:
    minimal, _, full = _rom(game)
    meanings = full if full_action_space else minimal
    random_score, human_score = scores("atari", game)
    return Task(game, (1, SIZE, SIZE), len(meanings), meanings, FRAMES_PER_STEP, random_score, human_score, symmetric)
