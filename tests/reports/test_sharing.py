"""Report sections on sharing, from runs with known scores."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrl_cli.reports import comparison, grouping, run_data, sharing_plots
from mtrl_cli.reports import sharing as report_sharing
from mtrl_cli.reports.elements import Picture, Section, Table
from mtrl_cli.stats.bootstrap import Estimate
from tests.helpers.fake_runs import composed, make_run, make_sweep

WORDS = ("env=minatar_pack", "network.parameters=300k")
TASKS = composed(("env=minatar_pack",))["env"]["tasks"]
SEEDS = (0, 1, 2, 3, 4)


def sections(folder: Path) -> list[Section]:
    return report_sharing.sections(grouping.grouped(run_data.read([folder])))


def table(section: Section, name: str) -> dict[str, dict[str, Any]]:
    """Return a table's rows by their first cell, cells by heading."""
    found = next(part for part in section.parts if isinstance(part, Table) and part.name == name)
    return {str(row[0]): dict(zip(found.header, row, strict=True)) for row in found.rows}


def names(section: Section) -> list[str]:
    return [part.name for part in section.parts]


def pictures(section: Section) -> list[Picture]:
    return [part for part in section.parts if isinstance(part, Picture)]


def make_study(folder: Path, reach: Mapping[str, Sequence[float]], *, sizes: Mapping[str, int] | None = None, **run: Any) -> Path:
    """Create a sweep over structures and seeds."""
    axes = {"network/sharing": list(reach), "seed": SEEDS}
    of_size = sizes or {}
    known: dict[str, Callable[[Mapping[str, str]], Any]] = {
        "reaches": lambda values: reach[values["network/sharing"]],
        "parameters": lambda values: of_size.get(values["network/sharing"], 300_000),
    }
    return make_sweep(folder, axes, WORDS, spread=0.01, **known, **run)


