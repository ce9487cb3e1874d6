"""Intervals: due at the first step past each multiple, once, and at the end."""

from __future__ import annotations

import pytest

from mtrl_cli.training.every import Every


def due_steps(every: Every, steps: range, end: int) -> list[int]:
    found = []
    for step in steps:
        if every.due(step, finished=step >= end):
            found.append(step)
            every.last = step
    return found


def test_event_is_due_at_the_first_step_past_each_multiple_and_at_the_end() -> None:
    assert due_steps(Every(5), range(3, 25, 3), 24) == [6, 12, 15, 21, 24]


def test_interval_of_zero_is_due_at_the_end_only() -> None:
    assert due_steps(Every(0), range(3, 25, 3), 24) == [24]


@pytest.mark.parametrize("last", [0, -1])
def test_event_is_not_due_before_the_first_multiple(last: int) -> None:
    assert [step for step in range(6) if Every(5, last).due(step)] == [5]


def test_event_is_never_due_twice_at_one_step() -> None:
    assert not Every(5, last=24).due(24, finished=True)


def test_restored_event_continues_its_interval() -> None:
    whole = due_steps(Every(7), range(4, 100, 4), 96)
    every, found = Every(7), []
    for step in range(4, 100, 4):
        every = Every(7, every.last)
        found += due_steps(every, range(step, step + 1), 96)
    assert found == whole
