"""Sum tree: draws in proportion to priorities, and sums that depend only on the leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from mtrl_cli.replay.sum_tree import SumTree

CPU = torch.device("cpu")


def tree_of(leaves: list[list[float]]) -> SumTree:
    tree = SumTree(len(leaves), len(leaves[0]), CPU)
    tree.load(torch.tensor(leaves, dtype=torch.float64))
    return tree


def just_below_one() -> float:
    return float(np.nextafter(1.0, 0.0))


def test_draws_by_hand() -> None:
    """Priorities 1, 0, 3 are the ranges [0, 1), none, [1, 4) of a sum of 4; 0, 2, 2 are none, [0, 2), [2, 4)."""
    tree = tree_of([[1, 0, 3], [0, 2, 2]])
    uniform = torch.tensor([[0.0, 0.24, 0.25, 0.99], [0.0, 0.49, 0.5, 0.99]], dtype=torch.float64)
    index, probability = tree.draw(uniform)
    assert index.tolist() == [[0, 0, 2, 2], [1, 1, 2, 2]]
    assert probability.tolist() == [[0.25, 0.25, 0.75, 0.75], [0.5, 0.5, 0.5, 0.5]]


@given(
    leaves=some.lists(some.one_of(some.just(0.0), some.floats(1e-6, 1e6)), min_size=1, max_size=40),
    uniform=some.lists(some.one_of(some.floats(0, 1, exclude_max=True), some.just(just_below_one())), min_size=1, max_size=10),
)
def test_draw_is_the_leaf_where_the_running_sum_passes_and_never_a_leaf_of_zero(leaves: list[float], uniform: list[float]) -> None:
    index, probability = tree_of([leaves]).draw(torch.tensor([uniform], dtype=torch.float64))
    total, sums = sum(leaves), np.cumsum(leaves)
    for u, i, p in zip(uniform, index[0].tolist(), probability[0].tolist(), strict=True):
        if not total:
            assert p == 0
            continue
        assert leaves[i] > 0
        assert p == pytest.approx(leaves[i] / total)
        # Where the running sum passes u, up to rounding.
        assert sums[i] - leaves[i] - 1e-9 * total <= u * total <= sums[i] + 1e-9 * total


@given(
    size=some.integers(1, 20),
    writes=some.lists(some.lists(some.tuples(some.integers(0, 19), some.floats(0, 10)), min_size=1, max_size=6), max_size=8),
)
def test_sums_depend_only_on_the_leaves_for_any_order_of_writes(size: int, writes: list[list[tuple[int, float]]]) -> None:
    tree, leaves = SumTree(2, size, CPU), [0.0] * size
    for write in writes:
        places, values = [place % size for place, _ in write], [value for _, value in write]
        tree.set(torch.tensor([places] * 2), torch.tensor([values] * 2, dtype=torch.float64))
        for place in set(places):  # of several values for one place, the largest counts
            leaves[place] = max(value for at, value in zip(places, values, strict=True) if at == place)
    assert tree.leaves.tolist() == [leaves, leaves]
    uniform = torch.linspace(0, 1, 34, dtype=torch.float64)[:-1].expand(2, -1)
    for drawn, loaded in zip(tree.draw(uniform), tree_of([leaves, leaves]).draw(uniform), strict=True):
        assert torch.equal(drawn, loaded)


def test_write_to_one_tree_does_not_change_another() -> None:
    tree = tree_of([[1, 2, 3], [4, 5, 6]])
    tree.set(torch.tensor([[0], [2]]), torch.tensor([[9.0], [0.0]], dtype=torch.float64))
    assert tree.leaves.tolist() == [[9, 2, 3], [4, 5, 0]]


def test_draws_from_an_empty_tree_have_probability_zero() -> None:
    index, probability = tree_of([[0.0] * 5]).draw(torch.tensor([[0.0, 0.5, just_below_one()]], dtype=torch.float64))
    assert probability.tolist() == [[0, 0, 0]]
    assert int(index.max()) < 5


def test_draw_rounded_up_to_one_is_a_leaf_with_a_priority() -> None:
    """(B - 1 + u) / B is 1 for u just below 1: a draw of the last of B strata may be past the end."""
    index, probability = tree_of([[1.0, 2.0, 0.0, 0.0, 0.0]]).draw(torch.ones((1, 1), dtype=torch.float64))
    assert index.tolist() == [[1]]
    assert probability.item() == pytest.approx(2 / 3)


def test_share_of_draws_is_proportional_to_the_priority() -> None:
    priorities = torch.tensor([1.0, 2.0, 0.0, 4.0, 8.0], dtype=torch.float64)
    tree = SumTree(1, 5, CPU)
    tree.load(priorities[None])
    uniform = torch.rand((1, 30_000), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(tree.draw(uniform)[0][0], minlength=5)
    assert counts[2] == 0
    assert torch.allclose(counts / 30_000, (priorities / 15).float(), atol=0.01)
