"""Sweep plans: composed from overrides, validated, saved in the sweep's folder, and loaded again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mtrl_cli.config import compose
from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Choices, NumberRange, Plan

BASE = ["env=classic_pack", "steps_per_task=1000", "agent.learning_starts=100"]
LR = "optimizer.lr=tag(log,interval(1e-5,1e-3))"


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))
    monkeypatch.delenv("MTRL_TRUSTED_PACKAGES", raising=False)


def make(*words: str) -> Plan:
    return sweep_plan.make([*BASE, *words])


def saved(folder: Path, *words: str) -> Plan:
    plan = make(*words)
    sweep_plan.save(plan, folder, ["mtrl", "sweep", *words])
    return plan


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as refused:
        make(*words)
    assert str(refused.value).count("\n") < 2
    return str(refused.value)


def test_grid_has_every_combination_and_the_last_key_varies_fastest() -> None:
    plan = make("network/sharing=hard,film", "seed=range(3)", "launcher.jobs=2")
    assert plan.search["sampler"] == "grid"
    assert plan.points is not None
    found = [(point["network/sharing"], point["seed"]) for point in plan.points]
    assert found == [("hard", "0"), ("hard", "1"), ("hard", "2"), ("film", "0"), ("film", "1"), ("film", "2")]
    assert (plan.trials, plan.env, plan.steps_per_task, plan.launcher["jobs"]) == (6, "classic_pack", 1000, 2)
    assert plan.shared == tuple(BASE)
    assert plan.command(plan.points[3]) == f"mtrl train {' '.join(BASE)} network/sharing=film seed=0"


def test_number_of_trials_selects_the_first_points_of_a_grid() -> None:
    plan = make("network/sharing=hard,film", "seed=range(3)", "sweep.trials=4")
    assert plan.points == make("network/sharing=hard,film", "seed=range(3)").points[:4]  # type: ignore[index]
    assert plan.trials == 4


def test_intervals_are_sampled_with_the_type_of_their_key() -> None:
    plan = make(LR, "agent.n_step=interval(1,8)", "agent.gamma=interval(0.9,1)", "agent.double=true,false", "sweep.trials=5")
    assert (plan.search["sampler"], plan.points, plan.trials) == ("tpe", None, 5)
    assert plan.axes == {
        "optimizer.lr": NumberRange(1e-5, 1e-3, log=True),
        "agent.n_step": NumberRange(1, 8, is_integer=True),
        "agent.gamma": NumberRange(0.9, 1.0),
        "agent.double": Choices(("true", "false")),
    }
    assert isinstance(plan.axes["agent.n_step"].low, int)  # type: ignore[union-attr]


def test_trial_has_the_configuration_of_mtrl_train_with_the_same_overrides(tmp_path: Path) -> None:
    plan = make(LR, "agent.n_step=interval(1,8)", "env.tasks=[CartPole-v1],[Acrobot-v1,CartPole-v1]", "sweep.trials=5")
    values = {"optimizer.lr": 1.2345678901234567e-05, "agent.n_step": 7, "env.tasks": "[Acrobot-v1,CartPole-v1]"}
    composed = plan.configuration(values, tmp_path / "run")
    words = ["optimizer.lr=1.2345678901234567e-05", "agent.n_step=7", "env.tasks=[Acrobot-v1,CartPole-v1]", f"run_dir={tmp_path / 'run'}"]
    assert composed == compose.compose_training([*BASE, *words])
    assert composed["optimizer"]["lr"] == values["optimizer.lr"], "to the last bit"
    path = tmp_path / "config.yaml"
    path.write_text(compose.dump(composed))
    assert compose.load(path) == composed, "the worker reads the same configuration"


def test_invalid_combination_fails_only_its_own_trial(tmp_path: Path) -> None:
    """Checking all combinations in advance would be too slow, and the other trials of the sweep can run."""
    plan = make("network/head=dueling,c51", "agent/value_scale=clip,none")
    with pytest.raises(UserError, match="requires bounded returns"):
        plan.configuration({"network/head": "c51", "agent/value_scale": "none"}, tmp_path)
    assert plan.configuration({"network/head": "c51", "agent/value_scale": "clip"}, tmp_path)["network"]["head"]["_target_"].endswith(
        "C51Head"
    )


def test_source_of_init_from_becomes_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make("seed=1,2", "init_from=a/run")
    assert plan.configuration({"seed": "1"}, tmp_path / "run")["init_from"] == str(tmp_path / "a/run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no key has several values"),
        (["agent.n_stp=1"], "Did you mean 'agent.n_step'?"),
        (["seed=1,2", "agent.n_stp=1"], "Did you mean 'agent.n_step'?"),
        (["seed=1,2", "sweep.trails=1"], "Did you mean 'sweep.trials'?"),
        (["seed=1,2", "swep.trials=1"], "Did you mean 'sweep.trials'?"),
        (["seed=1,2", "launcher=loca"], "Did you mean 'launcher=local'?"),
        (["seed=1,2", "launcher.job=1"], "Did you mean 'launcher.jobs'?"),
        (["seed=1,2", "laucher.jobs=1"], "Did you mean 'launcher.jobs'?"),
        (["seed=1,-2"], "seed must be a non-negative integer, got -2"),
        (["seed=range(-3,9)"], "seed must be a non-negative integer, got -3"),
        (["seed=range(0,5,0.5)"], "seed must be a non-negative integer, got 0.5"),
        (["network/sharing=hard,flm"], "unknown option 'network/sharing=flm'. Did you mean 'network/sharing=film'?"),
        (["network/head=dueling,c51"], "with network/head=c51: network/head=C51Head requires bounded returns"),
        (["optimizer.lr=interval(-1,1)", "sweep.trials=3"], "optimizer.lr must be a positive number, got -1"),
        (["agent.gamma=interval(0.5,1.5)", "sweep.trials=3"], "agent.gamma must be a number from 0 to 1, got 1.5"),
        (["agent.n_step=interval(0.5,3)", "sweep.trials=3"], "agent.n_step must be a positive integer, got 0.5"),
        (["agent.n_step=interval(1,3.5)", "sweep.trials=3"], "agent.n_step must be an integer. Give integers at both ends"),
        (["network=interval(1,3)", "sweep.trials=3"], "unknown option 'network=1'"),
        ([LR], "sweep.trials is missing: optimizer.lr is an interval"),
        (["seed=1,2", "sweep.sampler=random"], "sweep.trials is missing: sweep.sampler=random needs it"),
        ([LR, "sweep.sampler=grid"], "sweep.sampler=grid does not support the interval of optimizer.lr"),
        (["seed=1,2", "sweep.trials=3"], "sweep.trials must be at most the 2 points of the grid, got 3"),
        (["seed=range(1000)", "agent.n_step=range(1,1000)"], "the grid has 999,000 points"),
        ([LR, "sweep.trials=1000000"], "sweep.trials must be at most 100,000, got 1000000"),
        (["seed=1,2", "sweep.sampler=cmaes", "sweep.trials=2"], "needs intervals of at least two keys"),
        (["seed=1,2", "sweep.pruner=median", "eval.every=0"], "Set eval.every=100, for example"),
        (["seed=1,2", "sweep.pruner=halving", "eval.every=1000"], "eval.every=1000 with steps_per_task=1000 has none"),
        (["eval.every=100,1000", "sweep.pruner=median"], "eval.every=1000 with steps_per_task=1000 has none"),
        (["seed=1,2", "sweep.metric=eval/score/men"], "unknown sweep.metric=eval/score/men; env=classic_pack has"),
        (["seed=1,2", "sweep.metric=eval/return/pong"], "sweep.metric=eval/return/pong; env=classic_pack has"),
        (["seed=1,2", "sweep.storage=somewhere"], "sweep.storage must be the URL of an Optuna storage"),
        (["seed=1,2", "ranks=2"], "torchrun"),
    ],
)
def test_invalid_overrides_are_refused_before_a_folder_is_created(words: list[str], message: str) -> None:
    assert message in refusal(*words)


def test_pack_without_reference_scores_requires_a_metric() -> None:
    words = ["env=gymnasium", "env.tasks=[Blackjack-v1,Taxi-v3]", "seed=1,2"]
    with pytest.raises(UserError, match=r"Set sweep.metric, such as sweep.metric=eval/return/Blackjack-v1"):
        sweep_plan.make(words)
    assert sweep_plan.make([*words, "sweep.metric=eval/return/Taxi-v3"]).trials == 2
    assert sweep_plan.make(["env=gymnasium", "env.tasks=[Blackjack-v1]", "seed=1,2"]).trials == 2, (
        "the return of a single task is the default metric"
    )
    with pytest.raises(UserError, match=r"has eval/return/Blackjack-v1, eval/return/Taxi-v3$"):
        sweep_plan.make([*words, "sweep.metric=eval/score/mean"])


def test_missing_package_of_a_sampler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("cmaes", "scipy") else find(name))
    for sampler, package in (("cmaes", "cmaes"), ("gp", "scipy")):
        message = refusal(LR, "agent.gamma=interval(0.9,1)", f"sweep.sampler={sampler}", "sweep.trials=3")
        assert message == str(extras.missing(f"sweep.sampler={sampler}", package, "search"))


def test_number_of_composed_configurations_is_the_sum_of_options_not_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[Any] = []
    one = compose.compose_training
    monkeypatch.setattr(compose, "compose_training", lambda words: composed.append(words) or one(words))
    make("network/sharing=hard,film,independent", "agent.double=true,false", "seed=range(100)")
    assert len(composed) == 1 + 2 + 1 + 1, "the first combination, each further option, and the largest of the hundred numbers"


def test_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "Start mtrl sweep without torchrun" in refusal("seed=1,2")
    with pytest.raises(UserError, match="Start mtrl sweep without torchrun"):
        sweep_plan.load(tmp_path)


# -- in the sweep's folder ------------------------------------------------------------------------------------------------------


def test_loaded_plan_equals_the_saved_plan(tmp_path: Path) -> None:
    grid = saved(tmp_path, "network/sharing=hard,film", "seed=range(3)", "launcher.jobs=2", "sweep.retries=5")
    found = sweep_plan.load(tmp_path)
    assert found == sweep_plan.replace(grid, run_dir=tmp_path, search={**grid.search, "trials": 6})
    assert sweep_plan.check_same(grid, tmp_path) == sweep_plan.replace(grid, search={**grid.search, "trials": 6})
    (tmp_path / "search").mkdir()
    search = saved(tmp_path / "search", LR, "agent.n_step=interval(1,8)", "sweep.trials=5")
    assert sweep_plan.load(tmp_path / "search") == sweep_plan.replace(search, run_dir=tmp_path / "search")


def test_sweep_over_sources_is_loaded(tmp_path: Path) -> None:
    plan = saved(tmp_path, "init_from=choice(runs/a,runs/b)", "launcher.jobs=2")
    assert sweep_plan.load(tmp_path).axes == plan.axes == {"init_from": Choices(("runs/a", "runs/b"))}


def test_launcher_retries_and_number_of_trials_may_change_on_resume(tmp_path: Path) -> None:
    saved(tmp_path, LR, "sweep.trials=5")
    plan = sweep_plan.load(tmp_path, ["launcher.jobs=3", "sweep.retries=0", "sweep.trials=8"])
    assert (plan.launcher["jobs"], plan.search["retries"], plan.trials) == (3, 0, 8)
    sweep_plan.save(plan, tmp_path, ["mtrl", "resume"])
    assert sweep_plan.load(tmp_path).trials == 8
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["command"].startswith("mtrl sweep"), "the original command is kept"
    # Repeating the original command keeps the additional trials.
    assert sweep_plan.check_same(make(LR, "sweep.trials=5", "launcher.jobs=2"), tmp_path).trials == 8
    assert sweep_plan.check_same(make(LR, "sweep.trials=9"), tmp_path).trials == 9


def test_number_of_trials_of_a_grid_may_be_raised_up_to_its_points(tmp_path: Path) -> None:
    saved(tmp_path, "seed=range(5)", "sweep.trials=2")
    assert sweep_plan.load(tmp_path, ["sweep.trials=4"]).points == tuple({"seed": str(seed)} for seed in range(4))
    with pytest.raises(UserError, match="at most the 5 points of the grid, got 6"):
        sweep_plan.load(tmp_path, ["sweep.trials=6"])
    with pytest.raises(UserError, match="can only be raised"):
        sweep_plan.load(tmp_path, ["sweep.trials=1"])


@pytest.mark.parametrize("word", ["seed=3", "seed=1,2", "env=classic_pack", "~launcher", "sweep.sampler=grid", "run_dir=x"])
def test_other_overrides_are_refused_on_resume(tmp_path: Path, word: str) -> None:
    saved(tmp_path, "seed=1,2")
    with pytest.raises(UserError, match="cannot be changed on resume"):
        sweep_plan.load(tmp_path, [word])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1,2", "agent.gamma=0.9"], "contains a sweep with other overrides of agent.gamma"),
        (["seed=1,2,3"], "contains a sweep with other values of seed"),
        (["seed=1,2", "agent.n_step=1,2"], "contains a sweep over seed, in this order"),
        (["seed=1,2", "sweep.seed=7"], "contains a sweep with another sweep.seed"),
        (["seed=1,2", "sweep.metric=eval/score/min"], "contains a sweep with another sweep.metric"),
        (["seed=1,2", "sweep.sampler=random", "sweep.trials=2"], "contains a sweep with another sweep.sampler"),
    ],
)
def test_another_sweep_is_refused_and_the_difference_named(tmp_path: Path, words: list[str], message: str) -> None:
    saved(tmp_path, "seed=1,2")
    with pytest.raises(UserError) as refused:
        sweep_plan.check_same(make(*words), tmp_path)
    assert message in str(refused.value)


def test_order_of_shared_overrides_does_not_matter(tmp_path: Path) -> None:
    plan = saved(tmp_path, "seed=1,2")
    assert sweep_plan.check_same(sweep_plan.make(["seed=1,2", *reversed(BASE)]), tmp_path).points == plan.points


def test_password_is_not_saved(tmp_path: Path) -> None:
    url = "postgresql://me:secret@host/sweeps"
    saved(tmp_path, "seed=1,2", f"sweep.storage={url}")
    assert "secret" not in (tmp_path / "sweep.json").read_text()
    with pytest.raises(UserError, match="not read from a folder"):
        sweep_plan.load(tmp_path)
    assert sweep_plan.load(tmp_path, [f"sweep.storage={url}"]).search["storage"] == url
    assert sweep_plan.check_same(make("seed=1,2", f"sweep.storage={url}"), tmp_path).search["storage"] == url
    with pytest.raises(UserError, match=r"another sweep.storage"):
        sweep_plan.check_same(make("seed=1,2"), tmp_path)


def test_searchpath_and_trusted_packages_are_never_loaded_from_a_sweep_folder(tmp_path: Path) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "optimizer" / "slow.yaml").write_text("# Slow\ndefaults: [adam, _self_]\nweight_decay: 0.5\n")
    (tmp_path / "sweep").mkdir()
    place = f"hydra.searchpath=[{tmp_path / 'conf'}]"
    plan = saved(tmp_path / "sweep", "optimizer=adam,slow", place, "trusted_packages=[mine]")
    assert plan.configuration({"optimizer": "slow"}, tmp_path)["optimizer"]["weight_decay"] == 0.5
    assert plan.trusted_packages == ("mine",)
    with pytest.raises(UserError) as refused:
        sweep_plan.load(tmp_path / "sweep")
    assert "hydra.searchpath" in str(refused.value).splitlines()[1], "the command to resume"
    found = sweep_plan.load(tmp_path / "sweep", [place])
    assert found.trusted_packages == ()
    assert found.configuration({"optimizer": "slow"}, tmp_path)["optimizer"]["weight_decay"] == 0.5


def damaged(**changes: Any) -> dict[str, Any]:
    good = {
        "format": 1,
        "command": "mtrl sweep",
        "shared": BASE,
        "axes": {"seed": {"choices": ["1", "2"]}},
        "points": [{"seed": "1"}, {"seed": "2"}],
        "search": {"sampler": "grid", "trials": 2, "pruner": "none", "storage": None, "metric": None, "retries": 2, "seed": 0},
        "launcher": {"_target_": "mtrl_cli.launchers.local.LocalLauncher", "jobs": 1},
        "env": "classic_pack",
        "steps_per_task": 1000,
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (damaged(format=99), "has format 99; this version of mtrl reads only format 1"),
        (damaged(shared="env=classic_pack"), "damaged"),
        (damaged(shared=[1]), "damaged"),
        (damaged(shared=["seed=${oc.env:HOME}"]), "is not an override of a sweep"),
        (damaged(shared=["trusted_packages=[evil]"]), "shared must contain only overrides of a single run"),
        (damaged(shared=["run_dir=/tmp/elsewhere"]), "shared must contain only overrides of a single run"),
        (damaged(shared=["agent.n_step=1,2"]), "shared must contain only overrides of a single run"),
        (damaged(axes={}), "expected at least one key in axes"),
        (damaged(axes={"run_dir": {"choices": ["/a", "/b"]}}), "damaged"),
        (damaged(axes={"trusted_packages": {"choices": ["[a]"]}}), "damaged"),
        (damaged(axes={"hydra.searchpath": {"choices": ["[/a]"]}}), "damaged"),
        (damaged(axes={"seed": {"choices": []}}), "damaged"),
        (damaged(axes={"seed": {"choices": ["${oc.env:HOME}"]}}), "damaged"),
        (damaged(axes={"seed": {"low": 2, "high": 1, "log": False, "whole": True}}), "damaged"),
        (damaged(axes={"seed": {"low": "a", "high": "b", "log": False, "whole": True}}), "damaged"),
        (damaged(axes={"seed": {"choices": ["1"]}, "a\nb": {"choices": ["1"]}}), "damaged"),
        (damaged(points=None), "damaged"),
        (damaged(points=[{"seed": "1"}]), "damaged"),
        (damaged(points=[{"seed": "1"}, {"seed": "3"}]), "damaged"),
        (damaged(points=[{"seed": "1"}, {"seed": "2", "run_dir": "/a"}]), "damaged"),
        (damaged(points=[{"seed": "1"}, ["seed"]]), "damaged"),
        (damaged(search={"sampler": "grid"}), "damaged"),
        (damaged(search={**damaged()["search"], "trials": 10**9}), "damaged"),
        (damaged(search={**damaged()["search"], "sampler": "auto"}), "damaged"),
        (damaged(search={**damaged()["search"], "retries": -1}), "damaged"),
        (damaged(steps_per_task="many"), "damaged"),
        (damaged(env=None), "damaged"),
        (damaged(launcher={}), "damaged"),
        (damaged(launcher={"_target_": "mtrl_cli.launchers.slurm.SlurmLauncher", "setup": ["rm"]}), "to resume on this machine"),
        (damaged(launcher={"_target_": "evil.local.LocalLauncher"}), "to resume on this machine"),
    ],
)
def test_untrusted_plan_is_validated(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(UserError) as refused:
        sweep_plan.load(tmp_path)
    assert message in str(refused.value)
    (tmp_path / "sweep.json").write_text(json.dumps(damaged()))
    assert sweep_plan.load(tmp_path).trials == 2


def test_folder_without_a_regular_sweep_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a sweep: sweep.json is missing"):
        sweep_plan.load(tmp_path)
    (tmp_path / "sweep.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="link out of"):
        sweep_plan.load(tmp_path)


def test_each_trial_has_its_own_step_budget() -> None:
    plan = sweep_plan.make(["env=classic_pack", "agent.learning_starts=100", "steps_per_task=1000,2e3"])
    assert plan.steps_per_task == 2000
    assert [plan.steps(point) for point in plan.points or ()] == [1000, 2000]


def test_planning_imports_neither_torch_nor_optuna() -> None:
    import subprocess

    code = "import sys; from mtrl_cli.sweeps import dry_run, plan, summary; print(*{'torch', 'optuna', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
