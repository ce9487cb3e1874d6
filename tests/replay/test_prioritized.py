"""Prioritised replay: priorities, frequencies of draws and importance weights (Schaul et al. 2016)."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from mtrl_cli.replay.buffers import Batch, PrioritizedReplay, ReplaySpec
from tests.helpers.replay_reference import SlowReplay, assert_every_start, assert_legal, place_of, random_rows, spec, transition

ENDLESS = {"terminated": 0.0, "truncated": 0.0, "both": 0.0, "life_lost": 0.0}


def prioritized(
    chosen: ReplaySpec, capacity_rows: int, rows: int = 0, alpha: float = 0.6, beta: float = 0.4, **ends: float
) -> PrioritizedReplay:
    replay = PrioritizedReplay(chosen, capacity=capacity_rows * chosen.num_envs, alpha=alpha, beta=beta)
    for row in islice(random_rows(chosen, 0, **ends), rows):
        replay.add(transition(row))
    return replay


def at(replay: PrioritizedReplay, places: list[tuple[int, int]]) -> Batch:
    """The batch that starts at the same rows and environments in each task."""
    row, env = (torch.tensor(values).expand(replay.spec.num_tasks, -1) for values in zip(*places, strict=True))
    return replay.gather(row, env, torch.ones(row.shape))


def leaves(replay: PrioritizedReplay) -> torch.Tensor:
    """Priorities by slot, `[K, T, N]`."""
    return replay.state_dict()["tree"].unflatten(1, (replay.capacity_rows, replay.spec.num_envs))


@pytest.mark.parametrize("seed", range(6))
def test_only_eligible_rows_have_priorities(seed: int) -> None:
    """Against a dictionary of priorities, with random rows and random errors, over two rounds of the ring."""
    chosen = spec(stack=1 + seed % 3, n_step=1 + seed % 4)
    replay = PrioritizedReplay(chosen, capacity=12 * 3, alpha=0.5, beta=0.4)
    slow = SlowReplay(chosen)
    kept: dict[tuple[int, int, int], float] = {}
    largest = [1.0, 1.0]
    errors = torch.Generator().manual_seed(seed)
    for row in islice(random_rows(chosen, seed), 30):
        replay.add(transition(row))
        slow.add(row)
        first, stop = replay.eligible_rows
        kept = {place: value for place, value in kept.items() if place[1] >= first}
        if stop > first:  # one more row has a successor: it gets the largest priority so far
            for task in range(2):
                kept |= {(task, stop - 1, env): largest[task] for env in range(3) if not slow.truncated(task, env, stop - 1)}
        expected = torch.zeros(2, 12, 3, dtype=torch.float64)
        for (task, at_row, env), priority in kept.items():
            expected[task, at_row % 12, env] = priority
        assert torch.allclose(leaves(replay), expected)
        if kept and slow.rows % 2:
            batch = replay.sample(5, step=0)
            error = torch.rand((2, 5), generator=errors) * 4
            replay.update_priorities(batch, error)
            newest: dict[tuple[int, int, int], float] = {}
            for task in range(2):
                for b in range(5):
                    place = (task, *place_of(batch, replay, task, b))
                    newest[place] = max(newest.get(place, 0.0), (float(error[task, b]) + 1e-6) ** 0.5)
                    largest[task] = max(largest[task], newest[place])
            kept |= newest


@pytest.mark.parametrize("seed", range(6))
def test_draws_are_eligible_and_valid(seed: int) -> None:
    chosen = spec(stack=1 + seed % 4, n_step=1 + seed % 3)
    replay, slow = PrioritizedReplay(chosen, capacity=12 * 3), SlowReplay(chosen)
    for row in islice(random_rows(chosen, seed, truncated=0.3), 40):
        replay.add(transition(row))
        slow.add(row)
        if slow.rows > 6 and slow.rows % 3 == 0:
            batch = replay.sample(8, step=0)
            assert (batch.weight > 0).all()
            assert_legal(batch, replay, slow)
            replay.update_priorities(batch, torch.rand(2, 8))


def test_share_of_draws_is_proportional_to_the_priority() -> None:
    """Errors 0, 1, 2, ... at the ten starts of each environment; with alpha 0.5 priorities are the square roots of the errors."""
    replay = prioritized(spec(num_envs=1, stack=1, n_step=1), 11, 11, alpha=0.5, **ENDLESS)
    error = torch.arange(10.0).expand(2, -1)
    replay.update_priorities(at(replay, [(row, 0) for row in range(10)]), error)
    counts = torch.zeros(2, 10)
    for _ in range(400):
        index = replay.sample(50, step=0).index
        for task in range(2):
            counts[task] += torch.bincount(index[task], minlength=10)
    share = (error + 1e-6).sqrt() / (error + 1e-6).sqrt().sum(1, keepdim=True)
    chi_square = ((counts - 20_000 * share) ** 2 / (20_000 * share)).sum(1)
    # Stratified draws have a smaller variance than independent draws.
    assert (chi_square < 9 + 5 * math.sqrt(18)).all()


@pytest.mark.parametrize(("step", "exponent"), [(0, 0.4), (500, 0.7), (1000, 1.0), (2000, 1.0)])
def test_importance_weights_by_hand(step: int, exponent: float) -> None:
    """w = (N P)^-beta, divided by the largest in the batch. As P is proportional to p, w = (p_min / p)^beta.

    beta rises from 0.4 to 1 in 1000 steps.
    alpha 1 and errors 1, 3, 3, 9 give priorities 1, 3, 3, 9. The sum is 16, so a batch of 160 has 10 samples per unit.
    """
    replay = prioritized(spec(num_tasks=1, num_envs=1, stack=1, n_step=1), 5, 5, alpha=1.0, **ENDLESS)
    replay.update_priorities(at(replay, [(row, 0) for row in range(4)]), torch.tensor([[1.0, 3.0, 3.0, 9.0]]))
    batch = replay.sample(160, step=step)
    counts = torch.bincount(batch.index[0], minlength=4)
    assert (counts - torch.tensor([10, 30, 30, 90])).abs().max() <= 1
    expected = torch.tensor([1.0, 3.0**-exponent, 3.0**-exponent, 9.0**-exponent])
    assert torch.allclose(batch.weight[0], expected[batch.index[0]], atol=1e-4)


def test_weighted_draws_estimate_the_uniform_mean() -> None:
    """With beta 1 the weights correct the bias of the draws (Schaul et al. 2016, section 3.4)."""
    replay = prioritized(spec(num_tasks=1, num_envs=1, stack=1, n_step=1), 9, 9, alpha=1.0, beta=1.0, **ENDLESS)
    replay.update_priorities(at(replay, [(row, 0) for row in range(8)]), torch.arange(1.0, 9.0)[None])
    value = torch.tensor([5.0, 0.0, 2.0, 7.0, 1.0, 1.0, 3.0, 9.0])
    batch = replay.sample(36_000, step=0)
    weight = batch.weight[0] / batch.weight[0].mean()
    assert float((weight * value[batch.index[0]]).mean()) == pytest.approx(float(value.mean()), rel=0.01)


def test_alpha_zero_is_uniform() -> None:
    replay = prioritized(spec(num_tasks=1, num_envs=1, stack=1, n_step=1), 9, 9, alpha=0.0, **ENDLESS)
    replay.update_priorities(at(replay, [(row, 0) for row in range(8)]), torch.arange(8.0)[None])
    batch = replay.sample(800, step=0)
    assert torch.bincount(batch.index[0]).tolist() == [100] * 8
    assert torch.equal(batch.weight, torch.ones(1, 800))


def test_each_task_has_separate_priorities() -> None:
    replay = prioritized(spec(num_envs=1, stack=1, n_step=1), 6, 6, **ENDLESS)
    before = leaves(replay)
    batch = at(replay, [(2, 0)])
    replay.update_priorities(batch, torch.tensor([[1.0], [50.0]]))
    after = leaves(replay)
    assert torch.allclose(after[0], before[0])
    assert after[1, 2, 0] == pytest.approx(50**0.6)


def test_truncated_start_never_gets_a_priority() -> None:
    chosen = spec(num_tasks=1, num_envs=1, stack=1, n_step=1)
    replay = prioritized(chosen, 8, 6, terminated=0.0, truncated=1.0, both=0.0, life_lost=0.0)
    batch = replay.sample(4, step=0)
    assert not batch.weight.any()
    replay.update_priorities(batch, torch.ones(1, 4))
    assert not leaves(replay).any()


def test_restored_replay_continues_identically() -> None:
    chosen = spec()
    replay, stream = PrioritizedReplay(chosen, capacity=12 * 3), random_rows(chosen, 4)

    def turn(each: PrioritizedReplay, row: dict[str, torch.Tensor], error: torch.Tensor) -> Batch:
        each.add(transition(row))
        batch = each.sample(6, step=300)
        each.update_priorities(batch, error)
        return batch

    for row in islice(stream, 20):
        replay.add(transition(row))
    turn(replay, next(stream), torch.full((2, 6), 3.0))
    twin = PrioritizedReplay(chosen, capacity=12 * 3)
    twin.import_rows(9, replay.export_rows(9, 21))
    twin.load_state_dict(replay.state_dict(), rows_restored=True)
    for row in islice(stream, 20):
        error = torch.rand(2, 6)
        one, two = turn(replay, row, error), turn(twin, row, error)
        for name, value in vars(one).items():
            assert torch.equal(value, getattr(two, name)), name
    assert torch.equal(leaves(replay), leaves(twin))


def test_replay_restored_without_rows_has_no_priorities() -> None:
    chosen = spec(stack=3)
    replay, slow, stream = PrioritizedReplay(chosen, capacity=12 * 3), SlowReplay(chosen), random_rows(chosen, 4)
    for row in islice(stream, 20):
        replay.add(transition(row))
        slow.add(row)
    fresh = PrioritizedReplay(chosen, capacity=12 * 3)
    fresh.load_state_dict(replay.state_dict(), rows_restored=False)
    assert not fresh.ready
    assert not leaves(fresh).any()
    for row in islice(stream, 25):
        fresh.add(transition(row))
        slow.add(row)
        assert_every_start(fresh, slow)
        assert (leaves(fresh) > 0).any() == fresh.ready
        if fresh.ready:
            assert_legal(fresh.sample(4, step=0), fresh, slow)


def test_memory_of_all_tensors_equals_bytes_per_transition() -> None:
    some = spec(frame_shape=(50,), stack=1)
    replay = PrioritizedReplay(some, capacity=256 * some.num_envs)  # no unused leaves
    held = replay.capacity_rows * some.num_envs * some.num_tasks
    tree_per_transition = 2 * 8 * 2 ** math.ceil(math.log2(256 * some.num_envs)) / (256 * some.num_envs)
    expected = PrioritizedReplay.bytes_per_transition(some) - 32 + tree_per_transition
    assert replay.nbytes / held == pytest.approx(expected, rel=0.001)
