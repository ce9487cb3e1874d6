"""The training loop: a generator of environment steps and updates. The caller decides when to log, save, evaluate and stop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.envs.vector_tasks import Step
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.replay.buffers import Replay, Transition
from mtrl_cli.training.env_group import EnvGroup, concatenated
from mtrl_cli.training.episode_statistics import EpisodeStatistics
from mtrl_cli.training.learner import Learner


class Clock:
    """Seconds spent in each part of the loop."""

    def __init__(self, parts: tuple[str, ...] = ("act", "env", "learn", "log")):
        self._seconds = dict.fromkeys(parts, 0.0)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return seconds


@dataclass(eq=False)
class Loop:
    """Steps K x N environments and trains on their transitions.

    Each of several ranks has N environments, and all ranks run the same number of steps. With several groups of environments, actions of
    one group are chosen while the emulators of the others run.

    Args:
        groups: groups of environments, of equal size.
        actor: policy that chooses actions for all groups.
        replay, learner, statistics: parts of the run.
        overlapped: whether updates run while the emulators run (on a GPU) instead of afterwards (on a CPU, whose cores both would use).
        ranks: processes that train together.

    Attributes:
        step: steps per task so far, of all ranks.
        num_envs: environments of each task on this rank.
        clock: seconds by part.
    """

    groups: Sequence[EnvGroup]
    actor: EpsilonGreedy
    replay: Replay
    learner: Learner
    statistics: EpisodeStatistics
    overlapped: bool = False
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.num_envs = sum(group.envs.num_envs for group in self.groups)
        self.step = 0
        self.clock = Clock()

    def reset(self) -> None:
        """Start the first episode of every environment."""
        for group in self.groups:
            group.reset(self.learner.agent.epsilon(self.step))
        self.groups[0].choose()

    def ticks(self) -> Iterator[int]:
        """Step every environment once per iteration, forever. Yields the steps per task so far."""
        while True:
            self._send()
            if self.overlapped:
                self._learn()
            steps, transitions = self._receive()
            if not self.overlapped:
                self._learn()
            self._update_statistics(steps)
            with self.clock.time("act"):
                self.store(transitions)
                if len(self.groups) == 1:
                    self.groups[0].choose()
            self.step += self.num_envs * self.ranks.size
            yield self.step

    def _send(self) -> None:
        """Send actions to all groups. Actions of the first group were chosen at the end of the previous tick."""
        for group in self.groups:
            if group is not self.groups[0]:
                with self.clock.time("act"):
                    group.choose()
            with self.clock.time("env"):
                group.send()

    def _learn(self) -> None:
        with self.clock.time("learn"):
            self.learner.run_due_updates(self.step)

    def _receive(self) -> tuple[list[Step[np.ndarray]], list[Transition]]:
        """Wait for each group; choose actions for the first group while the other groups run."""
        steps, transitions = [], []
        epsilon_K = self.learner.agent.epsilon(self.step + self.num_envs * self.ranks.size)
        for group in self.groups:
            with self.clock.time("env"):
                steps.append(group.envs.recv())
            with self.clock.time("act"):
                transitions.append(group.transition(steps[-1], epsilon_K))
                if group is self.groups[0] and len(self.groups) > 1:
                    group.choose()
        return steps, transitions

    def _update_statistics(self, steps: list[Step[np.ndarray]]) -> None:
        with self.clock.time("log"):
            reward, done = (np.concatenate([getattr(step, name) for step in steps], 1) for name in ("reward", "done"))
            self.statistics.add(reward, done)
            if self.learner.task_weights.uses_scores and self.ranks.largest(bool(done.any())):
                self.learner.task_weights.update_scores(self.statistics.recent(self.ranks.total))

    def store(self, transitions: list[Transition]) -> None:
        """Add a step of all groups to the replay."""
        transition = concatenated(transitions)
        self.learner.agent.observe(transition.reward, transition.done)
        self.replay.add(transition)

    @property
    def newest_frames(self) -> torch.Tensor:
        """Current frames of every environment, `[K, N, *frame]`."""
        return torch.cat([group.frames.newest for group in self.groups], 1)

    def close(self) -> None:
        """Close the environments."""
        for group in self.groups:
            group.envs.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all state that later ticks depend on, without the rows of the replay."""
        parts = {part: getattr(self, part).state_dict() for part in ("actor", "replay", "learner", "statistics")}
        return {"step": self.step, "groups": {str(index): group.state_dict() for index, group in enumerate(self.groups)}} | parts

    def rank_state_dict(self) -> dict[str, Any]:
        """Return `state_dict` without the task weights, which are the same on all ranks."""
        state = self.state_dict()
        return state | {"learner": {name: value for name, value in state["learner"].items() if name != "task_weights"}}

    def load_state_dict(self, state: dict[str, Any], rows_restored: bool) -> None:
        """Restore a state. The environments replay the actions of their current episodes.

        Raises:
            RunError: the replayed environments return other frames than before.
            ValueError: the state has another number of groups.
        """
        self.step = int(state["step"])
        for part in ("actor", "learner", "statistics"):
            getattr(self, part).load_state_dict(state[part])
        self.replay.load_state_dict(state["replay"], rows_restored)
        groups = state["groups"]
        if len(groups) != len(self.groups):
            raise ValueError(f"groups must be {len(groups)}, as in the saved run, got {len(self.groups)}")
        for index, group in enumerate(self.groups):
            group.load_state_dict(groups[str(index)], self.learner.agent.epsilon(self.step))
        if not rows_restored:
            self.learner.refill_from(self.step)
