"""Report sections on transfer, from constructed runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.reports import transfer
from mtrl_cli.reports.elements import Picture, Section, Table
from mtrl_cli.reports.grouping import grouped
from mtrl_cli.reports.run_data import Evaluation, FinalTest, RunData, TaskResult

CONFIG = {"eval.episodes": 4, "eval.test_episodes": 5, "network.sharing._target_": "mtrl_cli.networks.sharing.HardSharing"}


def run(source: str | None, values: Sequence[float], final: float, *, seed: int = 0, scored: bool = True, cut: int = 0) -> RunData:
    """Return a completed run on one task with evaluations at steps 0, 100, … and returns that are ten times its scores."""
    evaluations = tuple(
        Evaluation(100 * index, float(index), {"a": value}, {"a": value / 10} if scored else {}) for index, value in enumerate(values)
    )
    return RunData(
        path=Path(f"/runs/{source is None}/{seed}"),
        status="completed",
        config={"seed": seed, "init_from": source, **CONFIG},
        env="pack",
        tasks=("a",),
        seed=seed,
        steps_per_task=200,
        step=200,
        evaluations=evaluations,
        test=FinalTest(step=200, episodes=5, tasks={"a": TaskResult(mean=final, cut=cut)}),
        final_returns={"a": final},
        final_scores={"a": final / 10} if scored else {},
    )


def section(*runs: RunData) -> Section:
    (found,) = transfer.sections(grouped(runs))
    return found


def table(found: Section) -> Table:
    return next(part for part in found.parts if isinstance(part, Table))


def values(found: Section) -> list[Any]:
    name, *cells = table(found).rows[0]
    return [name, *(None if cell is None else pytest.approx(cell.value) for cell in cells)]


SOURCE = "/runs/source/checkpoints/7"


def test_table_calculated_by_hand() -> None:
    found = section(run(SOURCE, [4.0, 6.0, 9.0], 8.0), run(None, [0.0, 4.0, 8.0], 6.0))
    # Areas 6.25 and 4; 8 is reached two thirds of the way from 6 to 9.
    assert values(found) == ["a", 0.4, 0.4, 500 / 3, 6.25 / 4, 0.8, 0.6, 0.2]
    assert len(table(found).rows) == 1, "no mean over a single task"
    assert "4 validation episodes per task and evaluation, 5 test episodes." in table(found).notes
    assert any("fine-tuned from source: /runs/source/checkpoints/7" in line for line in found.lines)
    assert any("One seed" in line for line in found.lines)


def test_intervals_are_over_seeds_that_have_both_runs() -> None:
    tuned = [run(SOURCE, [4.0, 6.0, 9.0], 8.0, seed=seed) for seed in (0, 1, 3)]
    scratch = [run(None, [0.0, 4.0, 8.0 - seed], 6.0, seed=seed) for seed in (0, 1, 2)]
    found = section(*tuned, *scratch)
    cells = dict(zip(table(found).header, table(found).rows[0], strict=True))
    assert cells["difference"].value == pytest.approx(0.2)
    # Seeds 0 and 1: scratch ends at 8 or 7, which the fine-tuned run reaches at 500 / 3 or 400 / 3.
    assert (cells["steps to scratch's final"].low, cells["steps to scratch's final"].high) == (
        pytest.approx(400 / 3),
        pytest.approx(500 / 3),
    )


def test_tasks_without_reference_are_compared_by_returns() -> None:
    found = section(
        run(SOURCE, [-90.0, -60.0, -60.0], 8.0, scored=False),
        run(None, [-100.0, -80.0, -40.0], 6.0, scored=False),
    )
    # Above the untrained network's -100: areas 32.5 and 25.
    assert values(found) == ["a (return)", -90.0, 10.0, math.inf, 32.5 / 25, 8.0, 6.0, 2.0]
    assert any("No reference scores for a" in note for note in table(found).notes)
    assert not any("0 is random play" in note for note in table(found).notes)


def test_scratch_that_learns_nothing_has_no_area_ratio() -> None:
    found = section(run(SOURCE, [1.0, 2.0, 3.0], 3.0), run(None, [-1.0, -1.0, -1.0], -1.0))
    assert values(found)[1:5] == [pytest.approx(0.1), pytest.approx(0.2), 0.0, None]
    assert any("No area ratio" in note and note.endswith(": a.") for note in table(found).notes)


def test_runs_without_an_evaluation_at_the_start_have_no_zero_shot_score() -> None:
    runs = [run(SOURCE, [4.0, 6.0, 9.0], 8.0), run(None, [0.0, 4.0, 8.0], 6.0)]
    found = section(*(replace(each, evaluations=each.evaluations[1:]) for each in runs))
    assert values(found)[1:3] == [None, None]
    assert any("eval.at_start=true" in note for note in table(found).notes)


def test_cut_episodes_are_counted() -> None:
    found = section(run(SOURCE, [4.0, 6.0, 9.0], 8.0, cut=3), run(None, [0.0, 4.0, 8.0], 6.0))
    assert any(note.startswith("3 test episodes were cut") for note in table(found).notes)


def test_runs_without_a_counterpart_are_not_compared() -> None:
    assert transfer.sections(grouped([run(SOURCE, [4.0, 6.0], 8.0)])) == []
    assert transfer.sections(grouped([run(None, [4.0, 6.0], 8.0)])) == []
    found = section(run(SOURCE, [4.0, 6.0], 8.0, seed=1), run(None, [0.0, 4.0], 6.0, seed=0))
    assert found.parts == []
    assert any("no completed run has a seed" in line for line in found.lines)


def test_picture_has_a_line_with_a_band_and_a_star_for_each_kind() -> None:
    pytest.importorskip("matplotlib")
    tuned = [run(SOURCE, [4.0, 6.0, 9.0 + seed], 8.0, seed=seed) for seed in (0, 1)]
    scratch = [run(None, [0.0, 4.0, 8.0], 6.0, seed=seed) for seed in (0, 1)]
    found = section(*tuned, *scratch)
    picture = next(part for part in found.parts if isinstance(part, Picture))
    assert (picture.name, table(found).name) == ("transfer", "transfer")
    (axes,) = picture.draw().axes
    drawn = [(list(line.get_xdata()), [pytest.approx(y) for y in line.get_ydata()]) for line in axes.get_lines()]
    assert ([0, 100, 200], [0.4, 0.6, 0.95]) in drawn
    assert ([200], [0.8]) in drawn
    assert ([0, 100, 200], [0.0, 0.4, 0.8]) in drawn
    assert ([200], [0.6]) in drawn
    assert len(axes.collections) == 2
