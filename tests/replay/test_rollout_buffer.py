"""Rollouts: samples against whole episodes in lists, over several rounds of the ring, and exact resume."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from mtrl_cli.agents.targets import lambda_returns
from mtrl_cli.replay.buffers import ReplaySpec
from mtrl_cli.replay.rollout_buffer import Rollouts
from mtrl_cli.replay.types import RolloutBatch
from tests.helpers.replay_reference import Row, SlowReplay, random_rows, spec, transition

GAMMA, TRACE_DECAY = 0.9, 0.6
Place = tuple[int, int, int]
"""Task, row and environment of a sample."""


def rows_of(chosen: ReplaySpec, seed: int = 0) -> list[Row]:
    """Rows with values, enough for several rounds of the ring."""
    values = torch.Generator().manual_seed(seed)
    count = 6 * chosen.rollout_length + 8
    return [
        row | {"value": torch.randn((chosen.num_tasks, chosen.num_envs), generator=values)}
        for row in islice(random_rows(chosen, seed), count)
    ]


def open_next(rollouts: Rollouts) -> None:
    rollout = rollouts.next_rollout()
    rollouts.open_next(lambda_returns(rollout.rewards, rollout.values, rollout.terminated, rollout.truncated, GAMMA, TRACE_DECAY))


def place_of(batch: RolloutBatch, rollouts: Rollouts, task: int, b: int) -> Place:
    slot, env = divmod(int(batch.index[task, b]), rollouts.spec.num_envs)
    first, stop = rollouts.eligible_rows
    return task, next(row for row in range(first, stop) if row % rollouts.capacity_rows == slot), env


def slow_returns(rows: list[Row], first: int, length: int, task: int, env: int) -> list[float]:
    """Returns of the steps of a rollout by the recursion, from the last step to the first."""

    def at(name: str, row: int) -> float:
        return float(rows[row][name][task, env])

    following, found = at("value", first + length), []
    for row in reversed(range(first, first + length)):
        if at("terminated", row):
            following = at("reward", row)
        elif at("truncated", row):
            following = at("value", row)
        else:
            following = at("reward", row) + GAMMA * ((1 - TRACE_DECAY) * at("value", row + 1) + TRACE_DECAY * following)
        found.append(following)
    return found[::-1]


def assert_epoch(rollouts: Rollouts, slow: SlowReplay, rows: list[Row], batches: list[RolloutBatch]) -> None:
    """Assert that the batches contain every step of the open rollout once, unchanged."""
    (first, stop), chosen = rollouts.eligible_rows, rollouts.spec
    drawn: list[Place] = []
    for batch in batches:
        for task in range(chosen.num_tasks):
            for b in range(batch.action.shape[1]):
                _, row, env = place = place_of(batch, rollouts, task, b)
                drawn.append(place)
                expected = slow.sample(task, env, row)
                assert torch.equal(batch.observation[task, b], expected.observation)
                assert batch.action[task, b] == expected.action
                returned = slow_returns(rows, first, chosen.rollout_length, task, env)[row - first]
                assert float(batch.returns[task, b]) == pytest.approx(returned, abs=1e-5)
                assert batch.weight[task, b] == (0.0 if slow.truncated(task, env, row) else 1.0)
    everything = [(task, row, env) for task in range(chosen.num_tasks) for row in range(first, stop) for env in range(chosen.num_envs)]
    assert sorted(drawn) == everything


@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "during the next rollout"])
@pytest.mark.parametrize(("num_tasks", "num_envs", "stack", "length"), [(1, 1, 1, 1), (2, 3, 2, 4), (1, 2, 4, 3), (3, 2, 3, 8)])
def test_every_step_is_drawn_once_per_epoch_unchanged(num_tasks: int, num_envs: int, stack: int, length: int, ahead: bool) -> None:
    """The epochs of a rollout are drawn when it is complete, or at the last row before the next rollout is complete."""
    chosen = spec(num_tasks=num_tasks, num_envs=num_envs, stack=stack, rollout_length=length)
    rollouts, slow, rows = Rollouts(chosen), SlowReplay(chosen), rows_of(chosen)
    orders, opened = [], 0
    for number, row in enumerate(rows, start=1):
        rollouts.add(transition(row))
        slow.add(row)
        assert rollouts.ready == (number > length)
        if number % length == 1 % length and number > length + ahead * length:
            open_next(rollouts)
            opened += 1
            assert rollouts.eligible_rows == ((opened - 1) * length, opened * length)
            for _ in range(2):
                batches = [rollouts.sample(num_envs, 0) for _ in range(length)]
                assert_epoch(rollouts, slow, rows, batches)
                orders.append([batch.index.tolist() for batch in batches])
    assert opened >= 4
    assert rollouts.rows > 2 * rollouts.capacity_rows, "the ring was overwritten at least twice"
    if length * num_envs > 6:
        assert all(order != orders[0] for order in orders[1:]), "every epoch has another order"
        assert orders[0][0][0] != orders[0][0][-1] or num_tasks == 1, "every task has another order"


def test_nothing_can_be_drawn_before_a_rollout_is_complete() -> None:
    chosen = spec(rollout_length=4)
    rollouts, rows = Rollouts(chosen), rows_of(chosen)
    for row in rows[:4]:
        rollouts.add(transition(row))
        assert not rollouts.ready
        assert rollouts.eligible_rows[0] == rollouts.eligible_rows[1]
    with pytest.raises(AssertionError, match="not complete"):
        rollouts.next_rollout()
    with pytest.raises(AssertionError, match="no rollout is open"):
        rollouts.sample(3, 0)
    rollouts.add(transition(rows[4]))
    assert rollouts.ready
    assert rollouts.eligible_rows[0] == rollouts.eligible_rows[1]
    open_next(rollouts)
    assert rollouts.eligible_rows == (0, 4)


def test_draw_from_an_overwritten_rollout_is_refused() -> None:
    chosen = spec(rollout_length=4)
    rollouts, rows = Rollouts(chosen), rows_of(chosen)
    for row in rows[:5]:
        rollouts.add(transition(row))
    open_next(rollouts)
    for row in rows[5:]:
        rollouts.add(transition(row))
    with pytest.raises(AssertionError, match="overwritten"):
        rollouts.sample(3, 0)


def twin_of(rollouts: Rollouts, with_rows: bool = True) -> Rollouts:
    """A copy, restored from rows and state."""
    twin = Rollouts(rollouts.spec)
    if with_rows:
        oldest = max(0, rollouts.rows - rollouts.capacity_rows)
        twin.import_rows(oldest, rollouts.export_rows(oldest, rollouts.rows))
    twin.load_state_dict(rollouts.state_dict(), rows_restored=with_rows)
    return twin


@pytest.mark.parametrize("drawn", [0, 1, 5, 8])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_restored_rollouts_continue_identically_from_any_draw(drawn: int, more: int) -> None:
    chosen = spec(rollout_length=4)
    rollouts, rows = Rollouts(chosen), rows_of(chosen)
    for row in rows[:13]:
        rollouts.add(transition(row))
        if rollouts.rows % 4 == 1 and rollouts.ready:
            open_next(rollouts)
    for _ in range(drawn):
        rollouts.sample(3, 0)
    for row in rows[13 : 13 + more]:
        rollouts.add(transition(row))
    twin = twin_of(rollouts)
    for each in (rollouts, twin):
        for row in rows[13 + more : 17]:
            each.add(transition(row))
    for _ in range(9):
        ours, theirs = rollouts.sample(3, 0), twin.sample(3, 0)
        for name, value in vars(ours).items():
            assert torch.equal(value, getattr(theirs, name)), name
    for each in (rollouts, twin):
        open_next(each)
    assert torch.equal(rollouts.sample(3, 0).returns, twin.sample(3, 0).returns)


def test_rollout_after_a_restore_without_rows_excludes_steps_with_an_incomplete_stack() -> None:
    chosen = spec(rollout_length=4, stack=3)
    rollouts, slow, rows = Rollouts(chosen), SlowReplay(chosen), rows_of(chosen)
    for row in rows[:7]:
        rollouts.add(transition(row))
        slow.add(row)
    again = twin_of(rollouts, with_rows=False)
    for row in rows[7:12]:
        assert not again.ready
        again.add(transition(row))
        slow.add(row)
    assert again.ready
    open_next(again)
    assert again.eligible_rows == (7, 11)
    batch = again.sample(12, 0)
    for task in range(2):
        for b in range(12):
            _, row_b, env = place_of(batch, again, task, b)
            is_valid = row_b >= 9 and not slow.truncated(task, env, row_b)
            assert batch.weight[task, b] == float(is_valid)
            if is_valid:
                assert torch.equal(batch.observation[task, b], slow.sample(task, env, row_b).observation)


def test_memory_of_all_tensors_equals_bytes_per_transition() -> None:
    chosen = spec(rollout_length=4, dtype=torch.uint8)
    rollouts, capacity = Rollouts(chosen), Rollouts.fixed_capacity(chosen) * chosen.num_tasks
    in_order = 12 * chosen.rollout_length * chosen.num_envs * chosen.num_tasks  # a return and a position for each step of one rollout
    assert rollouts.nbytes == (Rollouts.bytes_per_transition(chosen) - 12) * capacity + in_order
    assert rollouts.nbytes <= Rollouts.bytes_per_transition(chosen) * capacity
