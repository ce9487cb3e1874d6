"""Summary of a sweep and the listing of `mtrl sweep --dry-run`, with known answers for fake trials."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mtrl_cli.config import compose
from mtrl_cli.errors import UserError
from mtrl_cli.sweeps import dry_run, summary
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.display import TrialRow
from mtrl_cli.sweeps.plan import Choices, NumberRange, Plan
from mtrl_cli.sweeps.search_space import overrides_of
from tests.helpers import trials

WORDS = ("env=classic_pack", "env.tasks=[CartPole-v1]")


def grid(run_dir: Path | None = None, **axes: str) -> Plan:
    """A grid over axes, each given as its choices separated by spaces."""
    choices = {key.replace("__", "/"): Choices(tuple(words.split())) for key, words in axes.items()}
    made = trials.plan(choices, sweep_plan.points_of(choices, None), sampler="grid", trials=None)
    launcher = {"_target_": "mtrl_cli.launchers.local.LocalLauncher", "jobs": 2}
    return replace(made, shared=WORDS, launcher=launcher, steps_per_task=1000, run_dir=run_dir)


def rows_of(plan: Plan, scores: list[float | None], states: list[str] | None = None) -> list[TrialRow]:
    assert plan.points is not None
    states = states or ["completed"] * len(scores)
    zipped = zip(plan.points, scores, states, strict=True)
    return [TrialRow(number, point, state, score) for number, (point, score, state) in enumerate(zipped)]  # type: ignore[arg-type]


def test_seeds_are_averaged() -> None:
    plan = grid(network__sharing="hard film", seed="0 1 2")
    found = summary.standings(plan, rows_of(plan, [0.9, 0.1, 0.2, 0.5, 0.5, 0.8]))
    assert [(each.values, each.mean, each.low, each.high, each.trials) for each in found] == [
        ({"network/sharing": "film"}, pytest.approx(0.6), 0.5, 0.8, 3),
        ({"network/sharing": "hard"}, pytest.approx(0.4), 0.1, 0.9, 3),
    ]


def test_configuration_with_fewer_completed_seeds_ranks_lower() -> None:
    plan = grid(network__sharing="hard film", seed="0 1 2")
    lucky = rows_of(plan, [1.0, None, None, 0.5, 0.5, 0.5])
    assert [each.values["network/sharing"] for each in summary.standings(plan, lucky)] == ["film", "hard"]


def test_printed_command_of_the_best_composes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    plan = replace(grid(seed="1"), shared=("env=classic_pack",))
    values = {"env.tasks": "[Acrobot-v1,CartPole-v1]", "optimizer.lr": "1.25e-05"}
    words = shlex.split(summary.best_as_command(plan, [TrialRow(0, values, "completed", 1.0)]).splitlines()[1])
    assert words[:2] == ["mtrl", "train"]
    composed = compose.compose_training(words[2:])
    assert (composed["env"]["tasks"], composed["optimizer"]["lr"]) == (["Acrobot-v1", "CartPole-v1"], 1.25e-05)


def printed_summary(plan: Plan, rows: list[TrialRow]) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(summary.ending(plan, rows))
    return out.getvalue()


def test_summary_names_the_best_the_failed_and_the_pruned() -> None:
    plan = grid(network__sharing="hard film", seed="0 1 2")
    rows = rows_of(plan, [0.9, 0.1, 0.2, 0.5, 0.5, None], ["completed"] * 4 + ["pruned", "failed"])
    rows[5] = TrialRow(5, rows[5].values, "failed", note="not enough memory [really]")
    text = printed_summary(plan, rows)
    table = [line.split() for line in text.splitlines()]
    assert ["0.400", "0.100", "to", "0.900", "3", "network/sharing=hard"] in table
    assert ["0.500", "0.500", "to", "0.500", "1", "network/sharing=film"] in table
    assert "failed: 1 of 6 trials (5)" in text
    assert "  trial 5: network/sharing=film seed=2: not enough memory [really]" in text
    assert "pruned: 1 of 6 trials (4)" in text
    command = "mtrl train env=classic_pack 'env.tasks=[CartPole-v1]' network/sharing=hard"
    assert summary.best_as_command(plan, rows) == f"the best configuration, 0.400 (the mean of 3 seeds):\n{command}"


def test_summary_without_seeds_has_no_means() -> None:
    plan = grid(network__sharing="hard film")
    assert "mean" not in printed_summary(plan, rows_of(plan, [0.9, 0.1])).replace("eval/score/mean", "")
    assert summary.best_as_command(plan, rows_of(plan, [0.9, 0.1])).startswith("the best configuration, 0.900:\n")


def test_sweep_without_scores_has_no_best_configuration() -> None:
    plan = grid(seed="0 1")
    rows = rows_of(plan, [None, None], ["failed", "completed"])
    assert "no best configuration" in summary.best_as_command(plan, rows)
    assert "completed without a metric: trials 1" in printed_summary(plan, rows)


def test_consecutive_numbers_are_abbreviated() -> None:
    assert summary.in_short([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert summary.in_short(range(0, 100, 2), most=3) == "0, 2, 4, …"


# -- the listing ----------------------------------------------------------------------------------------------------------------


def write_trials(plan: Plan, folder: Path, *records: dict[str, Any]) -> None:
    """Create trials in a sweep's folder, each with the given entries of its trial.json."""
    sweep_plan.save(plan, folder, ["mtrl", "sweep"])
    for trial in records:
        number, run = trial["number"], folder / "trials" / f"{trial['number']:04d}"
        run.mkdir(parents=True)
        overrides = overrides_of(plan.points[number]) if plan.points is not None else trial["overrides"]
        values = dict(word.split("=", 1) for word in overrides)
        record = {"overrides": overrides, "values": values, "command": "mtrl train", "state": "completed", **trial}
        if record["state"] == "completed":
            record.setdefault("step", plan.steps(values))
        seconds = record.pop("seconds", None)
        (run / "trial.json").write_text(json.dumps(record))
        if seconds is not None:
            (run / "run.json").write_text(json.dumps({"seconds": seconds, "status": "completed"}))


