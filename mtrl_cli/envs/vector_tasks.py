"""The environments of a pack: K tasks with N environments each, stepped together.

Arrays are task-major: observations `[K, N, *padded]`; actions, rewards and flags `[K, N]`.

An environment is seeded at its first episode and again at intervals (`Pack.steps_between_seeds`), with a hash of (stream, run seed, task
name, environment, episode). The episodes in between continue its random state. The number of the last seeded episode and all actions
since then determine the state of an environment. A checkpoint holds both, and `load_state_dict` replays the actions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from mtrl_cli.envs.action_log import ActionLog
from mtrl_cli.envs.pack import UNSEEDED, Pack, VectorTask
from mtrl_cli.errors import RunError, UserError

ArrayT = TypeVar("ArrayT")


@dataclass
class Step(Generic[ArrayT]):
    """Results of one action in each of K x N environments, as numpy arrays or tensors; zeros for tasks that were not stepped.

    Attributes:
        observation: `[K, N, *padded]`, the next observation; after `done`, the first of the next episode. Valid until the next `recv`
            returns.
        reward: float32 `[K, N]`, unclipped.
        terminated, truncated, done: bool `[K, N]`, see `VectorTask.recv`.
    """

    observation: ArrayT
    reward: ArrayT
    terminated: ArrayT
    truncated: ArrayT
    done: ArrayT


@dataclass(eq=False)
class VectorTasks:
    """K tasks with `num_envs` environments each. `send` starts a step; `recv` waits for it and resets environments that are done.

    Args:
        seed: the run's seed. Together with `stream` ("train" or "eval") it determines the seeds of all episodes.
        num_threads: total emulator threads, divided among the tasks, at least one each.
        training: whether to apply the training rules of the protocol, which may differ from those for evaluation.
        first_env: index of the first environment, for its seeds; another instance may own the environments before it.
        buffers: two zeroed arrays `[K, N, *padded]` that hold observations alternately; allocated if omitted.

    Attributes:
        episodes: int64 `[K, N]`, index of the current episode of each environment, from 0.
    """

    pack: Pack
    num_envs: int
    seed: int
    num_threads: int
    training: bool
    stream: str
    first_env: int = 0
    buffers: Sequence[np.ndarray] | None = None

    def __post_init__(self) -> None:
        self.tasks = self.pack.tasks
        shape = (len(self.tasks), self.num_envs)
        self.episodes = np.zeros(shape, np.int64)
        self._seeded_episodes = np.zeros(shape, np.int64)
        self._log = ActionLog(*shape)  # actions since the start of those episodes
        self._num_actions = np.array([[task.num_actions] for task in self.tasks])
        self._in_flight: np.ndarray | None = None
        # Two buffers alternate, so that the caller's observation stays valid while the next one is written.
        self._buffers = list(self.buffers or np.zeros((2, *shape, *self.pack.observation_shape), self.pack.observation_dtype))
        slices = [tuple(slice(size) for size in task.observation_shape) for task in self.tasks]
        self._unpadded = [[buffer[index][:, *part] for index, part in enumerate(slices)] for buffer in self._buffers]
        self._vectors: list[VectorTask] = []  # created by the first `reset` or `load_state_dict`

    def episode_seed(self, task: int, env: int, episode: int) -> int:
        """Return the 31-bit seed of an episode. It depends on the task's name, not its index, and not on the rest of the pack."""
        text = f"{self.stream}/{self.seed}/{self.tasks[task].name}/{self.first_env + env}/{episode}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & 0x7FFFFFFF

    def reset(self) -> np.ndarray:
        """Start every environment at its first episode and return the observations, `[K, N, *padded]`."""
        self.episodes[:] = 0
        self._seeded_episodes[:] = 0
        self._log.lengths[:] = 0
        self._in_flight = None
        all_envs = np.ones(self.num_envs, bool)
        resets: list[Future[np.ndarray]] = []
        # ale-py loads a ROM on each creation, which blocks other threads, and on each reset, which does not. The first tasks are therefore
        # reset while the others are created.
        with ThreadPoolExecutor(self.num_threads) as threads:
            for task in range(len(self.tasks)):
                resets.append(threads.submit(self._vector(task).reset, self._seeds(task, all_envs, all_envs), all_envs))
            return self._fill([reset.result() for reset in resets])

    def _vector(self, task: int) -> VectorTask:
        """Return the environments of a task, created on the first call. Tasks must be requested in order."""
        if task == len(self._vectors):
            threads = max(1, self.num_threads // len(self.tasks))
            self._vectors.append(self.pack.vector(task, self.num_envs, threads, self.training))
        return self._vectors[task]

    def send(self, actions: np.ndarray, active: np.ndarray | None = None) -> None:
        """Start a step.

        Args:
            actions: int64 `[K, N]`.
            active: bool `[K]`, the tasks to step; default all.

        Raises:
            ValueError: an action is out of range. The emulator would wait forever.
        """
        assert self._in_flight is None, "send was called twice without recv"
        active = np.ones(len(self.tasks), bool) if active is None else np.array(active, bool)
        self._check_actions(actions, active)
        self._log.record(actions, active)
        self._in_flight = active
        for task in np.flatnonzero(active):
            self._vectors[task].send(np.ascontiguousarray(actions[task], np.int64))

    def recv(self) -> Step[np.ndarray]:
        """Wait for the step started by `send` and reset the environments that are done."""
        active = self._in_flight
        assert active is not None, "recv was called without send"
        shape = active.size, self.num_envs
        reward = np.zeros(shape, np.float32)
        terminated, truncated, done = np.zeros((3, *shape), bool)
        observations: list[np.ndarray | None] = [None] * len(self.tasks)
        for task in np.flatnonzero(active).tolist():
            observations[task], reward[task], terminated[task], truncated[task], done[task] = self._vectors[task].recv()
            if done[task].any():
                observations[task] = self._begin_next_episodes(task, done[task])
        self._in_flight = None
        return Step(self._fill(observations), reward, terminated, truncated, done)

    def close(self) -> None:
        """Free the environments. No other method may be called afterwards."""
        for vector in self._vectors:
            vector.close()
        self._vectors = []

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the current and the last seeded episode of every environment, and its actions since the latter began.

        Returns:
            episode, seeded_episode, lengths: int64 `[K, N]`.
            actions: uint8, environment by environment in the order of `lengths.ravel()`.
        """
        assert self._in_flight is None, "state_dict was called between send and recv"
        return {
            "episode": self.episodes.copy(),
            "seeded_episode": self._seeded_episodes.copy(),
            "actions": self._log.flat(),
            "lengths": self._log.lengths.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """Restore every environment by replaying its actions from its last seed. All later steps are identical.

        Returns:
            the observations, `[K, N, *padded]`.

        Raises:
            UserError: the state does not fit this pack.
            RunError: another number of episodes ended during the replay, so the emulator differs from the one that saved the state.
        """
        episodes, seeded, lengths = (np.asarray(state[key], np.int64) for key in ("episode", "seeded_episode", "lengths"))
        actions = np.asarray(state["actions"], np.uint8)
        self._check_state(episodes, seeded, lengths, actions)
        self._in_flight = None
        self.episodes[:] = episodes
        self._seeded_episodes[:] = seeded
        self._log.load(actions, lengths)
        return self._fill(self._replay())

    def _replay(self) -> list[np.ndarray]:
        """Replay the logs so that all end at the same tick: environments with shorter logs start later.

        An environment that has not started takes arbitrary actions, because the environments of a task are stepped together. Only the
        episode at the start of a log is seeded.
        """
        vectors = [self._vector(task) for task in range(len(self.tasks))]
        longest = int(self._log.lengths.max())
        starts = longest - self._log.lengths
        observations: dict[int, np.ndarray] = {}
        finished = np.zeros_like(starts, bool)
        ended = np.zeros_like(starts)
        for tick in range(longest + 1):
            running = [task for task in range(len(self.tasks)) if starts[task].min() <= tick]
            for task in running:
                is_first = task not in observations
                mask = np.ones(self.num_envs, bool) if is_first else (starts[task] == tick) | finished[task]
                if mask.any():
                    observations[task] = vectors[task].reset(self._seeds(task, mask, starts[task] == tick), mask)
            if tick == longest:
                break
            for task in running:
                index = tick - starts[task]
                vectors[task].send(np.where(index >= 0, self._log.at(task, np.maximum(index, 0)), 0))
            for task in running:
                observations[task], _, _, _, finished[task] = vectors[task].recv()
                ended[task] += finished[task] & (starts[task] <= tick)
        self._check_repeated(ended)
        return [observations[task] for task in range(len(self.tasks))]

    def _begin_next_episodes(self, task: int, done: np.ndarray) -> np.ndarray:
        self.episodes[task, done] += 1
        is_seeded = done & (self._log.lengths[task] >= self.pack.steps_between_seeds)
        self._seeded_episodes[task, is_seeded] = self.episodes[task, is_seeded]
        self._log.lengths[task, is_seeded] = 0
        return self._vectors[task].reset(self._seeds(task, done, is_seeded), done)

    def _seeds(self, task: int, mask: np.ndarray, is_seeded: np.ndarray) -> np.ndarray:
        """Return, for each environment in `mask`, its seed, or `UNSEEDED` where not `is_seeded`."""
        envs = np.flatnonzero(mask).tolist()
        return np.array(
            [self.episode_seed(task, env, self._seeded_episodes[task, env]) if is_seeded[env] else UNSEEDED for env in envs], np.int64
        )

    def _fill(self, observations: Sequence[np.ndarray | None]) -> np.ndarray:
        """Copy the observations of each task into the next buffer; zeros for a task without any."""
        self._buffers.reverse()
        self._unpadded.reverse()
        for part, observation in zip(self._unpadded[0], observations, strict=True):
            part[...] = 0 if observation is None else observation
        return self._buffers[0]

    def _check_actions(self, actions: np.ndarray, active: np.ndarray) -> None:
        if actions.shape != self.episodes.shape:
            raise ValueError(f"actions must have shape {self.episodes.shape}, got {actions.shape}")
        wrong = ((actions < 0) | (actions >= self._num_actions)) & active[:, None]
        if wrong.any():
            task, env = np.argwhere(wrong)[0]
            described = self.tasks[task]
            raise ValueError(
                f"{described.name}: action must be from 0 to {described.num_actions - 1}, got {actions[task, env]} in environment {env}"
            )

    def _check_state(self, episodes: np.ndarray, seeded: np.ndarray, lengths: np.ndarray, actions: np.ndarray) -> None:
        shapes_fit = episodes.shape == seeded.shape == lengths.shape == self.episodes.shape
        if not shapes_fit or lengths.min() < 0 or lengths.max() > actions.size or lengths.sum() != actions.size:
            raise UserError(
                f"the saved environments do not fit: expected {self.episodes.shape[0]} tasks with {self.num_envs} environments each, got"
                f" arrays of shape {episodes.shape} and {actions.size} of {int(lengths.sum())} actions"
            )
        if ((seeded < 0) | (seeded > episodes) | (episodes - seeded > lengths)).any():  # an episode has at least one step
            raise UserError("the saved environments do not fit: the seeded episodes, episodes and action counts are inconsistent")
        task_of = np.repeat(np.arange(len(self.tasks), dtype=np.int32), lengths.sum(axis=1))
        wrong = np.flatnonzero(actions >= self._num_actions.ravel()[task_of])
        if wrong.size:
            name, action = self.tasks[task_of[wrong[0]]].name, actions[wrong[0]]
            raise UserError(f"the saved environments do not fit: {name} has no action {action}")

    def _check_repeated(self, ended: np.ndarray) -> None:
        expected = self.episodes - self._seeded_episodes
        if (ended != expected).any():
            task, env = np.argwhere(ended != expected)[0]
            raise RunError(
                f"environment {env} of {self.tasks[task].name} is not reproducible: its {self._log.lengths[task, env]} saved actions"
                f" ended {expected[task, env]} episodes before, {ended[task, env]} now: "
                "resume with the package versions in run.json"
            )
