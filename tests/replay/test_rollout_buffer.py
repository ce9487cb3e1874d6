"""Rollouts: what is drawn and how often against whole episodes in lists, round the ring, and their state."""

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
"""Of a sample: task, row, environment."""


def rows_of(chosen: ReplaySpec, seed: int = 0) -> list[Row]:
    """Rows with values, enough for some rounds of the ring."""
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
    """Returns of the steps of a rollout, by the recursion itself, from the last to the first."""

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
    """The batches hold every step of the open rollout once, and each as it was."""
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


@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "while the next is played"])
@pytest.mark.parametrize(("num_tasks", "num_envs", "stack", "length"), [(1, 1, 1, 1), (2, 3, 2, 4), (1, 2, 4, 3), (3, 2, 3, 8)])
def test_every_step_is_drawn_once_an_epoch_as_it_was(num_tasks: int, num_envs: int, stack: int, length: int, ahead: bool) -> None:
    """Either each rollout's epochs are drawn when it is complete, or when the last row has come before the next one is."""
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
    assert rollouts.rows > 2 * rollouts.capacity_rows, "the test goes round the ring"
    if length * num_envs > 6:
        assert all(order != orders[0] for order in orders[1:]), "every epoch has an order of its own"
        assert orders[0][0][0] != orders[0][0][-1] or num_tasks == 1, "and every task"


def test_before_a_rollout_is_complete_there_is_nothing_to_draw() -> None:
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


def test_what_was_overwritten_is_not_drawn_unawares() -> None:
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
    """Another one, brought to the same state by rows and state."""
    twin = Rollouts(rollouts.spec)
    if with_rows:
        oldest = max(0, rollouts.rows - rollouts.capacity_rows)
        twin.import_rows(oldest, rollouts.export_rows(oldest, rollouts.rows))
    twin.load_state_dict(rollouts.state_dict(), rows_restored=with_rows)
    return twin


@pytest.mark.parametrize("drawn", [0, 1, 5, 8])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_it_goes_on_identically_from_its_state_at_any_draw(drawn: int, more: int) -> None:
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


def test_without_its_rows_a_new_rollout_begins_whose_first_steps_have_no_whole_stack() -> None:
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
            useful = row_b >= 9 and not slow.truncated(task, env, row_b)
            assert batch.weight[task, b] == float(useful)
            if useful:
                assert torch.equal(batch.observation[task, b], slow.sample(task, env, row_b).observation)


def test_it_takes_the_memory_that_it_says() -> None:
    chosen = spec(rollout_length=4, dtype=torch.uint8)
    rollouts, room = Rollouts(chosen), Rollouts.fixed_capacity(chosen) * chosen.num_tasks
    in_order = 12 * chosen.rollout_length * chosen.num_envs * chosen.num_tasks  # a return and a place for each step of one rollout
    assert rollouts.nbytes == (Rollouts.bytes_per_transition(chosen) - 12) * room + in_order
    assert rollouts.nbytes <= Rollouts.bytes_per_transition(chosen) * room


def test_an_agent_without_rollouts_is_refused() -> None:
    with pytest.raises(ValueError, match="agent=pqn"):
        Rollouts(spec())
