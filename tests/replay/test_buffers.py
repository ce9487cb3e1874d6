"""Replay: index arithmetic against whole episodes in lists, frequencies of draws, and exact resume."""

from __future__ import annotations

import math
import random
from itertools import islice, pairwise

import pytest
import torch

from mtrl_cli.replay.buffers import Batch, ReplaySpec, UniformReplay
from mtrl_cli.training.frame_stack import FrameStack
from tests.helpers.replay_reference import SlowReplay, assert_every_start, assert_legal, place_of, random_rows, spec, transition


def random_spec(seed: int) -> tuple[ReplaySpec, int]:
    """A random spec and a random number of rows of the ring."""
    draw = random.Random(seed)
    stack, n_step = draw.randint(1, 4), draw.randint(1, 5)
    chosen = spec(
        num_tasks=draw.randint(1, 3),
        num_envs=draw.randint(1, 3),
        stack=stack,
        n_step=n_step,
        dtype=draw.choice([torch.uint8, torch.float32]),
        frame_shape=draw.choice([(2, 3), (4,)]),
        seed=seed,
    )
    return chosen, n_step + stack + draw.randint(1, 8)


def filled(chosen: ReplaySpec, capacity_rows: int, rows: int, seed: int = 0, **ends: float) -> tuple[UniformReplay, SlowReplay]:
    """A replay and its reference after random rows."""
    replay, slow = UniformReplay(chosen, capacity=capacity_rows * chosen.num_envs), SlowReplay(chosen)
    for row in islice(random_rows(chosen, seed, **ends), rows):
        replay.add(transition(row))
        slow.add(row)
    return replay, slow


def assert_same(batch: Batch, other: Batch) -> None:
    for name, value in vars(batch).items():
        assert torch.equal(value, getattr(other, name)), name


