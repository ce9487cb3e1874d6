"""How fast the parts of a run are, each alone, and how fast a run could be at most with such parts.

Rates are in environment steps per second over all tasks. The rate of learning is that at which updates keep up with the steps that they
are due for (`agent.samples_per_step`), sampling, gathering and transfers included.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from mtrl_cli.envs.vector_tasks import Step
from mtrl_cli.training.env_group import Row
from mtrl_cli.training.loop import Loop

PARTS = ("emulators", "acting", "learning", "loop")
"""What `Meter` measures, in the order in which they take turns."""
_REMEMBERED = 16  # steps of the emulators that acting is shown, in turns


def limit(emulators: float, acting: float, learning: float, shared_cores: bool) -> float:
    """The most steps per second that a run can make whose parts make so many alone.

    On shared cores every step takes its time of each part, one after the other: 1/limit = 1/emulators + 1/acting + 1/learning. With a
    device of their own, acting and learning take turns there while the emulators work: the slower of the two sides decides.
    """
    on_device = 1 / (1 / acting + 1 / learning)
    return 1 / (1 / emulators + 1 / on_device) if shared_cores else min(emulators, on_device)


def shares_of_limit(emulators: float, acting: float, learning: float) -> dict[str, float]:
    """Which share of a step's work each part is, where they take turns."""
    seconds = {"emulators": 1 / emulators, "acting": 1 / acting, "learning": 1 / learning}
    return {part: each / sum(seconds.values()) for part, each in seconds.items()}


def of_a_row(seconds: Mapping[str, float], steps: float, learned: float, per_update: float, rate: float) -> dict[str, float]:
    """`perf/emulators|acting|learning|limit|share` of a run between two rows, where all parts share the same cores.

    What the row cannot tell is left out: learning where no update was made, limit and share where updates did not keep step (learning began
    in it, or a rollout's updates fell into it or out of it).

    Args:
        seconds: of the parts `act`, `env` and `learn` of the loop's clock.
        steps: steps that were made, over all tasks.
        learned: steps over all tasks that the updates made were due for.
        per_update: such steps of one update.
        rate: the run's steps per second over all tasks.
    """
    rates = {"emulators": (steps, seconds["env"]), "acting": (steps, seconds["act"]), "learning": (learned, seconds["learn"])}
    known = {part: count / spent for part, (count, spent) in rates.items() if count > 0 and spent > 0}
    metrics = {f"perf/{part}": each for part, each in known.items()}
    if len(known) == len(rates) and abs(learned - steps) < per_update:
        highest = limit(**known, shared_cores=True)
        metrics |= {"perf/limit": highest, "perf/share": rate / highest}
    return metrics


@dataclass
class Measured:
    """What was measured of a loop.

    Attributes:
        rates: of each of PARTS, steps per second over all tasks, one for each round.
        seconds: of the loop's rounds by part of its clock (`act`, `env`, `learn`, `log`), as the host spent them.
        loop_seconds, loop_updates: of the loop's rounds, in all.
    """

    rates: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    seconds: dict[str, float] = field(default_factory=dict)
    loop_seconds: float = 0.0
    loop_updates: int = 0

    @property
    def medians(self) -> dict[str, float]:
        """The middle one of each part's rates."""
        return {part: median(rates) for part, rates in self.rates.items()}

    @property
    def split(self) -> dict[str, float]:
        """Shares of the loop's time by part of its clock, and the `rest`; together 1."""
        shares = {part: spent / self.loop_seconds for part, spent in self.seconds.items()}
        return shares | {"rest": max(0.0, 1 - sum(shares.values()))}


