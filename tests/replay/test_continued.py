"""A replay continued from another run: no sample contains steps of both runs, and priorities are kept."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from mtrl_cli.replay.buffers import PrioritizedReplay, Replay, ReplaySpec, UniformReplay
from tests.helpers.replay_reference import Row, SlowReplay, assert_every_start, random_rows, spec, transition


def filled(kind: type[Replay], chosen: ReplaySpec, capacity_rows: int, rows: int) -> tuple[Replay, list[Row]]:
    replay = kind(chosen, capacity=capacity_rows * chosen.num_envs)  # type: ignore[call-arg]
    added = list(islice(random_rows(chosen, 1), rows))
    for number, row in enumerate(added):
        replay.add(transition(row))
        if number % 3 == 2 and replay.ready:
            batch = replay.sample(5, 0)
            replay.update_priorities(batch, torch.rand(batch.action.shape, generator=torch.Generator().manual_seed(number)))
    return replay, added


def continued(kind: type[Replay], source: Replay, chosen: ReplaySpec, capacity_rows: int) -> Replay:
    replay = kind(chosen, capacity=capacity_rows * chosen.num_envs)  # type: ignore[call-arg]
    oldest = max(0, source.rows - source.capacity_rows)
    for start in range(oldest, source.rows, 4):
        stop = min(start + 4, source.rows)
        replay.import_rows(start, source.export_rows(start, stop))
    replay.continue_from(source.state_dict())
    return replay


def fresh_rows(chosen: ReplaySpec, count: int) -> list[Row]:
    """Rows of another run, which starts with new episodes."""
    rows = list(islice(random_rows(chosen, 2), count))
    for row in rows:
        row["frame"] = row["frame"] + 100_000
    return rows


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("n_step", [1, 4])
@pytest.mark.parametrize(("there", "here"), [(12, 12), (12, 9), (12, 20), (30, 15)])
def test_no_window_and_no_stack_contains_steps_of_both_runs(stack: int, n_step: int, there: int, here: int) -> None:
    """Against episodes in lists. The last episodes of the source count as truncated. Few or many rows follow them."""
    chosen = spec(stack=stack, n_step=n_step)
    source, old = filled(UniformReplay, chosen, there, 25)
    replay, slow = continued(UniformReplay, source, chosen, here), SlowReplay(chosen)
    old[-1]["truncated"] = torch.ones_like(old[-1]["truncated"])
    for row in old:
        slow.add(row)
    assert replay.transitions == min(there, here, 25) * chosen.num_envs
    assert_every_start(replay, slow)
    for number, row in enumerate(fresh_rows(chosen, 18)):
        replay.add(transition(row))
        slow.add(row)
        if number < 7 or number == 17:
            assert_every_start(replay, slow)


@pytest.mark.parametrize(("there", "here"), [(3, 3), (4, 1), (1, 4)])
@pytest.mark.parametrize(("rows_there", "rows_here"), [(12, 12), (12, 17), (17, 12)])
def test_known_priorities_are_kept_and_other_rows_count_as_new(there: int, here: int, rows_there: int, rows_here: int) -> None:
    """With windows shorter than in the source more rows are eligible, with longer windows fewer."""
    chosen = spec(n_step=here)
    source, _ = filled(PrioritizedReplay, spec(n_step=there), rows_there, 30)
    assert isinstance(source, PrioritizedReplay)
    replay = continued(PrioritizedReplay, source, chosen, rows_here)
    known = source.state_dict()["tree"].unflatten(1, (rows_there, 3))
    found = replay.state_dict()["tree"].unflatten(1, (rows_here, 3))
    flags = replay.export_rows(0, rows_here)["flags"]
    first, stop = replay.eligible_rows
    assert (first, stop) == (30 - min(rows_there, rows_here) + 1, 30 - here)
    expected = torch.zeros_like(found)
    for row in range(first, stop):
        of_row, largest = known[:, row % rows_there], source.state_dict()["largest"].expand(2, 3)
        is_useful = (flags[:, row % rows_here] & 2) == 0
        expected[:, row % rows_here] = torch.where(of_row > 0, of_row, largest) * is_useful
    assert torch.equal(found, expected)
    assert torch.equal(replay.state_dict()["largest"], source.state_dict()["largest"])


def test_last_row_of_the_source_is_drawn_only_where_it_terminated() -> None:
    chosen = spec(n_step=2)
    source, _ = filled(UniformReplay, chosen, 12, 25)
    replay = continued(PrioritizedReplay, source, chosen, 20)
    for row in fresh_rows(chosen, 6):
        replay.add(transition(row))
    seam = replay.state_dict()["tree"].unflatten(1, (20, 3))[:, 24 % 20]
    terminated = (replay.export_rows(24, 25)["flags"][:, 0] & 1) != 0
    assert torch.equal(seam > 0, terminated)


def test_replay_continued_from_an_empty_replay_is_empty() -> None:
    """A rank may have saved no rows."""
    chosen = spec()
    replay = continued(UniformReplay, UniformReplay(chosen, capacity=36), chosen, 12)
    assert (replay.rows, replay.ready) == (0, False)