# -- samples --------------------------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    """One environment, stacks of 2 frames, windows of 3 steps.

    Frames by episode: 1, 2, 3 (truncated); 4, 5 (a life is lost), 6, 7 (terminated and truncated); 8, 9, 9, 9.
    """
    chosen = spec(num_tasks=1, num_envs=1, frame_shape=(1,))
    replay = UniformReplay(chosen, capacity=20)
    terminated, truncated, starts = {5, 7}, {3, 7}, {1, 4, 8}
    for frame in (1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9):
        row = {
            "frame": torch.full((1, 1, 1), float(frame)),
            "start": torch.tensor([[frame in starts]]),
            "action": torch.tensor([[frame]]),
            "reward": torch.tensor([[10.0 * frame]]),
            "terminated": torch.tensor([[frame in terminated]]),
            "truncated": torch.tensor([[frame in truncated]]),
        }
        replay.add(transition(row))
    assert replay.eligible_rows == (0, 8)
    batch = replay.gather(torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8))
    stacks = batch.observation[0, :, :, 0].int().tolist()
    assert stacks == [[0, 1], [1, 2], [2, 3], [0, 4], [4, 5], [5, 6], [6, 7], [0, 8]]
    assert batch.rewards[0].int().tolist() == [
        [10, 20, 0],  # the window ends before the truncated step at 3, whose successor is unknown
        [20, 0, 0],
        [0, 0, 0],  # the successor is unknown: weight 0
        [40, 50, 0],  # a lost life terminates the window
        [50, 0, 0],
        [60, 70, 0],  # truncated and terminated counts as terminated
        [70, 0, 0],
        [80, 90, 90],
    ]
    assert batch.steps[0].tolist() == [2, 1, 0, 2, 1, 2, 1, 3]
    assert batch.terminated[0].tolist() == [False, False, False, True, True, True, True, False]
    assert batch.weight[0].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    following = batch.next_observation[0, :, :, 0].int().tolist()
    assert [following[start] for start in (0, 1, 7)] == [[2, 3], [2, 3], [9, 9]]


@pytest.mark.parametrize("seed", range(30))
def test_every_sample_agrees_with_whole_episodes(seed: int) -> None:
    chosen, capacity_rows = random_spec(seed)
    replay, slow = UniformReplay(chosen, capacity=capacity_rows * chosen.num_envs), SlowReplay(chosen)
    for row in islice(random_rows(chosen, seed), 3 * capacity_rows):
        replay.add(transition(row))
        slow.add(row)
        if slow.rows % 4 == 0 or slow.rows in (capacity_rows, capacity_rows + 1, capacity_rows + chosen.stack):
            assert_every_start(replay, slow)
    first, stop = replay.eligible_rows
    assert (first, stop) == (2 * capacity_rows + chosen.stack - 1, 3 * capacity_rows - chosen.n_step)


@pytest.mark.parametrize(
    "ends", [{"terminated": 0.0, "truncated": 0.0, "both": 0.0, "life_lost": 0.0}, {"terminated": 0.5, "truncated": 0.4}]
)
def test_samples_agree_with_whole_episodes_without_ends_and_with_frequent_ends(ends: dict[str, float]) -> None:
    replay, slow = filled(spec(stack=4, n_step=5), 12, 31, **ends)
    assert replay.ready
    assert_every_start(replay, slow)


def test_sampled_observation_is_the_observation_that_was_acted_on() -> None:
    """The frame stack at the time of acting equals the gathered stack."""
    chosen = spec(stack=4)
    frames = FrameStack(chosen.num_tasks, chosen.num_envs, 4, chosen.frame_shape, chosen.dtype, chosen.device)
    replay = UniformReplay(chosen, capacity=60)
    seen = []
    for row in islice(random_rows(chosen, 3), 50):
        frames.push(row["frame"], row["start"])
        seen.append(frames.observation.clone())
        replay.add(transition(row | {"frame": frames.newest, "start": frames.start}))
    first, stop = replay.eligible_rows
    for row in range(first, stop):
        for env in range(chosen.num_envs):
            place = torch.full((chosen.num_tasks, 1), row), torch.full((chosen.num_tasks, 1), env)
            assert torch.equal(replay.gather(*place, torch.ones(2, 1)).observation[:, 0], seen[row][:, env])


# -- draws -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_draws_are_eligible(seed: int) -> None:
    chosen, capacity_rows = random_spec(100 + seed)
    replay, slow = UniformReplay(chosen, capacity=capacity_rows * chosen.num_envs), SlowReplay(chosen)
    for row in islice(random_rows(chosen, seed), 3 * capacity_rows):
        replay.add(transition(row))
        slow.add(row)
        assert replay.ready == (slow.rows > chosen.n_step)
        if replay.ready and slow.rows % 3 == 0:
            assert_legal(replay.sample(16, step=0), replay, slow)


def test_valid_starts_are_drawn_equally_often_and_truncated_starts_rarely() -> None:
    replay, slow = filled(spec(), capacity_rows=15, rows=40, truncated=0.15)
    first, stop = replay.eligible_rows
    useful = [[(row, env) for row in range(first, stop) for env in range(3) if not slow.truncated(task, env, row)] for task in range(2)]
    counts: list[dict[tuple[int, int], int]] = [dict.fromkeys(places, 0) for places in useful]
    wasted, drawn = 0, 0
    for _ in range(20):
        batch = replay.sample(500, step=0)
        for task in range(2):
            for b in range(500):
                drawn += 1
                if batch.weight[task, b]:
                    counts[task][place_of(batch, replay, task, b)] += 1
                else:
                    wasted += 1
    for count in counts:
        expected = sum(count.values()) / len(count)
        chi_square = sum((n - expected) ** 2 / expected for n in count.values())
        freedom = len(count) - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    assert any(len(places) < (stop - first) * 3 for places in useful), "the test contains no truncated start"
    assert wasted < 0.01 * drawn


def test_samples_have_no_weight_if_every_step_is_truncated() -> None:
    replay, _ = filled(spec(), 10, 10, terminated=0.0, truncated=1.0, both=0.0, life_lost=0.0)
    batch = replay.sample(8, step=0)
    assert not batch.weight.any()
    assert not batch.steps.any()


def test_tasks_are_drawn_independently() -> None:
    replay, _ = filled(spec(), 15, 15)
    index = replay.sample(64, step=0).index
    assert not torch.equal(index[0], index[1])


def test_draws_depend_only_on_the_seed() -> None:
    (one, _), (two, _), (three, _) = (filled(spec(seed=seed), 15, 15) for seed in (1, 1, 2))
    first = one.sample(32, step=0)
    assert_same(first, two.sample(32, step=0))
    assert not torch.equal(first.index, three.sample(32, step=0).index)


# -- size -----------------------------------------------------------------------------------------------------------------------


def test_atari_transition_needs_its_frame_and_six_bytes() -> None:
    assert UniformReplay.bytes_per_transition(spec(frame_shape=(1, 84, 84), dtype=torch.uint8)) == 84 * 84 + 6


def test_transitions_are_counted_to_the_capacity() -> None:
    chosen = spec()
    replay = UniformReplay(chosen, capacity=32)  # 10 rows of 3; the remainder of 2 is unused
    counts = []
    for row in islice(random_rows(chosen, 0), 12):
        replay.add(transition(row))
        counts.append(replay.transitions)
    assert counts == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 30, 30]


def test_capacity_below_one_window_is_refused() -> None:
    UniformReplay(spec(stack=4, n_step=3, num_envs=3), capacity=24)
    with pytest.raises(ValueError, match=r"replay.capacity must be at least 24 \(8 rows of env.num_envs=3\) .*, got 23"):
        UniformReplay(spec(stack=4, n_step=3, num_envs=3), capacity=23)


def test_smallest_ring_can_always_be_sampled() -> None:
    chosen = spec(stack=3, n_step=2)
    replay, slow = UniformReplay(chosen, capacity=6 * 3), SlowReplay(chosen)
    for row in islice(random_rows(chosen, 5), 40):
        replay.add(transition(row))
        slow.add(row)
        if slow.rows > 2:
            assert replay.ready
            assert_legal(replay.sample(4, step=0), replay, slow)


# -- state ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "pieces"), [(0, 1), (2, 1), (8, 3), (13, 2), (50, 1), (51, 5)])
def test_restored_replay_continues_identically(rows: int, pieces: int) -> None:
    chosen, capacity_rows = spec(stack=3), 13
    replay, slow = UniformReplay(chosen, capacity=capacity_rows * 3), SlowReplay(chosen)
    stream = random_rows(chosen, 11)
    for row in islice(stream, rows):
        replay.add(transition(row))
        slow.add(row)
    if replay.ready:
        replay.sample(8, step=0)
    twin = UniformReplay(chosen, capacity=capacity_rows * 3)
    oldest = max(0, rows - capacity_rows)
    cuts = [oldest + (rows - oldest) * piece // pieces for piece in range(pieces + 1)]
    for start, stop in pairwise(cuts):
        twin.import_rows(start, replay.export_rows(start, stop))
    twin.load_state_dict(replay.state_dict(), rows_restored=True)
    assert twin.eligible_rows == replay.eligible_rows
    assert_every_start(twin, slow)
    for row in islice(stream, 20):
        if replay.ready:
            assert_same(replay.sample(8, step=0), twin.sample(8, step=0))
        replay.add(transition(row))
        twin.add(transition(row))
        slow.add(row)
    assert_every_start(twin, slow)


def test_import_of_more_rows_than_the_capacity_keeps_the_newest() -> None:
    """Old segments may start before the oldest row of the ring: rows 0 to 7, then 8 to 19 at once, into a ring of 9."""
    big, slow = filled(spec(), capacity_rows=30, rows=20)
    small = UniformReplay(spec(), capacity=9 * 3)
    small.import_rows(0, big.export_rows(0, 8))
    small.import_rows(8, big.export_rows(8, 20))
    state = big.state_dict() | {"capacity_rows": 9, "first_row": 11}
    small.load_state_dict(state, rows_restored=True)
    assert small.eligible_rows == (12, 17)
    assert_every_start(small, slow)


@pytest.mark.parametrize("rows", [0, 5, 40])
def test_replay_restored_without_rows_starts_empty(rows: int) -> None:
    chosen = spec(stack=3)
    replay, slow = filled(chosen, 13, rows)
    fresh = UniformReplay(chosen, capacity=13 * 3)
    fresh.load_state_dict(replay.state_dict(), rows_restored=False)
    assert not fresh.ready
    assert fresh.transitions == 0
    for row in islice(random_rows(chosen, 0), rows, rows + 30):  # the stream continues
        fresh.add(transition(row))
        slow.add(row)
        first, stop = fresh.eligible_rows
        if rows:
            assert first >= rows + chosen.stack - 1, "a stack would contain a missing frame"
        assert fresh.ready == (stop > first)
        assert_every_start(fresh, slow)
        if fresh.ready:
            assert_legal(fresh.sample(4, step=0), fresh, slow)
    assert fresh.ready


def test_exported_rows_equal_the_added_rows() -> None:
    chosen = spec()
    replay = UniformReplay(chosen, capacity=30)
    rows = list(islice(random_rows(chosen, 2), 14))
    for row in rows:
        replay.add(transition(row))
    out = replay.export_rows(9, 14)  # across the end of the ring
    assert out["frames"].shape == (2, 5, 3, *chosen.frame_shape)
    for place, row in enumerate(rows[9:]):
        assert torch.equal(out["frames"][:, place], row["frame"])
        assert torch.equal(out["actions"][:, place].long(), row["action"])
        assert torch.equal(out["rewards"][:, place], row["reward"])


def test_state_of_another_capacity_is_refused() -> None:
    replay, _ = filled(spec(), 10, 3)
    with pytest.raises(ValueError, match="10 rows, this replay 11"):
        UniformReplay(spec(), capacity=33).load_state_dict(replay.state_dict(), rows_restored=True)
