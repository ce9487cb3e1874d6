"""A pack being played: K tasks, each with N environments, stepped together as one.

Arrays are task-major: observations `[K, N, *padded]`, actions, rewards and flags `[K, N]`. K tasks, N environments per task.

An environment is seeded at its first episode and again every so often (`Pack.steps_between_seeds`), from what depends only on (stream, run
seed, task name, environment, episode); the episodes between go on with the random numbers that the one before left. So it is described in
full by the number of the episode that was seeded and all actions since: that is what a checkpoint holds, and `load_state_dict` plays again.
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
        observation: `[K, N, *padded]`, the next observation; the first of the next episode where an episode ended. It is not overwritten
            before the next `recv` returns.
        reward: float32 `[K, N]`, unclipped.
        terminated, truncated, done: bool `[K, N]`, see `VectorTask.recv`.
    """

    observation: ArrayT
    reward: ArrayT
    terminated: ArrayT
    truncated: ArrayT
    done: ArrayT


class VectorTasks:
    """K tasks with `num_envs` environments each, as one: `send` sets them going, `recv` waits for them and restarts what is done.

    Args:
        seed: the run's; with `stream` (such as "train" or "eval") it decides all seeds of episodes.
        num_threads: emulator threads in all, divided between the tasks, at least one each.
        training: whether a protocol that treats training and evaluation differently is in training.
        first_env: the number of the first environment, which decides on seeds: others may play those before.
        buffers: two arrays `[K, N, *padded]`, zeros, that take turns in holding observations, where the caller has some.

    Attributes:
        episodes: int64 `[K, N]`, the number of each environment's episode, from 0.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        num_envs: int,
        seed: int,
        num_threads: int,
        training: bool,
        stream: str,
        first_env: int = 0,
        buffers: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.pack, self.tasks = pack, pack.tasks
        self.num_envs, self.first_env = num_envs, first_env
        self.seed, self.stream = seed, stream
        shape = (len(self.tasks), num_envs)
        self.episodes = np.zeros(shape, np.int64)
        self._seeded_episodes = np.zeros(shape, np.int64)
        self._journals = ActionLog(*shape)  # since those episodes began
        self._num_actions = np.array([[task.num_actions] for task in self.tasks])
        self._in_flight: np.ndarray | None = None
        # Two buffers take turns: what the caller holds stays whole while the next observation is written.
        self._buffers = list(buffers or [np.zeros((*shape, *pack.observation_shape), pack.observation_dtype) for _ in range(2)])
        parts = [tuple(slice(size) for size in task.observation_shape) for task in self.tasks]
        self._own_parts = [[buffer[index][:, *part] for index, part in enumerate(parts)] for buffer in self._buffers]
        self._num_threads = num_threads
        self._training = training
        self._vectors: list[VectorTask] = []  # made by the first `reset` or `load_state_dict`

    def episode_seed(self, task: int, env: int, episode: int) -> int:
        """The 31-bit seed of an episode, if that is one which is seeded, as number 0 is.

        It hangs on the task's name, not its place, so that the rest of the pack does not matter.
        """
        words = f"{self.stream}/{self.seed}/{self.tasks[task].name}/{self.first_env + env}/{episode}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") & 0x7FFFFFFF

    def reset(self) -> np.ndarray:
        """Start every environment at its first episode. Returns the observations, `[K, N, *padded]`."""
        self.episodes[:] = 0
        self._seeded_episodes[:] = 0
        self._journals.lengths[:] = 0
        self._in_flight = None
        everything = np.ones(self.num_envs, bool)
        resets: list[Future[np.ndarray]] = []
        # ale-py loads a ROM for every environment that is made, alone, and one for every reset, while other threads may work: so the
        # first tasks are reset while the others are made.
        with ThreadPoolExecutor(self._num_threads) as threads:
            for task in range(len(self.tasks)):
                resets.append(threads.submit(self._vector(task).reset, self._seeds(task, everything, everything), everything))
            return self._fill([reset.result() for reset in resets])

    def _vector(self, task: int) -> VectorTask:
        """The environments of a task, made where they are not there yet (tasks in order)."""
        if task == len(self._vectors):
            threads = max(1, self._num_threads // len(self.tasks))
            self._vectors.append(self.pack.vector(task, self.num_envs, threads, self._training))
        return self._vectors[task]

    def send(self, actions: np.ndarray, active: np.ndarray | None = None) -> None:
        """Set the environments going; `recv` takes what came of it.

        Args:
            actions: int64 `[K, N]`.
            active: bool `[K]`, the tasks to step; all where it is left out.

        Raises:
            ValueError: an action that its task does not have (the emulator would wait for ever).
        """
        assert self._in_flight is None, "send was called twice without recv"
        active = np.ones(len(self.tasks), bool) if active is None else np.array(active, bool)
        self._check_actions(actions, active)
        self._journals.record(actions, active)
        self._in_flight = active
        for task in np.flatnonzero(active):
            self._vectors[task].send(np.ascontiguousarray(actions[task], np.int64))

    def recv(self) -> Step[np.ndarray]:
        """Wait for the step that `send` began; restart the environments that are done."""
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
        """Free the environments. The pack cannot be used after."""
        for vector in self._vectors:
            vector.close()
        self._vectors = []

    def state_dict(self) -> dict[str, np.ndarray]:
        """Where every environment is: the numbers of its episode and of the last one that was seeded, and its actions since that began.

        Returns:
            episode, seeded_episode and lengths, int64 `[K, N]`; actions, uint8, all journals one after the other, in the order of
            `lengths.ravel()`.
        """
        assert self._in_flight is None, "state_dict was called between send and recv"
        return {
            "episode": self.episodes.copy(),
            "seeded_episode": self._seeded_episodes.copy(),
            "actions": self._journals.flat(),
            "lengths": self._journals.lengths.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """Bring every environment to where it was, by playing its actions again from its last seed. All that follows is identical.

        Returns:
            the observations, `[K, N, *padded]`.

        Raises:
            UserError: the state is not of a pack like this one.
            RunError: more or fewer episodes ended on the way than then: this is not the emulator that wrote them.
        """
        episodes, seeded, lengths = (np.asarray(state[key], np.int64) for key in ("episode", "seeded_episode", "lengths"))
        actions = np.asarray(state["actions"], np.uint8)
        self._check_state(episodes, seeded, lengths, actions)
        self._in_flight = None
        self.episodes[:] = episodes
        self._seeded_episodes[:] = seeded
        self._journals.load(actions, lengths)
        return self._fill(self._replay())

    def _replay(self) -> list[np.ndarray]:
        """Play the journals again so that all end together: an environment with a short one starts late, and none is stepped past its end.

        An environment that waits for its start plays anything meanwhile, as its neighbours cannot be stepped alone. Where an episode ends
        within a journal, the next one was not seeded: an environment is seeded only where its journal begins.
        """
        vectors = [self._vector(task) for task in range(len(self.tasks))]
        longest = int(self._journals.lengths.max())
        starts = longest - self._journals.lengths
        observations: dict[int, np.ndarray] = {}
        finished = np.zeros_like(starts, bool)
        ended = np.zeros_like(starts)
        for tick in range(longest + 1):
            running = [task for task in range(len(self.tasks)) if starts[task].min() <= tick]
            for task in running:
                first = task not in observations
                mask = np.ones(self.num_envs, bool) if first else (starts[task] == tick) | finished[task]
                if mask.any():
                    observations[task] = vectors[task].reset(self._seeds(task, mask, starts[task] == tick), mask)
            if tick == longest:
                break
            for task in running:
                place = tick - starts[task]
                vectors[task].send(np.where(place >= 0, self._journals.at(task, np.maximum(place, 0)), 0))
            for task in running:
                observations[task], _, _, _, finished[task] = vectors[task].recv()
                ended[task] += finished[task] & (starts[task] <= tick)
        self._check_repeated(ended)
        return [observations[task] for task in range(len(self.tasks))]

    def _begin_next_episodes(self, task: int, done: np.ndarray) -> np.ndarray:
        self.episodes[task, done] += 1
        due = done & (self._journals.lengths[task] >= self.pack.steps_between_seeds)
        self._seeded_episodes[task, due] = self.episodes[task, due]
        self._journals.lengths[task, due] = 0
        return self._vectors[task].reset(self._seeds(task, done, due), done)

    def _seeds(self, task: int, mask: np.ndarray, due: np.ndarray) -> np.ndarray:
        """For the environments in `mask`: the seeds of those that are due for one, `UNSEEDED` for the others."""
        envs = np.flatnonzero(mask).tolist()
        return np.array(
            [self.episode_seed(task, env, self._seeded_episodes[task, env]) if due[env] else UNSEEDED for env in envs], np.int64
        )

    def _fill(self, observations: Sequence[np.ndarray | None]) -> np.ndarray:
        """Copy the tasks' own observations into the buffer whose turn it is; zeros for a task that has none."""
        self._buffers.reverse()
        self._own_parts.reverse()
        for part, observation in zip(self._own_parts[0], observations, strict=True):
            part[...] = 0 if observation is None else observation
        return self._buffers[0]

    def _check_actions(self, actions: np.ndarray, active: np.ndarray) -> None:
        if actions.shape != self.episodes.shape:
            raise ValueError(f"actions have shape {actions.shape}; expected {self.episodes.shape}")
        wrong = ((actions < 0) | (actions >= self._num_actions)) & active[:, None]
        if wrong.any():
            task, env = np.argwhere(wrong)[0]
            name, most = self.tasks[task].name, self.tasks[task].num_actions - 1
            raise ValueError(f"{name} has no action {actions[task, env]} (environment {env}); expected 0 to {most}")

    def _check_state(self, episodes: np.ndarray, seeded: np.ndarray, lengths: np.ndarray, actions: np.ndarray) -> None:
        shapes_fit = episodes.shape == seeded.shape == lengths.shape == self.episodes.shape
        if not shapes_fit or lengths.min() < 0 or lengths.max() > actions.size or lengths.sum() != actions.size:
            raise UserError(
                f"The saved environments do not fit: expected {self.episodes.shape[0]} tasks with {self.num_envs} environments each,"
                f" found {episodes.shape} with {int(lengths.sum())} actions of which {actions.size} are there"
            )
        if ((seeded < 0) | (seeded > episodes) | (episodes - seeded > lengths)).any():  # an episode takes a step at least
            raise UserError("The saved environments do not fit: their episodes are not numbered from the last one that was seeded")
        task_of = np.repeat(np.arange(len(self.tasks), dtype=np.int32), lengths.sum(axis=1))
        wrong = np.flatnonzero(actions >= self._num_actions.ravel()[task_of])
        if wrong.size:
            name, action = self.tasks[task_of[wrong[0]]].name, actions[wrong[0]]
            raise UserError(f"The saved environments do not fit: {name} has no action {action}, which was saved for it")

    def _check_repeated(self, ended: np.ndarray) -> None:
        expected = self.episodes - self._seeded_episodes
        if (ended != expected).any():
            task, env = np.argwhere(ended != expected)[0]
            raise RunError(
                f"Environment {env} of {self.tasks[task].name} did not repeat itself: its {self._journals.lengths[task, env]} saved actions"
                f" ended {expected[task, env]} episodes then, and {ended[task, env]} now"
                f"\nResume with the versions of the packages that run.json names"
            )
