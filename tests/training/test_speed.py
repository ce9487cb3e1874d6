"""Speed of a run: between ticks, and over whole rollouts of updates in bursts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mtrl_cli.training.speed import SpeedMeter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rollout_ticks(clock: Clock, rollouts: int, first_tick: int = 0) -> Iterator[tuple[int, int]]:
    """Steps and updates after each tick: 10 ticks of 4 steps and 0.1 s per rollout, then a burst of 8 updates in 3 s."""
    for tick in range(first_tick + 1, 10 * rollouts + 2):
        clock.now += 0.1
        if tick > 1 and tick % 10 == 1:
            clock.now += 3.0
        yield 4 * tick, (tick - 1) // 10 * 8


def test_speed_with_bursts_of_updates_is_constant_over_whole_rollouts() -> None:
    """40 steps and 8 updates in 4 s, wherever rows are written: several in a rollout, or one in several rollouts."""
    for interval in (4, 28, 60, 100, 140):
        clock = Clock()
        meter, found = SpeedMeter(0, 0, in_bursts=True, now=clock), []
        for step, updates in rollout_ticks(clock, 12):
            meter.tick(step, updates)
            if updates and step % interval == 0:
                found.append(meter.read())
        after_second_burst = found[120 // interval + 1 :]
        assert after_second_burst
        assert [each.steps for each in after_second_burst] == pytest.approx([10.0] * len(after_second_burst))
        assert [each.updates for each in after_second_burst] == pytest.approx([2.0] * len(after_second_burst))


def test_speed_can_be_measured_before_the_first_burst_and_then_up_to_each_burst() -> None:
    clock = Clock()
    meter = SpeedMeter(0, 0, in_bursts=True, now=clock)
    measured = [step for step, updates in rollout_ticks(clock, 3) if meter.tick(step, updates)]
    assert measured == [*range(4, 45, 4), 84, 124]


def test_speed_of_a_resumed_run_ignores_its_incomplete_rollout() -> None:
    clock = Clock()
    ticks = rollout_ticks(clock, 5, first_tick=7)
    meter = SpeedMeter(28, 0, in_bursts=True, now=clock)
    for step, updates in ticks:
        meter.tick(step, updates)
    assert meter.read().steps == pytest.approx(10.0)


def test_speed_without_bursts_is_measured_between_ticks() -> None:
    clock = Clock()
    meter, found = SpeedMeter(0, 0, in_bursts=False, now=clock), []
    for tick in range(1, 7):
        clock.now += 0.5 if tick <= 3 else 0.25
        assert meter.tick(2 * tick, tick)
        if tick % 3 == 0:
            found.append(meter.read())
    assert [each.steps for each in found] == pytest.approx([4.0, 8.0])
    assert [each.updates for each in found] == pytest.approx([2.0, 4.0])


def test_paused_time_is_excluded() -> None:
    clock = Clock()
    meter = SpeedMeter(0, 0, in_bursts=False, now=clock)
    clock.now += 1.0
    with meter.paused():
        clock.now += 50.0
        with meter.paused():
            clock.now += 50.0
    clock.now += 1.0
    meter.tick(20, 4)
    assert meter.read().steps == pytest.approx(10.0)
