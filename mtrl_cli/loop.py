"""The loop: play and learn. Whoever iterates it decides when to log, save, evaluate and stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.distributed import ALONE, Ranks
from mtrl_cli.envs.pack import TaskPack
from mtrl_cli.errors import RunError
from mtrl_cli.frame_stack import FrameStack
from mtrl_cli.learner import Learner
from mtrl_cli.replay import Replay
from mtrl_cli.stats import EpisodeStatistics


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

    Args:
        pack, actor, replay, learner, frames, statistics: the parts that take turns.
        device: of the replay and the learner.
        ranks: that train together.

    Attributes:
        step: steps per task so far, of all ranks together.
        clock: where the time went.
    """

    def __init__(
        self,
        pack: TaskPack,
        actor: EpsilonGreedy,
        replay: Replay,
        learner: Learner,
        frames: FrameStack,
        statistics: EpisodeStatistics,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        self.pack, self.actor, self.replay, self.learner, self.frames, self.statistics = pack, actor, replay, learner, frames, statistics
        self.device, self.ranks = device, ranks
        self.step = 0
        self.clock = Clock()

    def begin(self) -> None:
        """Start every environment's first episode."""
        observation = torch.from_numpy(self.pack.reset()).to(self.device)
        self.frames.push(observation, torch.ones_like(self.frames.start))

    def ticks(self) -> Iterator[int]:
        """One step of every environment at a time, for ever; yields the steps per task so far."""
        while True:
            with self.clock.time("act"):
                action = self.actor.act(self.frames.observation, self.learner.agent.epsilon(self.step))
                self.pack.send(action.cpu().numpy())
            with self.clock.time("learn"):  # while the emulators work
                self.learner.learn_what_is_due(self.step)
            with self.clock.time("env"):
                step = self.pack.recv()
            with self.clock.time("log"):
                self.statistics.add(step.reward, step.done)
                if self.learner.task_weights.hears_scores and self.ranks.largest(bool(step.done.any())):
                    self.learner.task_weights.hear_scores(self.statistics.recent(self.ranks.total))
            with self.clock.time("act"):
                reward, terminated, truncated, done = (
                    torch.from_numpy(array).to(self.device) for array in (step.reward, step.terminated, step.truncated, step.done)
                )
                self.learner.agent.observe(reward, done)
                self.replay.add(self.frames.newest, self.frames.start, action, reward, terminated, truncated)
                self.frames.push(torch.from_numpy(step.observation).to(self.device), done)
            self.step += self.pack.num_envs * self.ranks.size
            yield self.step

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next ticks depend on but the rows of the replay."""
        parts = ("pack", "actor", "replay", "learner", "frames", "statistics")
        return {"step": self.step} | {part: getattr(self, part).state_dict() for part in parts}

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
        for part in ("actor", "learner", "frames", "statistics"):
            getattr(self, part).load_state_dict(state[part])
        self.replay.load_state_dict(state["replay"], rows_restored)
        newest = self.frames.newest.cpu().numpy()
        if not np.array_equal(self.pack.load_state_dict(state["pack"]), newest):
            raise RunError("the environments did not repeat themselves: resume with the versions of the packages that run.json names")
        if not rows_restored:
            self.learner.refill_from(self.step)