class Meter:
    """Measures the parts of a loop, each alone, in turns. What the loop has learned means nothing afterwards.

    Args:
        loop: has begun; its agent does not wait for experience (`learning_starts` is 0).
        seed: of the emulators' random actions.
    """

    def __init__(self, loop: Loop, seed: int):
        self._loop = loop
        tasks = loop.groups[0].pack.tasks
        self._tasks = len(tasks)
        self._steps_per_tick = self._tasks * loop.num_envs
        num_actions_K1 = np.array([[task.num_actions] for task in tasks])
        draw = np.random.default_rng(seed).random((64, self._tasks, loop.num_envs // len(loop.groups)))
        self._actions = itertools.cycle((draw * num_actions_K1).astype(np.int64))
        self._steps = itertools.cycle([self._emulate() for _ in range(_REMEMBERED)])
        self.measured = Measured()
        self._learned = 0

    def fill(self, rows: int) -> None:
        """Put so many rows into the replay."""
        for _ in range(rows):
            self._loop.store(self._taken())

    def warm_up(self) -> None:
        """Let every part do once what it does only the first time. Not measured."""
        self._begin_anew()
        self._tick_until_update(self._loop.ticks())
        self._emulate()
        self._act()
        self._learned = 0
        self._learn()
        self._wait()

    def round(self, seconds: float) -> None:
        """Measure every part once, in about so many seconds in all."""
        each, rates = seconds / len(PARTS), self.measured.rates
        steps_per_update = self._tasks * self._loop.learner.steps_per_update
        rates["emulators"].append(self._rate(self._emulate, self._steps_per_tick, each))
        rates["acting"].append(self._rate(self._act, self._steps_per_tick, each))
        self._learned = 0
        rates["learning"].append(self._rate(self._learn, steps_per_update, each))
        rates["loop"].append(self._loop_rate(each))

    def _emulate(self) -> list[Step]:
        for group in self._loop.groups:
            group.pack.send(next(self._actions))
        return [group.pack.recv() for group in self._loop.groups]

    def _taken(self) -> list[Row]:
        """A step that was remembered, as if it had just been made. (Its observation is the emulators' newest: they write over it.)"""
        epsilon_K = self._loop.learner.agent.epsilon(self._loop.step)
        return [group.take(step, epsilon_K) for group, step in zip(self._loop.groups, next(self._steps), strict=True)]

    def _act(self) -> None:
        for group in self._loop.groups:
            group.choose()
            group.chosen()  # as the emulators would be given them
        self._loop.store(self._taken())

    def _learn(self) -> None:
        agent = self._loop.learner.agent
        if agent.updates_per_rollout and self._learned % agent.updates_per_rollout == 0:
            self._loop.replay.again()
        self._learned += 1
        self._loop.learner.update(self._loop.step)

    def _rate(self, unit: Callable[[], object], steps: float, seconds: float) -> float:
        """Steps per second of a unit of work that stands for so many steps, done as often as `seconds` allow."""
        self._wait()
        begun, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begun < seconds:
            unit()
            count += 1
        self._wait()
        return count * steps / (time.perf_counter() - begun)

    def _loop_rate(self, seconds: float) -> float:
        """Steps per second of the loop itself, from one update to another, so that every step has its share of updates."""
        loop, measured = self._loop, self.measured
        self._begin_anew()
        ticks = loop.ticks()
        self._tick_until_update(ticks)
        self._wait()
        loop.clock.read()
        begun, first_step, first_update = time.perf_counter(), loop.step, loop.learner.updates
        while loop.learner.updates == first_update or time.perf_counter() - begun < seconds:
            self._tick_until_update(ticks)
        self._wait()
        taken = time.perf_counter() - begun
        for part, spent in loop.clock.read().items():
            measured.seconds[part] = measured.seconds.get(part, 0.0) + spent
        measured.loop_seconds += taken
        measured.loop_updates += loop.learner.updates - first_update
        return (loop.step - first_step) * self._tasks / taken

    def _tick_until_update(self, ticks: Iterator[int]) -> None:
        updates = self._loop.learner.updates
        while self._loop.learner.updates == updates:
            next(ticks)

    def _begin_anew(self) -> None:
        """Updates that were made without steps are not saved up."""
        self._loop.replay.restart()
        self._loop.learner.refill_from(self._loop.step)

    def _wait(self) -> None:
        device = self._loop.replay.spec.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
