"""Report sections on searches, from trials whose metric is a known function of their values."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrl_cli.reports import html, hyperparameters
from mtrl_cli.reports.elements import Picture, Section, Table
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Choices, NumberRange, Plan

AXES: dict[str, Choices | NumberRange] = {
    "optimizer.lr": NumberRange(1e-5, 1e-2, log=True),
    "agent.gamma": NumberRange(0.9, 0.999),
    "agent.n_step": Choices(("1", "3", "5")),
}


def make_search(
    folder: Path,
    trials: int,
    value: Callable[[Mapping[str, Any]], float | None],
    axes: Mapping[str, Choices | NumberRange] = AXES,
    states: Mapping[int, str] | None = None,
) -> Path:
    """Create the folder of a sweep with trial.json files, but without runs."""
    search = {"sampler": "tpe", "trials": trials, "pruner": "none", "storage": None, "metric": None, "retries": 2, "seed": 0}
    launcher = {"_target_": "mtrl_cli.launchers.local.LocalLauncher", "jobs": 1}
    plan = Plan(("env=minatar_pack",), axes, None, search, launcher, (), "minatar_pack", 1000, folder)
    folder.mkdir()
    sweep_plan.save(plan, folder, ["mtrl", "sweep"])
    random = np.random.default_rng(0)
    for number in range(trials):
        values: dict[str, Any] = {}
        for key, axis in axes.items():
            if isinstance(axis, Choices):
                values[key] = axis.values[int(random.integers(len(axis.values)))]
            else:
                drawn = random.uniform(*map(math.log, (axis.low, axis.high))) if axis.log else random.uniform(axis.low, axis.high)
                values[key] = math.exp(drawn) if axis.log else float(drawn)
        write_trial(folder, number, values, value(values), (states or {}).get(number, "completed"))
    return folder


def write_trial(folder: Path, number: int, values: Mapping[str, Any], value: float | None, state: str = "completed") -> None:
    trial = folder / "trials" / f"{number:04d}"
    trial.mkdir(parents=True)
    texts = {key: str(each) for key, each in values.items()}
    record = {"format": 1, "number": number, "overrides": [], "values": texts, "command": f"mtrl train seed={number}", "state": state}
    (trial / "trial.json").write_text(json.dumps(record | {"value": value, "metric": "eval/score/mean"}))


def by_lr(values: Mapping[str, Any]) -> float:
    """Return a metric that depends only on the learning rate and is highest at 3e-4."""
    return 1 - (math.log10(values["optimizer.lr"]) + 3.5) ** 2


def table(section: Section, name: str) -> Table:
    return next(part for part in section.parts if isinstance(part, Table) and part.name == name)


def test_only_the_key_that_determines_the_metric_is_important(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 60, by_lr))
    assert section.lines == ["60 completed trials of 60, ranked by eval/score/mean."]
    found = table(section, "importance")
    assert found.rows[0][0] == "optimizer.lr"
    shares = [row[1] for row in found.rows]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > 0.8
    assert {row[0] for row in found.rows} == set(AXES)


def test_best_trials_are_listed_with_their_commands(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 30, by_lr))
    best = table(section, "best_trials")
    assert list(best.header) == ["trial", "eval/score/mean", *AXES, "command"]
    metrics = [row[1] for row in best.rows]
    assert len(metrics) == hyperparameters.BEST
    assert metrics == sorted(metrics, reverse=True)
    number, value, lr, *_ = best.rows[0]
    assert value == pytest.approx(by_lr({"optimizer.lr": lr}))
    assert best.rows[0][-1] == f"mtrl train seed={number}"


def test_slices_have_a_panel_for_each_key(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 30, by_lr))
    (picture,) = [part for part in section.parts if isinstance(part, Picture)]
    drawing = picture.draw()
    panels = [axes for axes in drawing.axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == list(AXES)
    assert [axes.get_xscale() for axes in panels] == ["log", "linear", "linear"]
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["1", "3", "5"]
    assert len(panels[0].lines[0].get_xdata()) == 30
    drawing.savefig(io.BytesIO(), format="png")


def test_few_trials_have_no_importance(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", hyperparameters.FEWEST - 1, by_lr))
    assert any("10 completed trials" in line for line in section.lines)
    assert [part.name for part in section.parts] == ["slices", "best_trials"]


def test_pruned_and_failed_trials_are_counted_and_damaged_ones_skipped(tmp_path: Path) -> None:
    folder = make_search(tmp_path / "S", 20, by_lr, states={0: "pruned", 1: "pruned", 2: "failed", 3: "running"})
    (folder / "trials" / "0004" / "trial.json").write_text("{")
    off_axis = folder / "trials" / "0005" / "trial.json"
    record = json.loads(off_axis.read_text())
    off_axis.write_text(json.dumps(record | {"values": record["values"] | {"optimizer.lr": "99"}}))
    (folder / "trials" / "0006" / "trial.json").write_text('{"state": "completed", "value": NaN, "values": []}')
    (section,) = hyperparameters.sections(folder)
    assert section.lines[0] == "13 completed trials of 20, ranked by eval/score/mean; 2 pruned and 1 failed."


def test_trials_without_a_metric_have_only_a_line(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 3, lambda _: None))
    assert "No completed trial has a metric" in section.lines[-1]
    assert section.parts == ()


def test_equal_metrics_have_no_importance(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 12, lambda _: 0.5))
    assert any("so no key matters" in line for line in section.lines)


def test_key_with_one_value_is_left_out(tmp_path: Path) -> None:
    axes = {**AXES, "agent.double": Choices(("true",))}
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 15, by_lr, axes))
    assert any("left out: agent.double" in line for line in section.lines)
    assert {row[0] for row in table(section, "importance").rows} == set(AXES)


def test_sweep_of_seeds_structures_and_weights_has_no_section(tmp_path: Path) -> None:
    axes = {"network/sharing": Choices(("hard", "film")), "task_weights": Choices(("uniform", "pcgrad")), "seed": Choices(("0", "1"))}
    assert hyperparameters.sections(make_search(tmp_path / "S", 8, lambda _: 0.5, axes)) == []


def test_damaged_plan_is_reported(tmp_path: Path) -> None:
    folder = make_search(tmp_path / "S", 3, by_lr)
    (folder / "sweep.json").write_text('{"format": 1}')
    (section,) = hyperparameters.sections(folder)
    assert "is damaged" in section.lines[0]


def test_suffix_distinguishes_the_files_of_several_sweeps(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 12, by_lr), "_2")
    assert {part.name for part in section.parts} == {"importance_2", "slices_2", "best_trials_2"}
    assert section.title.endswith("S")


def test_given_numbers_have_four_digits_on_the_page_and_all_digits_in_csv(tmp_path: Path) -> None:
    (section,) = hyperparameters.sections(make_search(tmp_path / "S", 30, by_lr))
    best = table(section, "best_trials")
    lr = best.rows[0][2]
    assert isinstance(lr, float)
    assert f"| {float(lr):.4g} |" in html.as_markdown(best)
    assert f",{float(lr)!r}," in html.as_csv(best)
    picture = next(part for part in section.parts if isinstance(part, Picture))
    assert f"optimizer.lr={float(lr):.4g}," in picture.text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1e-5, 1e-2, {"1e-5", "1e-4", "1e-3", "0.01"}), (1e-9, 1.0, {"1e-9", "1e-6", "1e-3", "1"}), (2e-4, 3e-4, None)],
)
def test_logarithmic_axes_have_few_plain_ticks_within_their_limits(low: float, high: float, ticks: set[str] | None, tmp_path: Path) -> None:
    axes = {"optimizer.lr": NumberRange(low, high, log=True), "agent.gamma": NumberRange(0.9, 0.999)}
    make_search(tmp_path / "S", 12, lambda values: 1.0 + values["agent.gamma"], axes)
    for number, value in ((0, low), (1, high)):
        path = tmp_path / "S" / "trials" / f"{number:04d}" / "trial.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"values": record["values"] | {"optimizer.lr": str(value)}}))
    (section,) = hyperparameters.sections(tmp_path / "S")
    made = html.render("", [], [section])["slices.svg"].decode()
    assert "mathdefault" not in made
    picture = next(part for part in section.parts if isinstance(part, Picture))
    panel = picture.draw().axes[0]
    panel.figure.canvas.draw()
    shown = [label.get_text() for label in panel.get_xticklabels()]
    assert 2 <= len(shown) <= 5
    assert ticks is None or set(shown) == ticks
    assert all(panel.get_xlim()[0] <= place <= panel.get_xlim()[1] for place in panel.get_xticks())
