"""Throughput of the parts of a run, each measured separately, and the resulting limit of the whole run.

Rates are in environment steps per second over all tasks. The rate of learning is the rate of steps for which updates are due
(`agent.samples_per_step`), including sampling and transfers.
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
from mtrl_cli.metric_names import PERF
from mtrl_cli.replay.rollout_buffer import Rollouts
from mtrl_cli.replay.types import Transition
from mtrl_cli.training.loop import Loop

PARTS = ("emulators", "acting", "learning", "loop")
"""Parts that `Meter` measures, in order."""
_RECORDED_STEPS = 16  # steps of the emulators that are reused to measure acting


def limit(emulators: float, acting: float, learning: float, shared_cores: bool) -> float:
    """Upper bound on the steps per second of a run, from the rates of its parts.

    On shared cores the times of the parts add up: 1/limit = 1/emulators + 1/acting + 1/learning. On a separate device, acting and learning
    alternate while the emulators run: the slower side is the limit.
    """
    on_device = 1 / (1 / acting + 1 / learning)
    return 1 / (1 / emulators + 1 / on_device) if shared_cores else min(emulators, on_device)


def shares_of_limit(emulators: float, acting: float, learning: float) -> dict[str, float]:
    """Share of each part in the time of a step, if the parts run one after another."""
    seconds = {"emulators": 1 / emulators, "acting": 1 / acting, "learning": 1 / learning}
    return {part: each / sum(seconds.values()) for part, each in seconds.items()}


def between_rows(seconds: Mapping[str, float], steps: float, learned: float, per_update: float, rate: float) -> dict[str, float]:
    """Compute `perf/emulators|acting|learning|limit|share` between two rows of metrics, if all parts share the same cores.

    Learning is absent if there was no update. Limit and share are absent if the updates do not match the steps: learning started between
    the rows, or the updates from a rollout fall into another row than its steps.

    Args:
        seconds: of the parts `act`, `env` and `learn` (`loop.Clock`).
        steps: steps over all tasks.
        learned: steps over all tasks for which the updates were due.
        per_update: steps over all tasks for which one update is due.
        rate: steps per second of the run, over all tasks.
    """
    rates = {"emulators": (steps, seconds["env"]), "acting": (steps, seconds["act"]), "learning": (learned, seconds["learn"])}
    known = {part: count / spent for part, (count, spent) in rates.items() if count > 0 and spent > 0}
    metrics = {PERF + part: each for part, each in known.items()}
    if len(known) == len(rates) and abs(learned - steps) < per_update:
        highest = limit(**known, shared_cores=True)
        metrics |= {f"{PERF}limit": highest, f"{PERF}share": rate / highest}
    return metrics


@dataclass
class Measured:
    """Measurements of a loop.

    Attributes:
        rates: steps per second over all tasks, for each of PARTS and each round.
        seconds: host time of the rounds of the loop, by part of its clock (`act`, `env`, `learn`, `log`).
        loop_seconds, loop_updates: totals of the rounds of the loop.
    """

    rates: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    seconds: dict[str, float] = field(default_factory=dict)
    loop_seconds: float = 0.0
    loop_updates: int = 0

    @property
    def medians(self) -> dict[str, float]:
        """Median rate of each part."""
        return {part: median(rates) for part, rates in self.rates.items()}

    @property
    def split(self) -> dict[str, float]:
        """Shares of the time of the loop by part of its clock, and the `rest`; the sum is 1."""
        shares = {part: spent / self.loop_seconds for part, spent in self.seconds.items()}
        return shares | {"rest": max(0.0, 1 - sum(shares.values()))}


class Meter:
    """Measures the parts of a loop in turns, each separately. The weights of the loop are meaningless afterwards.

    Args:
        loop: after `reset`, with an agent whose `learning_starts` is 0.
        seed: of random actions.
    """

    def __init__(self, loop: Loop, seed: int):
        self._loop = loop
        tasks = loop.groups[0].envs.tasks
        self._tasks = len(tasks)
        self._steps_per_tick = self._tasks * loop.num_envs
        num_actions_K1 = np.array([[task.num_actions] for task in tasks])
        draw = np.random.default_rng(seed).random((64, self._tasks, loop.num_envs // len(loop.groups)))
        self._actions = itertools.cycle((draw * num_actions_K1).astype(np.int64))
        self._steps = itertools.cycle([self._emulate() for _ in range(_RECORDED_STEPS)])
        self.measured = Measured()
        self._learned = 0

    def fill(self, rows: int) -> None:
        """Add rows to the replay."""
        for _ in range(rows):
            self._loop.store(self._transitions())

    def warm_up(self) -> None:
        """Run every part once without measuring it."""
        self._discard_due_updates()
        self._tick_until_update(self._loop.ticks())
        self._emulate()
        self._act()
        self._learned = 0
        self._learn()
        self._wait()

    def round(self, seconds: float) -> None:
        """Measure every part once, in about `seconds` in total."""
        each, rates = seconds / len(PARTS), self.measured.rates
        steps_per_update = self._tasks * self._loop.learner.steps_per_update
        rates["emulators"].append(self._rate(self._emulate, self._steps_per_tick, each))
        rates["acting"].append(self._rate(self._act, self._steps_per_tick, each))
        self._learned = 0
        rates["learning"].append(self._rate(self._learn, steps_per_update, each))
        rates["loop"].append(self._loop_rate(each))

    def _emulate(self) -> list[Step[np.ndarray]]:
        for group in self._loop.groups:
            group.envs.send(next(self._actions))
        return [group.envs.recv() for group in self._loop.groups]

    def _transitions(self) -> list[Transition]:
        """Transitions of a recorded step, whose observation is the newest one because emulators overwrite it."""
        epsilon_K = self._loop.learner.agent.epsilon(self._loop.step)
        return [group.transition(step, epsilon_K) for group, step in zip(self._loop.groups, next(self._steps), strict=True)]

    def _act(self) -> None:
        for group in self._loop.groups:
            group.choose()
            group.transfer.fetch()
        self._loop.store(self._transitions())

    def _learn(self) -> None:
        replay, updates_per_rollout = self._loop.replay, self._loop.learner.agent.updates_per_rollout
        if isinstance(replay, Rollouts) and self._learned % updates_per_rollout == 0:
            replay.restart(at_last_rollout=True)
        self._learned += 1
        self._loop.learner.update(self._loop.step)

    def _rate(self, unit: Callable[[], object], steps: float, seconds: float) -> float:
        """Measure the steps per second of a unit of work for `steps` steps, repeated for `seconds`."""
        self._wait()
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < seconds:
            unit()
            count += 1
        self._wait()
        return count * steps / (time.perf_counter() - start)

    def _loop_rate(self, seconds: float) -> float:
        """Measure the steps per second of the loop from one update to another, so that every step has its share of updates."""
        loop, measured = self._loop, self.measured
        self._discard_due_updates()
        ticks = loop.ticks()
        self._tick_until_update(ticks)
        self._wait()
        loop.clock.read()
        start, first_step, first_update = time.perf_counter(), loop.step, loop.learner.updates
        while loop.learner.updates == first_update or time.perf_counter() - start < seconds:
            self._tick_until_update(ticks)
        self._wait()
        taken = time.perf_counter() - start
        for part, spent in loop.clock.read().items():
            measured.seconds[part] = measured.seconds.get(part, 0.0) + spent
        measured.loop_seconds += taken
        measured.loop_updates += loop.learner.updates - first_update
        return (loop.step - first_step) * self._tasks / taken

    def _tick_until_update(self, ticks: Iterator[int]) -> None:
        updates = self._loop.learner.updates
        while self._loop.learner.updates == updates:
            next(ticks)

    def _discard_due_updates(self) -> None:
        """Discard the updates that are due: count due updates from the current step on."""
        if isinstance(self._loop.replay, Rollouts):
            self._loop.replay.restart()
        self._loop.learner.refill_from(self._loop.step)

    def _wait(self) -> None:
        device = self._loop.replay.spec.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
