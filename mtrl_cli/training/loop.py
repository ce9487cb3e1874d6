"""The loop: play and learn. Whoever iterates it decides when to log, save, evaluate and stop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.envs.vector_tasks import Step
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.replay.buffers import Replay
from mtrl_cli.training.env_group import Group, Row, joined
from mtrl_cli.training.episode_statistics import EpisodeStatistics
from mtrl_cli.training.learner import Learner


class Clock:
    """Where the time goes: seconds by part since the last reading."""

    def __init__(self, parts: tuple[str, ...] = ("act", "env", "learn", "log")):
        self._seconds = dict.fromkeys(parts, 0.0)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return seconds


class Loop:
    """Plays K x N environments and learns from them. Where several ranks train, each plays N of its own, and all go in step.

    Environments are in one group, or in several that take turns: while one is being played, actions are chosen for another.

    Args:
        groups: of environments, each with as many of each task.
        actor: chooses for all of them.
        replay, learner, statistics: the parts that take turns with them.
        overlapped: whether updates are made while emulators play (on a GPU, which works beside them) or when they have played (on cores
            that both would fight for).
        ranks: that train together.

    Attributes:
        step: steps per task so far, of all ranks together.
        num_envs: environments of each task here.
        clock: where the time went.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        actor: EpsilonGreedy,
        replay: Replay,
        learner: Learner,
        statistics: EpisodeStatistics,
        overlapped: bool = False,
        ranks: Ranks = ALONE,
    ):
        self.groups, self.actor, self.replay, self.learner, self.statistics = list(groups), actor, replay, learner, statistics
        self.num_envs = sum(group.pack.num_envs for group in groups)
        self._overlapped, self.ranks = overlapped, ranks
        self.step = 0
        self.clock = Clock()

    def begin(self) -> None:
        """Start every environment's first episode."""
        for group in self.groups:
            group.begin(self.learner.agent.epsilon(self.step))
        self.groups[0].choose()

    def ticks(self) -> Iterator[int]:
        """One step of every environment at a time, for ever; yields the steps per task so far."""
        while True:
            self._send()
            if self._overlapped:
                self._learn()
            steps, rows = self._receive()
            if not self._overlapped:
                self._learn()
            self._count(steps)
            with self.clock.time("act"):
                self.store(rows)
                if len(self.groups) == 1:
                    self.groups[0].choose()
            self.step += self.num_envs * self.ranks.size
            yield self.step

    def _send(self) -> None:
        """Set all groups going; the first one's actions were chosen at the end of the step before."""
        for group in self.groups:
            if group is not self.groups[0]:
                with self.clock.time("act"):
                    group.choose()
            with self.clock.time("env"):
                group.send()

    def _learn(self) -> None:
        with self.clock.time("learn"):
            self.learner.run_due_updates(self.step)

    def _receive(self) -> tuple[list[Step], list[Row]]:
        """Wait for each group; choose for the first while the others are still playing."""
        steps, rows, epsilon_K = [], [], self.learner.agent.epsilon(self.step + self.num_envs * self.ranks.size)
        for group in self.groups:
            with self.clock.time("env"):
                steps.append(group.pack.recv())
            with self.clock.time("act"):
                rows.append(group.take(steps[-1], epsilon_K))
                if group is self.groups[0] and len(self.groups) > 1:
                    group.choose()
        return steps, rows

    def _count(self, steps: list[Step]) -> None:
        with self.clock.time("log"):
            reward, done = (np.concatenate([getattr(step, name) for step in steps], 1) for name in ("reward", "done"))
            self.statistics.add(reward, done)
            if self.learner.task_weights.hears_scores and self.ranks.largest(bool(done.any())):
                self.learner.task_weights.hear_scores(self.statistics.recent(self.ranks.total))

    def store(self, rows: list[Row]) -> None:
        """Put a step of all groups into the replay."""
        row = joined(rows)
        self.learner.agent.observe(row.reward, row.done)
        self.replay.add(row.frame, row.start, row.action, row.reward, row.terminated, row.truncated, row.value)

    @property
    def newest_frames(self) -> torch.Tensor:
        """What every environment shows now, `[K, N, *frame]`."""
        return torch.cat([group.frames.newest for group in self.groups], 1)

    def close(self) -> None:
        """Free the environments."""
        for group in self.groups:
            group.pack.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next ticks depend on but the rows of the replay."""
        parts = {part: getattr(self, part).state_dict() for part in ("actor", "replay", "learner", "statistics")}
        return {"step": self.step, "groups": {str(index): group.state_dict() for index, group in enumerate(self.groups)}} | parts

    def own_state_dict(self) -> dict[str, Any]:
        """What of `state_dict` the first rank's does not tell of this one: the learned weights of tasks are the same on all."""
        state = self.state_dict()
        return state | {"learner": {name: value for name, value in state["learner"].items() if name != "task_weights"}}

    def load_state_dict(self, state: dict[str, Any], rows_restored: bool) -> None:
        """Go on from a state; emulators are brought back by playing their episodes again.

        Raises:
            RunError: they did not show the frames that they showed before.
        """
        self.step = int(state["step"])
        for part in ("actor", "learner", "statistics"):
            getattr(self, part).load_state_dict(state[part])
        self.replay.load_state_dict(state["replay"], rows_restored)
        # Older checkpoints know one group, by its parts.
        states = state.get("groups") or {"0": {part: state[part] for part in ("pack", "frames")}}
        if len(states) != len(self.groups):
            raise ValueError(f"the saved run has {len(states)} groups of environments, this one {len(self.groups)}")
        for index, group in enumerate(self.groups):
            chosen = group.load_state_dict(states[str(index)], self.learner.agent.epsilon(self.step))
            if index == 0 and not chosen:
                group.choose()
        if not rows_restored:
            self.learner.refill_from(self.step)
