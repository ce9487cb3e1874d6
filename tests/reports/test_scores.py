"""Report sections on scores, from constructed runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.reports import html
from mtrl_cli.reports import scores as report_scores
from mtrl_cli.reports.comparison import benchmarks
from mtrl_cli.reports.elements import Picture, Section, Table
from mtrl_cli.reports.run_data import Evaluation, FinalTest, RunData, RunGroup
from mtrl_cli.stats import scores as score_stats
from mtrl_cli.stats.bootstrap import Estimate

TASKS = ("pong", "breakout")
TEST = FinalTest(step=100, episodes=1, tasks={})


def run(seed: int, finals: Sequence[float], *, scored: bool = True, **more: Any) -> RunData:
    """Return a completed run with two evaluations and these final scores."""
    returns = {task: 10 * value for task, value in zip(TASKS, finals, strict=True)}
    scores = dict(zip(TASKS, finals, strict=True)) if scored else {}
    half = Evaluation(50, 5.0 + seed, {task: each / 2 for task, each in returns.items()}, {task: each / 2 for task, each in scores.items()})
    known = {"path": Path(f"/runs/{seed}"), "status": "completed", "config": {"seed": seed}, "test": TEST}
    known |= {"env": "pack", "tasks": TASKS, "steps_per_task": 100, "step": 100, "final_returns": returns, "final_scores": scores}
    return RunData(seed=seed, evaluations=(half, Evaluation(100, 10.0 + seed, returns, scores)), **(known | more))


def group(label: str, *runs: RunData) -> RunGroup:
    return RunGroup(label, {"network/sharing": label}, runs)


def two_groups() -> list[RunGroup]:
    return [
        group("worse", run(0, [0.0, 0.2]), run(1, [0.2, 0.4])),
        group("better", run(0, [0.8, 1.0]), run(1, [1.0, 1.4]), run(2, [0.9, 0.9])),
    ]


def sections_of(*groups: RunGroup) -> list[Section]:
    return report_scores.sections(benchmarks(groups))


def part(sections: Sequence[Section], name: str) -> Any:
    return next(part for section in sections for part in section.parts if part.name == name)


def words(sections: Sequence[Section]) -> str:
    return "\n".join(line for section in sections for line in section.lines)


def test_best_configuration_comes_first_with_intervals() -> None:
    table = part(sections_of(*two_groups()), "scores_over_tasks")
    assert [(row[0], row[1]) for row in table.rows] == [("better", 3), ("worse", 2)]
    assert list(table.header) == ["configuration", "seeds", "IQM", "mean", "median", "optimality gap"]
    better = dict(zip(table.header, table.rows[0], strict=True))
    assert better["mean"].value == pytest.approx(1.0)
    assert better["optimality gap"].value == pytest.approx((0.2 + 0 + 0 + 0 + 0.1 + 0.1) / 6)
    assert better["mean"].low < better["mean"].value < better["mean"].high


def test_per_task_scores_and_returns() -> None:
    sections = sections_of(*two_groups())
    assert list(part(sections, "scores_per_task").header) == ["configuration", "seeds", *TASKS]
    assert part(sections, "scores_per_task").rows[1][2].value == pytest.approx(0.1)
    assert part(sections, "returns_per_task").rows[1][3].value == pytest.approx(3.0)


def test_probability_of_improvement_is_of_the_best_over_each_other() -> None:
    table = part(sections_of(*two_groups()), "probability_of_improvement")
    assert [row[0] for row in table.rows] == ["worse"]
    assert table.rows[0][1] == Estimate(1.0, 1.0, 1.0)


def test_curves_are_the_aggregate_at_each_evaluation() -> None:
    table = part(sections_of(*two_groups()), "learning_curves")
    rows = {(row[0], row[1]): row[2] for row in table.rows}
    assert set(rows) == {(label, step) for label in ("better", "worse") for step in (50, 100)}
    best = benchmarks(two_groups())[0].ranked[0]
    assert rows["better", 100].value == pytest.approx(score_stats.aggregates(best.scores_RK)["iqm"].value)


def test_one_seed_has_no_interval_and_a_caution() -> None:
    sections = sections_of(group("a", run(0, [0.1, 0.2])), group("b", run(0, [0.3, 0.4])))
    cells = [cell for section in sections for each in section.parts if isinstance(each, Table) for row in each.rows for cell in row]
    assert all(cell.low is None and cell.high is None for cell in cells if isinstance(cell, Estimate))
    assert "One seed of each configuration: there are no intervals" in words(sections)


def test_without_completed_runs_nothing_is_drawn() -> None:
    sections = sections_of(group("a", run(0, [0.1, 0.2], status="running"), run(1, [9.0, 9.0], status="pruned")))
    assert [section.parts for section in sections] == [()]
    assert "No run is completed yet" in words(sections)
    assert sections_of() == []


def test_only_completed_runs_count() -> None:
    plain = two_groups()
    others = [run(seed, [9.0, 9.0], status=status) for seed, status in enumerate(("failed", "pruned", "running", "stopped"), 3)]
    more = [RunGroup(plain[0].label, plain[0].values, (*plain[0].runs, *others)), plain[1]]
    assert part(sections_of(*more), "scores_over_tasks").rows == part(sections_of(*plain), "scores_over_tasks").rows


def test_duplicate_seed_counts_once() -> None:
    sections = sections_of(group("a", run(0, [0.1, 0.2]), run(0, [0.1, 0.2]), run(1, [0.1, 0.2])))
    assert part(sections, "scores_over_tasks").rows[0][1] == 2
    assert "of several runs of one seed, the last is used" in words(sections)


def test_each_combination_of_pack_tasks_and_budget_has_its_own_sections() -> None:
    groups = [*two_groups(), group("long", run(0, [0.5, 0.5], steps_per_task=200)), group("other", run(0, [0.5, 0.5], env="another"))]
    sections = sections_of(*groups)
    assert len(benchmarks(groups)) == 3
    assert [row[0] for row in part(sections, "scores_over_tasks_2").rows] == ["long"]
    titles = [section.title for section in sections]
    assert "Scores over tasks: pack (2 tasks), 200 steps per task" in titles
    assert "Scores over tasks: another (2 tasks), 100 steps per task" in titles
    assert len({section.anchor for section in sections}) == len(sections)


def test_tasks_without_a_reference_have_only_returns() -> None:
    sections = sections_of(group("a", run(0, [0.1, 0.2], scored=False), run(1, [0.3, 0.2], scored=False)))
    names = [each.name for section in sections for each in section.parts]
    assert "returns_per_task" in names
    assert not [name for name in names if "scores" in name or "improvement" in name or "profiles" in name]
    assert "No reference scores are known" in words(sections)
    assert "curves_per_task" in names


def test_runs_without_results_of_a_task_are_left_out_with_a_note() -> None:
    partial = run(5, [0.1, 0.2], final_returns={"pong": 1.0}, final_scores={"pong": 0.1})
    sections = sections_of(group("a", run(0, [0.1, 0.2]), run(1, [0.1, 0.3]), partial))
    assert part(sections, "scores_over_tasks").rows[0][1] == 2
    assert "1 completed run without results of all tasks left out" in words(sections)


@pytest.mark.parametrize("count", [1, 3, 14])
def test_every_picture_can_be_drawn_and_names_its_groups(count: int) -> None:
    pytest.importorskip("matplotlib")
    groups = [group(f"way $\\bad {index}", *(run(seed, [index / 10, 1 - index / 20]) for seed in range(2))) for index in range(count)]
    sections = sections_of(*groups)
    made = html.render("A report", [], sections)
    pictures = [each for section in sections for each in section.parts if isinstance(each, Picture)]
    assert len(pictures) == (6 if count > 1 else 5)
    for each in pictures:
        assert made[f"{each.name}.png"].startswith(b"\x89PNG")
        drawn = made[f"{each.name}.svg"].decode()
        assert drawn.startswith("<svg")
        # Coloured groups are named as text.
        assert sum(f"way $\\bad {index}<" in drawn for index in range(count)) >= min(8, count - each.name.startswith("probability"))


@pytest.mark.parametrize(
    ("worse", "seeds", "caution"),
    [(0.79, 5, "intervals overlap with worse."), (0.2, 5, None), (0.2, 4, "The order is not certain: some have fewer than 5 seeds")],
)
def test_best_configuration_is_named_with_its_metric_and_uncertainty(worse: float, seeds: int, caution: str | None) -> None:
    spread = [-0.1, -0.05, 0.0, 0.05, 0.1]
    groups = [
        group(label, *(run(seed, [end + spread[seed]] * 2) for seed in range(seeds))) for label, end in (("worse", worse), ("a", 0.8))
    ]
    line = sections_of(*groups)[0].lines[0]
    assert line.startswith("Of 2 configurations a has the highest IQM in test episodes, 0.")
    assert ("not certain" in line) == (caution is not None)
    assert caution is None or caution in line