REACH = {
    "independent": [0.5] * 5,
    "hard": [0.3, 0.3, 0.5, 0.7, 0.7],
    "film": [0.8, 0.8, 0.8, 0.8, 0.8],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_study(folder / "S", REACH, sizes={"hard": 296_000, "film": 310_000})
    for seed in SEEDS:
        full = ["env=minatar_pack", "network/sharing=independent"]
        make_run(folder / f"full{seed}", full, seed=seed, reaches=0.65, spread=0.01, parameters=1_400_000, seconds=1200)
    return folder


def test_structures_are_compared_with_independent_networks(study: Path) -> None:
    (section,) = sections(study)
    assert section.title == "Sharing compared with independent networks"
    own = table(section, "sharing")
    assert list(own) == ["independent (300k)", "hard", "film", "independent (1.4M)"]
    assert own["film"]["runs"] == 5
    assert own["film"]["score, mean"].value == pytest.approx(0.8, abs=0.03)
    assert (own["hard"]["parameters"], own["hard"]["shared"]) == (296_000, 266_400)
    assert own["film"]["budget, s"] == pytest.approx(600, abs=2)
    assert own["film"]["ms per step"] == pytest.approx(1000 / 4100, rel=0.05)

    same = table(section, "sharing_same_size")
    assert list(same) == ["hard", "film"]
    assert {row["baseline"] for row in same.values()} == {"independent (300k)"}
    assert same["film"]["score, mean"].value == pytest.approx(0.3, abs=0.03)
    assert same["film"]["gained"] == ", ".join(TASKS)
    assert same["film"]["lost"] == ""
    assert same["hard"]["gained"] == ", ".join(TASKS[3:])
    assert same["hard"]["lost"] == ", ".join(TASKS[:2])
    # Curves are final score * (1 - exp(-4 x)), where x is the share of the budget. film reaches the baseline's final score early.
    reached = -np.log(1 - 0.5 * (1 - np.exp(-4)) / 0.8) / 4
    assert same["film"]["times fewer steps"].value == pytest.approx(1 / reached, rel=0.1)
    assert same["film"]["training cost"] == pytest.approx(1, abs=0.01)

    full = table(section, "sharing_full")
    assert list(full) == ["independent (300k)", "hard", "film"]
    assert full["film"]["score, mean"].value == pytest.approx(0.15, abs=0.03)
    assert full["hard"]["times fewer steps"].value == 0
    assert full["film"]["training cost"] == pytest.approx(0.5, abs=0.01)


def test_differences_per_task_have_intervals(study: Path) -> None:
    (section,) = sections(study)
    own = table(section, "sharing_same_size_tasks")
    assert list(own["hard"])[1:] == TASKS
    assert [own["hard"][task].value for task in TASKS] == pytest.approx([-0.2, -0.2, 0, 0.2, 0.2], abs=0.03)
    for cell in own["hard"].values():
        if isinstance(cell, Estimate):
            assert cell.low is not None
            assert cell.high is not None
            assert cell.low <= cell.value <= cell.high


def test_every_picture_can_be_drawn(tmp_path: Path) -> None:
    routing = {f"routing/experts/{task}/{choice}": 0.25 for task in TASKS for choice in range(4)}
    cka = {f"features/cka/{a}~{b}": 0.6 for index, a in enumerate(TASKS) for b in TASKS[index + 1 :]}
    make_study(tmp_path / "S", REACH, extra=routing | cka | {"features/cka": 0.6})
    (section,) = sections(tmp_path)
    drawn = [picture.name for picture in pictures(section)]
    assert drawn == ["sharing_same_size_transfer", "sharing_conflict", "sharing_gradients", "sharing_features", "sharing_routing"]
    for picture in pictures(section):
        out = io.BytesIO()
        picture.draw().savefig(out, format="svg")
        assert len(out.getvalue()) > 2000
        assert picture.text
    transfer = pictures(section)[0].draw()
    assert len(transfer.axes[0].texts) == 2 * len(TASKS)
    assert len(transfer.axes[0].patches) == 2 * len(TASKS) - 1, "hard is framed in all tasks except the one without a difference"


def test_diagnostics_are_means_over_runs(tmp_path: Path) -> None:
    make_study(tmp_path / "S", REACH, extra={"grad/conflict": 0.25, "features/cka": 0.6})
    (section,) = sections(tmp_path)
    inside = table(section, "sharing_inside")
    assert inside["film"]["conflicting pairs, over training"] == pytest.approx(0.25)
    assert inside["film"]["feature similarity (CKA)"] == pytest.approx(0.6)


def test_conflict_curves_of_runs_with_different_steps_are_interpolated(study: Path) -> None:
    (ablation,) = comparison.ablations(grouping.grouped(run_data.read([study])), "network/sharing")
    variant = ablation.variants[1]
    own = [((0, 0.0), (10, 1.0), (20, 0.0)), ((5, 0.2), (15, 0.4))]
    runs = tuple(replace(run, metrics={"grad/conflict": points}) for run, points in zip(variant.runs[:2], own, strict=True))
    steps, shares = sharing_plots.conflict_over_training(replace(variant, runs=runs))
    np.testing.assert_array_equal(steps, [5, 10, 15])
    np.testing.assert_allclose(shares, [(0.5 + 0.2) / 2, (1.0 + 0.3) / 2, (0.5 + 0.4) / 2])


def test_routings_are_tables_of_tasks_by_choices(tmp_path: Path) -> None:
    shares = {
        f"routing/layer1/module0/{task}/{choice}": (row + 1) * (choice + 1) / 100 for row, task in enumerate(TASKS) for choice in (0, 1)
    }
    make_study(tmp_path / "S", REACH, extra=shares | {"routing/layer1/stranger/0": 1.0})
    groups = grouping.grouped(run_data.read([tmp_path]))
    (ablation,) = comparison.ablations(groups, "network/sharing")
    (found,) = comparison.routings(ablation, ablation.variants[1]).items()
    assert found[0] == "layer1/module0"
    np.testing.assert_allclose(found[1], [[(row + 1) / 100, (row + 1) / 50] for row in range(len(TASKS))])


# -- missing runs and values ----------------------------------------------------------------------------------------------------


def test_one_seed_has_no_intervals_and_marks_nothing(tmp_path: Path) -> None:
    for name in ("independent", "film"):
        make_run(tmp_path / name, [*WORDS, f"network/sharing={name}"], reaches=0.9 if name == "film" else 0.2)
    (section,) = sections(tmp_path)
    assert any("One seed" in line for line in section.lines)
    row = table(section, "sharing_same_size")["film"]
    assert row["score, mean"].value == pytest.approx(0.7, abs=0.1)
    assert row["score, mean"].low is None
    assert (row["gained"], row["lost"]) == ("", "")
    assert not pictures(section)[0].draw().axes[0].patches


def test_few_seeds_give_a_caution(tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"network/sharing": ["independent", "film"], "seed": [0, 1]}, WORDS)
    assert any("too narrow" in line for line in sections(tmp_path)[0].lines)