def test_new_sweep_is_listed_without_creating_its_folder(tmp_path: Path) -> None:
    listed = dry_run.list_sweep(grid(tmp_path / "new", network__sharing="hard film", seed="0 1")).splitlines()
    assert listed[0].startswith("4 trials, a grid; ranked by eval/score/mean")
    assert listed[-6:] == [
        "trial  overrides",
        "0      network/sharing=hard seed=0",
        "1      network/sharing=hard seed=1",
        "2      network/sharing=film seed=0",
        "3      network/sharing=film seed=1",
        "time: unknown, no trial has started yet",
    ]
    assert list(tmp_path.iterdir()) == []


def test_started_sweep_is_listed_with_progress_and_remaining_time(tmp_path: Path) -> None:
    plan = grid(tmp_path, network__sharing="hard film", seed="0 1")
    write_trials(
        plan,
        tmp_path,
        {"number": 0, "value": 0.75, "seconds": 100.0},
        {"number": 1, "state": "failed", "why": "no memory", "step": 0},
        {"number": 2, "state": "running", "step": 500, "seconds": 50.0},
    )
    listed = dry_run.list_sweep(plan).splitlines()
    assert [line.split() for line in listed[3:8]] == [
        ["trial", "state", "score", "time", "overrides"],
        ["0", "completed", "0.750", "1:40", "network/sharing=hard", "seed=0"],
        ["1", "failed", "-", "-", "network/sharing=hard", "seed=1"],
        ["2", "running", "-", "0:50", "network/sharing=film", "seed=0"],
        ["3", "waiting", "-", "-", "network/sharing=film", "seed=1"],
    ]
    # 0.1 s per step, two trials at a time: 1,000 steps are left of the trial with the most remaining steps.
    assert listed[8:] == ["trial 1: no memory", "time: 2:30 for 2 trials so far", "remaining: about 1:40 with 2 at a time"]


def test_search_lists_its_axes(tmp_path: Path) -> None:
    axes = {
        "optimizer.lr": NumberRange(1e-5, 1e-3, log=True),
        "agent.n_step": NumberRange(1, 8, is_integer=True),
        "agent": Choices(("dqn", "pqn")),
    }
    plan = replace(grid(tmp_path, seed="0"), axes=axes, points=None, search={**trials.SEARCH, "trials": 3})
    listed = dry_run.list_sweep(plan)
    assert "3 trials, sampled by tpe, seed 0" in listed
    assert "  optimizer.lr: from 1e-05 to 0.001 (logarithmic)\n" in listed
    assert "  agent.n_step: from 1 to 8 (integers)\n" in listed
    assert "  agent: one of dqn, pqn\n" in listed
    write_trials(plan, tmp_path, {"number": 0, "overrides": ["agent.n_step=3"], "value": 0.5, "seconds": 60.0})
    listed = dry_run.list_sweep(plan)
    assert "0      completed  0.500  1:00  agent.n_step=3\n" in listed
    assert listed.count("(chosen when it starts)") == 2


@pytest.mark.parametrize(
    "content", ["", "[]", '{"state": "completed"}', '{"state": "evil", "overrides": [], "value": null}', '{"overrides": 3}']
)
def test_damaged_trial_is_listed_as_unreadable(tmp_path: Path, content: str) -> None:
    plan = grid(tmp_path, seed="0 1")
    write_trials(plan, tmp_path, {"number": 0, "value": 0.5})
    (tmp_path / "trials" / "0000" / "trial.json").write_text(content)
    listed = dry_run.list_sweep(plan)
    assert "0      unreadable" in listed
    assert f"trial 0: {tmp_path}/trials/0000/trial.json is damaged: " in listed
    assert "1      waiting" in listed


def test_folder_that_holds_no_or_another_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        dry_run.list_sweep(grid(tmp_path, seed="0 1"))
    sweep_plan.save(grid(tmp_path, seed="0 1"), tmp_path, ["mtrl"])
    with pytest.raises(UserError, match="other values of seed"):
        dry_run.list_sweep(grid(tmp_path, seed="0 1 2"))
