"""A slow but simple reference replay with episodes in Python lists, for comparison with the real replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mtrl_cli.replay.buffers import Batch, Replay, ReplaySpec, Transition

FRAME = (2, 3)
Row = dict[str, torch.Tensor]


def transition(row: Row) -> Transition:
    """Return the transition of a row of `random_rows`; its value is zero if the row has no value."""
    return Transition(**({"done": row["terminated"] | row["truncated"], "value": torch.zeros_like(row["reward"])} | row))


def spec(**changes: object) -> ReplaySpec:
    """Return the spec of a small replay."""
    settings: dict = {
        "num_tasks": 2,
        "num_envs": 3,
        "frame_shape": FRAME,
        "dtype": torch.float32,
        "stack": 2,
        "n_step": 3,
        "device": torch.device("cpu"),
        "seed": 7,
        "total_steps": 1000,
    }
    return ReplaySpec(**(settings | changes))


def random_rows(
    spec: ReplaySpec, seed: int, terminated: float = 0.1, truncated: float = 0.1, both: float = 0.05, life_lost: float = 0.1
) -> Iterator[Row]:
    """Generate an endless stream of rows, as fields of `Transition`, of episodes that end at random.

    Args:
        terminated, truncated, both: probability per row that an episode ends this way.
        life_lost: probability that a row is terminated although its episode continues.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (spec.num_tasks, spec.num_envs)
    start = torch.ones(shape, dtype=torch.bool)
    # All frame values except zero are unique, so that any wrong index is detected.
    size = int(torch.tensor(spec.frame_shape).prod())
    number = 1
    while True:
        count = shape[0] * shape[1] * size
        frame = torch.arange(number, number + count).view(*shape, *spec.frame_shape)
        number += count
        draw = torch.rand(shape, generator=random)
        ends_terminated = draw < terminated
        ends_both = (draw >= terminated) & (draw < terminated + both)
        ends_truncated = (draw >= terminated + both) & (draw < terminated + both + truncated)
        lost = (draw >= terminated + both + truncated) & (draw < terminated + both + truncated + life_lost)
        yield {
            "frame": (frame if spec.dtype == torch.float32 else frame % 255 + 1).to(spec.dtype),
            "start": start,
            "action": torch.randint(256, shape, generator=random),
            "reward": torch.randint(-9, 10, shape, generator=random).float(),
            "terminated": ends_terminated | ends_both | lost,
            "truncated": ends_truncated | ends_both,
        }
        start = ends_terminated | ends_both | ends_truncated


@dataclass
class Moment:
    """One environment's part of a row."""

    frame: torch.Tensor
    action: int
    reward: float
    terminated: bool
    truncated: bool


@dataclass
class Sample:
    """An expected sample; `next_observation` is None if it must not matter."""

    observation: torch.Tensor
    action: int
    rewards: list[float]
    steps: int
    terminated: bool
    next_observation: torch.Tensor | None


class SlowReplay:
    """All episodes of all environments since the start, as lists of moments."""

    def __init__(self, spec: ReplaySpec):
        self.spec = spec
        self.rows = 0
        environments = [(task, env) for task in range(spec.num_tasks) for env in range(spec.num_envs)]
        self.episodes: dict[tuple[int, int], list[list[Moment]]] = {place: [] for place in environments}
        self.where: dict[tuple[int, int], list[tuple[int, int]]] = {place: [] for place in environments}

    def add(self, row: Row) -> None:
        for (task, env), episodes in self.episodes.items():
            if row["start"][task, env]:
                episodes.append([])
            self.where[task, env].append((len(episodes) - 1, len(episodes[-1])))
            values = [row[name][task, env] for name in ("frame", "action", "reward", "terminated", "truncated")]
            episodes[-1].append(Moment(values[0], int(values[1]), float(values[2]), bool(values[3]), bool(values[4])))
        self.rows += 1

    def truncated(self, task: int, env: int, row: int) -> bool:
        """Return whether the episode was truncated after a row, so that the next observation was never stored."""
        episode, place = self.where[task, env][row]
        moment = self.episodes[task, env][episode][place]
        return moment.truncated and not moment.terminated

    def sample(self, task: int, env: int, row: int) -> Sample:
        """Return the sample that starts at a row."""
        number, place = self.where[task, env][row]
        episode = self.episodes[task, env][number]
        rewards: list[float] = []
        terminated = False
        for moment in episode[place : place + self.spec.n_step]:
            if moment.truncated and not moment.terminated:
                break  # its successor was never stored
            rewards.append(moment.reward)
            if moment.terminated:
                terminated = True
                break
        steps = len(rewards)
        return Sample(
            observation=self._stack(episode, place),
            action=episode[place].action,
            rewards=rewards + [0.0] * (self.spec.n_step - steps),
            steps=steps,
            terminated=terminated,
            next_observation=None if terminated else self._stack(episode, place + steps),
        )

    def _stack(self, episode: list[Moment], place: int) -> torch.Tensor:
        frames = [moment.frame for moment in episode[max(0, place - self.spec.stack + 1) : place + 1]]
        blank = torch.zeros(self.spec.frame_shape, dtype=self.spec.dtype)
        return torch.stack([blank] * (self.spec.stack - len(frames)) + frames)


def assert_is(batch: Batch, task: int, b: int, expected: Sample) -> None:
    """Assert that a sample of a batch equals the expected one."""
    assert torch.equal(batch.observation[task, b], expected.observation)
    assert batch.action[task, b] == expected.action
    assert batch.rewards[task, b].tolist() == expected.rewards
    assert batch.steps[task, b] == expected.steps
    assert batch.terminated[task, b] == expected.terminated
    if expected.next_observation is not None:
        assert torch.equal(batch.next_observation[task, b], expected.next_observation)


def place_of(batch: Batch, replay: Replay, task: int, b: int) -> tuple[int, int]:
    """Return the row and environment at which a sample starts, from its index and the newest row of the ring."""
    slot, env = divmod(int(batch.index[task, b]), replay.spec.num_envs)
    newest = replay.rows - 1
    return newest - (newest - slot) % replay.capacity_rows, env


def assert_every_start(replay: Replay, slow: SlowReplay) -> None:
    """Assert that every sample that may be drawn equals the reference."""
    first, stop = replay.eligible_rows
    starts = [(row, env) for row in range(first, stop) for env in range(replay.spec.num_envs)]
    if not starts:
        return
    row, env = (torch.tensor(values).expand(replay.spec.num_tasks, -1) for values in zip(*starts, strict=True))
    batch = replay.gather(row, env, torch.ones(row.shape))
    for task in range(replay.spec.num_tasks):
        for b, (row_b, env_b) in enumerate(starts):
            assert_is(batch, task, b, slow.sample(task, env_b, row_b))
            assert batch.weight[task, b] == (0.0 if slow.truncated(task, env_b, row_b) else 1.0)


def assert_legal(batch: Batch, replay: Replay, slow: SlowReplay) -> None:
    """Assert that every drawn sample has a valid start and equals the reference."""
    spec = replay.spec
    for task in range(spec.num_tasks):
        for b in range(batch.action.shape[1]):
            row, env = place_of(batch, replay, task, b)
            assert row + spec.n_step < slow.rows, "the window reaches past the write head"
            assert row - min(row, spec.stack - 1) >= slow.rows - replay.capacity_rows, "the stack was overwritten"
            if batch.weight[task, b]:
                assert not slow.truncated(task, env, row)
            assert_is(batch, task, b, slow.sample(task, env, row))