def test_missing_baseline_is_reported_with_advice(tmp_path: Path) -> None:
    make_sweep(tmp_path / "S", {"network/sharing": ["hard", "film"], "seed": [0, 1]}, WORDS)
    (section,) = sections(tmp_path)
    assert any("network/sharing=independent" in line and "mtrl study sharing" in line for line in section.lines)
    assert "sharing" in names(section)
    assert not [name for name in names(section) if "same_size" in name or "full" in name]


def test_baseline_of_another_size_is_not_compared_at_the_same_size(tmp_path: Path) -> None:
    make_study(tmp_path / "S", {"independent": [0.5] * 5, "hard": [0.6] * 5}, sizes={"independent": 320_000})
    (section,) = sections(tmp_path)
    assert "sharing_same_size" not in names(section)
    assert list(table(section, "sharing_full")) == ["hard"]
    assert any("has the parameter count of" in line for line in section.lines)


def test_left_out_runs_are_listed_with_reasons(tmp_path: Path) -> None:
    sweep = make_study(tmp_path / "S", REACH, states={7: "failed", 9: "running", 10: "pruned", 11: "waiting"})
    folder = sweep / "trials" / "0006"
    (folder / "eval" / "test.json").unlink()
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(row for row in rows if "eval/" not in row and "test/" not in row))
    make_run(tmp_path / "again", [*WORDS, "network/sharing=film"], seed=3, reaches=0.1)
    (section,) = sections(tmp_path)
    (line,) = [line for line in section.lines if line.startswith("Left out")]
    assert "hard: seed 1 (no results of all tasks), seed 2 (failed), seed 4 (running)" in line
    assert "film: seed 0 (pruned), seed 3 (superseded by another run)" in line
    assert {name: row["runs"] for name, row in table(section, "sharing").items()} == {"independent": 5, "hard": 2, "film": 3}
    assert table(section, "sharing")["film"]["score, mean"].value == pytest.approx((0.8 + 0.1 + 0.8) / 3, abs=0.03)


@pytest.mark.parametrize("states", [{5: "queued"}, {5: "lost"}, {5: "lost", 6: "queued", 0: "queued"}])
def test_trial_with_unresolved_auto_values_stays_in_its_group(states: Mapping[int, str], tmp_path: Path) -> None:
    make_study(tmp_path / "S", REACH, states=states)
    (section,) = sections(tmp_path)
    assert list(table(section, "sharing")) == list(REACH)
    assert table(section, "sharing")["hard"]["runs"] == 5 - sum(5 <= number < 10 for number in states)
    assert list(table(section, "sharing_same_size")) == ["hard", "film"]


def test_trial_with_unresolved_pad_stays_in_its_group(tmp_path: Path) -> None:
    axes = {"network/sharing": list(REACH), "seed": [0, 1]}
    folder = make_sweep(tmp_path / "S", axes, [*WORDS, "+augmentation=shift"], states={2: "queued"})
    for number in (0, 1, 3, 4, 5):
        config = folder / "trials" / f"{number:04d}" / "config.yaml"
        assert "pad: auto" in config.read_text()
        config.write_text(config.read_text().replace("pad: auto", "pad: 1"))
    assert list(table(sections(tmp_path)[0], "sharing")) == list(REACH)


