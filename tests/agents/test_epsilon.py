"""Epsilon schedules of tasks."""

from __future__ import annotations

import numpy as np
import pytest

from mtrl_cli.agents.epsilon import EpsilonSchedule


@pytest.mark.parametrize(
    ("step", "expected"), [(0, [1.0, 1.0]), (25, [0.775, 0.875]), (50, [0.55, 0.75]), (100, [0.1, 0.5]), (10**9, [0.1, 0.5])]
)
def test_epsilon_decreases_linearly_to_each_tasks_final_value(step: int, expected: list[float]) -> None:
    epsilon = EpsilonSchedule(1.0, [0.1, 0.5], 100)(step)
    assert epsilon.dtype == np.float32
    assert epsilon == pytest.approx(expected, rel=1e-6)


def test_schedule_of_zero_steps_starts_at_the_final_values() -> None:
    assert EpsilonSchedule(1.0, [0.0, 0.25], 0)(0).tolist() == [0.0, 0.25]


@pytest.mark.parametrize("end", [0.0, 0.001, 0.01, 0.05, 0.1, 1.0])
def test_final_value_is_reached_exactly(end: float) -> None:
    assert EpsilonSchedule(1.0, [end], 10)(10)[0] == np.float32(end)