def test_values_set_by_the_user_make_another_ablation(tmp_path: Path) -> None:
    for name in ("independent", "film"):
        make_run(tmp_path / name, [*WORDS, f"network/sharing={name}"])
    make_run(tmp_path / "large", [*WORDS, "network/sharing=hard", "agent.batch_size=256"])
    (section,) = sections(tmp_path)
    assert list(table(section, "sharing")) == ["film", "independent"]
    assert any("One structure only" in line and "hard" in line for line in section.lines)


def test_no_completed_run_gives_an_empty_table(tmp_path: Path) -> None:
    make_study(tmp_path / "S", REACH, states=dict.fromkeys(range(15), "failed"))
    (section,) = sections(tmp_path)
    assert any("no completed run" in line for line in section.lines)
    assert table(section, "sharing") == {}
    assert pictures(section) == []


def test_single_structure_shows_diagnostics_only(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / str(seed), WORDS, seed=seed)
    (section,) = sections(tmp_path)
    assert section.title == "Gradients, features and routing"
    assert "sharing_inside" in names(section)
    assert report_sharing.sections([]) == []
    make_sweep(tmp_path / "S", {"optimizer.lr": ["0.1", "0.01"], "seed": [0]}, WORDS)
    assert sections(tmp_path / "S") == []
    (line,) = report_sharing.summary(grouping.grouped(run_data.read([tmp_path / "S"])))
    assert line.startswith("All runs have one sharing structure, hard, so sharing is not compared")


def test_different_packs_budgets_and_values_are_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [*WORDS, "network/sharing=independent"])
    make_run(tmp_path / "b", [*WORDS, "network/sharing=film", "steps_per_task=50000"])
    make_run(tmp_path / "c", ["env=classic_pack", "network/sharing=hard"])
    make_run(tmp_path / "d", [*WORDS, "network/sharing=mmoe", "optimizer.lr=0.01"])
    (section,) = sections(tmp_path)
    assert "sharing is not compared" in section.lines[0]
    make_run(tmp_path / "e", [*WORDS, "network/sharing=hard", "optimizer.lr=0.01"])
    (section,) = sections(tmp_path)
    assert list(table(section, "sharing")) == ["mmoe", "hard"]
    assert any("One structure only" in line for line in section.lines)


def test_each_ablation_has_its_own_section(tmp_path: Path) -> None:
    axes = {"network/sharing": ["independent", "film"], "optimizer.lr": ["0.001", "0.0001"], "seed": [0, 1]}
    make_sweep(tmp_path / "S", axes, WORDS)
    first, second = sections(tmp_path)
    assert (first.anchor, second.anchor) == ("sharing", "sharing-2")
    assert first.title == "Sharing compared with independent networks: optimizer.lr=0.001"
    assert second.title == "Sharing compared with independent networks: optimizer.lr=0.0001"
    assert not set(names(first)) & set(names(second))


def test_tasks_without_reference_are_compared_by_returns(tmp_path: Path) -> None:
    make_study(tmp_path / "S", REACH, scored=False)
    (section,) = sections(tmp_path)
    assert any("Without reference scores" in line for line in section.lines)
    own = table(section, "sharing_same_size_tasks")["film"]
    assert own[f"{TASKS[0]} (return)"].value == pytest.approx(30, abs=3)
    assert table(section, "sharing_same_size")["film"]["score, mean"] is None
    assert table(section, "sharing")["film"]["score, mean"] is None
    pictures(section)[0].draw()


def test_task_weights_are_compared_with_uniform_ones(tmp_path: Path) -> None:
    axes = {"network/sharing": ["independent", "hard"], "task_weights": ["uniform", "pcgrad"], "seed": [0, 1, 2]}
    reach = {"uniform": 0.4, "pcgrad": 0.7}
    make_sweep(tmp_path / "S", axes, WORDS, reaches=lambda values: reach[values["task_weights"]], spread=0.01)
    found = sections(tmp_path)
    assert [section.title for section in found] == [
        "Sharing compared with independent networks: task_weights=uniform",
        "Sharing compared with independent networks: task_weights=pcgrad",
        "Task weights compared with uniform weights: network/sharing=independent",
        "Task weights compared with uniform weights: network/sharing=hard",
    ]
    assert table(found[3], "weights_uniform_2")["pcgrad"]["score, mean"].value == pytest.approx(0.3, abs=0.03)
