"""Compose the built-in configurations, save and load them, and refuse mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mtrl_cli.config import compose, options
from mtrl_cli.errors import UserError

CONF = options.conf_folder()
GROUPS = options.groups([CONF])


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))
    monkeypatch.delenv("MTRL_TRUSTED_PACKAGES", raising=False)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a user's configuration folder with a pack that extends a built-in one, and an optimizer."""
    folder = tmp_path / "own conf"
    (folder / "env").mkdir(parents=True)
    (folder / "optimizer").mkdir()
    (folder / "env" / "two.yaml").write_text(
        "# @package _global_\n# Two games\ndefaults: [atari_pack, _self_]\nenv: {name: two, tasks: [pong, tetris]}\nseed: 7\n"
    )
    (folder / "optimizer" / "slow.yaml").write_text("# Slow\ndefaults: [adam, _self_]\nlr: 1e-6\n")
    return folder


def other(group: str, option: str) -> list[str]:
    """Return overrides with which an option composes: some options require a pack."""
    more = {
        "mlp": ["env=classic_pack"],
        "minatar": ["env=minatar_pack"],
        "gymnasium": ["env.tasks=[CartPole-v1]"],
        "rollouts": ["agent=pqn"],
    }
    return [*more.get(option, []), f"{group}={option}"]


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options.options(group, [CONF])])
def test_every_option_composes_and_has_a_description(group: str, option: str) -> None:
    composed = compose.compose_training(other(group, option))
    assert options.description(options.options(group, [CONF])[option]), "the first comment describes the option"
    if group == "env":
        assert composed["env"]["name"] == option


@pytest.mark.parametrize("env", options.options("env", [CONF]))
def test_every_pack_composes_with_every_choice_that_does_not_depend_on_it(env: str) -> None:
    choices = ["network/sharing=independent", "network/head=plain", "replay=prioritized", "agent/value_scale=clip"]
    composed = compose.compose_training([*other("env", env), *choices])
    assert composed["network"]["sharing"]["_target_"].endswith(".IndependentSharing")
    assert composed["agent"]["value_scale"] == {"_target_": "mtrl_cli.agents.value_scale.ClipRewards", "limit": 1.0}


def test_packs_contain_the_documented_tasks() -> None:
    def tasks(env: str) -> list[str]:
        return compose.compose_training([f"env={env}"])["env"]["tasks"]

    names = [
        line.split(",")[0] for line in (Path(compose.__file__).parents[1] / "envs/data/atari57_scores.csv").read_text().splitlines()[1:]
    ]
    assert tasks("atari_57") == names
    assert len(names) == 57
    assert tasks("atari_pack") == ["pong", "breakout", "space_invaders", "seaquest", "beam_rider", "qbert", "enduro", "freeway"]
    assert len(tasks("atari_26")) == 26
    assert set(tasks("atari_26")) <= set(names)
    assert tasks("minatar_pack") == ["asterix", "breakout", "freeway", "seaquest", "space_invaders"]
    assert tasks("classic_pack") == ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


def test_pack_chooses_its_network_and_the_command_line_overrides_the_pack() -> None:
    classic = compose.compose_training(["env=classic_pack"])
    assert classic["network"]["_target_"].endswith(".MLP")
    assert classic["agent"]["value_scale"]["_target_"].endswith(".NoValueScale")
    assert compose.compose_training(["env=classic_pack", "agent.n_step=2", "agent/value_scale=clip"])["agent"]["n_step"] == 2
    assert compose.compose_training(["agent.n_step=2", "experiment=pong_breakout"])["agent"]["n_step"] == 2
    assert compose.compose_training(["network=impala"])["network"]["_target_"].endswith(".ImpalaCNN")
    assert compose.compose_training(["env=minatar_pack", "network=minatar", "network.features=32"])["network"]["features"] == 32


def test_integers_become_floats_where_floats_are_expected_and_auto_stays() -> None:
    composed = compose.compose_training(["agent.samples_per_step=4", "optimizer.lr=1e-4"])
    assert repr(composed["agent"]["samples_per_step"]) == "4.0"
    assert composed["optimizer"]["lr"] == 1e-4
    assert [composed[key] for key in ("device", "precision", "compile", "threads")] == ["auto"] * 4
    assert composed["replay"]["capacity"] == "auto"


def test_run_dir_may_be_any_path() -> None:
    for path in ("/tmp/a=b", "relative/x y", "a,b", "ä", "2025", "[x", 'quote"s', "back\\slash"):
        assert compose.compose_training([f"run_dir={path}"])["run_dir"] == path
    assert compose.compose_training(["run_dir=~/runs"])["run_dir"] == str(Path.home() / "runs")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env=atari_pak", "unknown option 'env=atari_pak'. Did you mean 'env=atari_pack'?"),
        ("env=zzz", "Expected one of: atari_26, atari_57, atari_pack, classic_pack, gymnasium, minatar_pack"),
        ("env=[atari_pack,minatar_pack]", "unknown option"),
        ("agent=null", "unknown option 'agent=null'. Expected one of: dqn, pqn"),
        ("network/shring=hard", "unknown group 'network/shring'. Did you mean 'network/sharing'?"),
        ("netwrok=mlp", "unknown key 'netwrok'. Did you mean 'network'?"),
        ("+netwrok=mlp", "unknown key 'netwrok'. Did you mean 'network'?"),
        ("agent.n_stp=3", "Did you mean 'agent.n_step'?"),
        ("++agent.n_stp=3", "Did you mean 'agent.n_step'?"),
        ("lr=3", "Did you mean 'optimizer.lr'?"),
        ("agent.n_step=three", "agent.n_step must be a positive integer, got 'three'"),
        ("optimizer.lr=-1", "optimizer.lr must be a positive number, got -1"),
        ("steps_per_task=0", "steps_per_task must be a positive integer, got 0"),
        ("steps_per_task=1.5", "steps_per_task must be a positive integer, got 1.5"),
        ("seed=1,2", "seed must be a single value, got 1,2. Use seed=[1,2] for a list, or mtrl sweep seed=1,2 for one run per value"),
        ("seed=range(3)", "seed must be a single value, got range(3). Use mtrl sweep 'seed=range(3)' for one run per value"),
        ("launcher=local", "launcher is a key of mtrl sweep"),
        ("launcher.jobs=2", "launcher.jobs is a key of mtrl sweep"),
        ("sweep.trials=3", "sweep.trials is a key of mtrl sweep"),
        ("seed=choice(1,2)", "seed must be a single value"),
        ("env.tasks=[pong,breakot]", "unknown task 'breakot' of atari_pack in env.tasks. Did you mean 'breakout'?"),
        ("env.tasks=[SpaceInvaders]", "Did you mean 'space_invaders'?"),
        ("env.tasks=[]", "env.tasks must be a non-empty list of names, got []"),
        ("env.tasks=[pong,pong]", "env.tasks contains pong twice"),
        ("env.tasks=pong", "env.tasks must be a non-empty list of names, got 'pong'"),
        ("network.sharing=hard", "network.sharing is a group. Choose an option with network/sharing=hard"),
        ("env@pack=atari_pack", "packages (@) are not supported. Use env=atari_pack"),
        ("hydra.run.dir=x", "hydra.run.dir is not supported. Use only hydra.searchpath="),
        ("hydra.searchpath=[/nowhere/at/all]", "hydra.searchpath must list folders, such as [file:///home/me/conf], got /nowhere/at/all"),
        ("hydra.searchpath=[pkg://os]", "hydra.searchpath must list folders"),
        ("atari_pack", "'atari_pack' is not an override. Did you mean 'env=atari_pack'?"),
        ("quickstart", "Did you mean 'experiment=quickstart'?"),
        ("nonsense", "'nonsense' is not an override. Expected KEY=VALUE"),
        ("", "Expected KEY=VALUE"),
        ("=3", "Expected KEY=VALUE"),
        ("env.tasks=[pong", "Expected KEY=VALUE"),
        ("~network", "network has no _target_"),
        ("~agent.gamma", "agent.gamma is missing"),
        ("~agent.gama", "cannot be composed"),
        ("seed=${oc.env:NO_SUCH_VARIABLE_HERE}", "cannot be composed"),
        ("seed=???", "cannot be composed"),
        ("env.tasks.x=3", "cannot be composed"),
        ("run_dir='\\${x}'", "contains '${'"),
        ("++network._target_=os.system", "network._target_ must be a class of mtrl_cli, got os.system"),
        ("++network._target_=mtrl_cli.commands.train.shutil.copy", "network._target_ must be a Torso defined in mtrl_cli"),
    ],
)
def test_wrong_override_is_refused_in_at_most_two_lines(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.compose_training([override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_search_path_adds_options_packs_and_tasks(own: Path) -> None:
    composed = compose.compose_training(["env=two", "optimizer=slow", f"hydra.searchpath=[file://{own}]"])
    assert composed["env"]["tasks"] == ["pong", "tetris"]
    assert composed["seed"] == 7
    assert composed["optimizer"] == {**compose.compose_training([])["optimizer"], "lr": 1e-6}
    assert "two" in options.options("env", compose.search_path([f"hydra.searchpath=[{own}]"]))


def test_option_in_a_user_folder_must_not_shadow_a_built_in_option(own: Path) -> None:
    (own / "optimizer" / "adam.yaml").write_text("# Mine\nlr: 1\n")
    with pytest.raises(UserError, match="Rename your file"):
        compose.compose_training(["optimizer=adam", f"hydra.searchpath=[{own}]"])


def test_invalid_yaml_in_a_user_folder_is_named(own: Path) -> None:
    (own / "env" / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        compose.compose_training([f"hydra.searchpath=[{own}]"])


def test_saved_configuration_loads_unchanged(tmp_path: Path) -> None:
    for overrides in ([], ["env=classic_pack", "optimizer.lr=1e-7", "agent.epsilon_tasks={CartPole-v1:0.2}", "run_dir=1e5"]):
        composed = compose.compose_training(overrides)
        (tmp_path / "config.yaml").write_text(compose.dump(composed))
        assert compose.load(tmp_path / "config.yaml") == yaml.safe_load(compose.dump(composed)) == composed
    assert "&" not in compose.dump({"a": (shared := ["x"]), "b": shared})


def test_exponent_in_a_saved_file_is_read_as_a_number(tmp_path: Path) -> None:
    composed = compose.compose_training([])
    path = tmp_path / "config.yaml"
    path.write_text(compose.dump(composed).replace("lr: 0.0001", "lr: 1e-4"))
    assert "1e-4" in path.read_text()
    assert compose.load(path) == composed


def test_trusted_packages_come_from_command_line_environment_and_settings_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compose.trusted_packages() == []
    assert compose.trusted_packages(["trusted_packages=[mine]"]) == ["mine"]
    monkeypatch.setenv("MTRL_TRUSTED_PACKAGES", "a.b, c")
    settings = tmp_path / "no-settings" / "mtrl" / "settings.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("trusted_packages: [d, c]\n")
    assert compose.trusted_packages(["trusted_packages=[mine]"]) == ["a.b", "c", "d", "mine"]
    assert compose.compose_training(["trusted_packages=[mine]"])["trusted_packages"] == ["a.b", "c", "d", "mine"]
    monkeypatch.delenv("MTRL_TRUSTED_PACKAGES")
    settings.unlink()
    own = compose.compose_training([]) | {"trusted_packages": ["os"]}
    (tmp_path / "config.yaml").write_text(compose.dump(own))
    assert compose.load(tmp_path / "config.yaml")["trusted_packages"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trusted_packages: os", "trusted_packages must be a list of names, got 'os'"),
        ("trust: [a]", "unknown key 'trust'"),
        ("trusted_packages: ['a;b']", "trusted_packages must contain dotted package names, got 'a;b'"),
        ("- a", "must contain keys and values"),
    ],
)
def test_invalid_settings_are_refused(content: str, message: str, tmp_path: Path) -> None:
    settings = tmp_path / "no-settings" / "mtrl" / "settings.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text(content)
    with pytest.raises(UserError, match=message):
        compose.trusted_packages()


def test_experiment_cannot_add_trusted_packages(own: Path) -> None:
    (own / "experiment").mkdir()
    (own / "experiment" / "evil.yaml").write_text("# @package _global_\n# Evil\ntrusted_packages: [os]\nnetwork: {_target_: os.system}\n")
    with pytest.raises(UserError, match="must be a class of mtrl_cli"):
        compose.compose_training(["experiment=evil", f"hydra.searchpath=[{own}]"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(compose.dump(compose.compose_training(["device=cpu"])))
    return folder


def test_resume_may_change_budget_and_device(run: Path) -> None:
    before = compose.load_run(run)
    assert before["device"] == "cpu"
    after = compose.load_run(run, ["steps_per_task=9000000", "device=cuda:1", "trusted_packages=[mine]"])
    assert after == {**before, "steps_per_task": 9000000, "device": "cuda:1", "trusted_packages": ["mine"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "seed=3: a resumed run keeps its configuration. Change only steps_per_task, device or trusted_packages"),
        ("env.tasks=[pong,qbert]", "a resumed run keeps its configuration"),
        ("network=impala", "a resumed run keeps its configuration"),
        ("steps_per_task=1000", "agent.learning_starts must be at most steps_per_task=1000, got 10000"),
        ("steps_per_task=20000", "steps_per_task must be at least 2500000, the budget of the run, got 20000"),
        ("steps_per_task=many", "must be a positive integer, got 'many'"),
        ("steps_per_task=", "must be a positive integer, got ''"),
        ("device=gpu", "device must be auto, cpu, cuda or cuda:<index>, got 'gpu'"),
        ("~device", "a resumed run keeps its configuration"),
        ("nonsense", "KEY=VALUE"),
    ],
)
def test_resume_refuses_other_changes(run: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.load_run(run, [override])
    assert message in str(caught.value)


def test_folder_without_configuration_is_not_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is not a run folder"):
            compose.load_run(folder)


def test_evaluation_uses_the_values_of_the_run_by_default() -> None:
    nothing: dict[str, Any] = {"episodes": None, "max_steps": None, "epsilon": None, "seed": None}
    assert compose.compose_evaluation([]) == {
        "checkpoint": "latest", "video": False, "device": None, "trusted_packages": [], "eval": nothing,
    }  # fmt: skip
    given = compose.compose_evaluation(["eval.episodes=10", "video=true", "checkpoint=20000", "device=cpu", "eval.epsilon=0"])
    assert given["eval"] == {**nothing, "episodes": 10, "epsilon": 0.0}
    assert (given["checkpoint"], given["video"], given["device"]) == (20000, True, "cpu")
    assert compose.compose_evaluation(["checkpoint=best"])["checkpoint"] == "best"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.episode=1", "Did you mean 'eval.episodes'?"),
        ("eval.episodes=0", "eval.episodes must be a positive integer or null, got 0"),
        ("checkpoint=newest", "checkpoint must be latest or best or a non-negative integer, got 'newest'"),
        ("checkpoint=-1", "must be latest or best or"),
        ("video=yes please", "video must be true or false, got 'yes please'"),
        ("env.tasks=[pong]", "mtrl eval uses the env of the run"),
        ("seed=1", "mtrl eval uses the seed of the run"),
        ("network=impala", "mtrl eval uses the network of the run"),
        ("eval.every=3", "unknown key 'eval.every'. Keys of eval: episodes,"),
        ("vido=true", "Did you mean 'video'?"),
    ],
)
def test_evaluation_refuses_keys_of_training(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.compose_evaluation([override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


# -- values tuned for an agent and a pack -------------------------------------------------------------------------------------------

SEARCHED = "hydra.searchpath=[file://{}]"


def packs() -> list[str]:
    return list(options.options("env", [CONF]))


@pytest.mark.parametrize("env", packs())
@pytest.mark.parametrize("agent", options.options("agent", [CONF]))
def test_every_pack_composes_with_every_agent(env: str, agent: str) -> None:
    composed = compose.compose_training([*other("env", env), f"agent={agent}"])
    assert composed["agent"]["_target_"].lower().endswith(f".{agent}")
    rollouts = agent == "pqn"
    assert composed["replay"]["_target_"].endswith(".Rollouts") == rollouts
    assert composed["optimizer"]["_target_"].endswith(".RAdam") == rollouts
    assert composed["network"]["layer_norm"] or not rollouts
    assert composed["env"]["num_envs"] == (8 if agent == "dqn" else 32 if env == "minatar_pack" else 16)


def test_user_packs_experiments_and_command_line_override_tuned_values(own: Path) -> None:
    """Packs that extend a built-in pack inherit its tuned values."""
    (own / "experiment").mkdir()
    (own / "env" / "poles.yaml").write_text(
        "# @package _global_\n# One game\ndefaults: [classic_pack, _self_]\n"
        "env: {name: poles, tasks: [CartPole-v1], num_envs: 4}\nagent: {epsilon_steps: 77}\n"
    )
    (own / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# Mine\ndefaults: [override /env: poles, override /agent: pqn]\nagent: {epochs: 3}\n"
    )
    searched = SEARCHED.format(own)
    dqn = compose.compose_training(["env=poles", searched])
    ours = compose.compose_training(["env=classic_pack"])
    assert dqn["agent"] == ours["agent"] | {"epsilon_steps": 77}
    assert dqn["agent"]["batch_size"] == 64
    assert (dqn["optimizer"], dqn["env"]["num_envs"]) == (ours["optimizer"], 4)
    pqn = compose.compose_training(["experiment=mine", "agent.minibatches=2", searched])
    assert (pqn["agent"]["epochs"], pqn["agent"]["minibatches"], pqn["agent"]["epsilon_steps"]) == (3, 2, 77)
    assert pqn["agent"]["trace_decay"] == compose.compose_training(["env=classic_pack", "agent=pqn"])["agent"]["trace_decay"] == 0.95
    assert pqn["env"]["num_envs"] == 4


def test_user_pack_may_set_keys_of_one_agent(own: Path) -> None:
    (own / "env" / "hasty.yaml").write_text(
        "# @package _global_\n# Hasty\ndefaults: [minatar_pack, _self_]\nenv: {name: hasty}\nagent: {n_step: 7, target_period: 9}\n"
    )
    composed = compose.compose_training(["env=hasty", SEARCHED.format(own)])
    assert (composed["agent"]["n_step"], composed["agent"]["target_period"]) == (7, 9)
    with pytest.raises(UserError, match=r"unknown key 'agent\.n_step' in PQN. Remove the key, or choose agent=dqn"):
        compose.compose_training(["env=hasty", "agent=pqn", SEARCHED.format(own)])


def test_tuned_is_not_a_group_to_choose_from() -> None:
    assert "tuned" not in options.groups([CONF])
    with pytest.raises(UserError, match="tuned cannot be chosen, because env and agent determine tuned"):
        compose.compose_training(["tuned=dqn_minatar_pack"])
    for file in (CONF / "tuned").glob("*.yaml"):
        agent, _, pack = file.stem.partition("_")
        assert agent in options.options("agent", [CONF]), file
        assert pack in packs(), file


def test_rollouts_require_an_agent_that_learns_from_rollouts() -> None:
    with pytest.raises(UserError, match="replay=Rollouts requires an agent that learns from rollouts, got agent=DQN"):
        compose.compose_training(["replay=rollouts"])
    with pytest.raises(UserError, match="agent=PQN requires replay=rollouts, got UniformReplay"):
        compose.compose_training(["agent=pqn", "replay=uniform"])


def test_sweep_composes_its_own_keys() -> None:
    composed = compose.compose_sweep(["launcher.jobs=2", "sweep.trials=3", "sweep.sampler=tpe", "run_dir=~/a,b"])
    assert composed["launcher"]["jobs"] == 2
    assert composed["launcher"]["_target_"] == "mtrl_cli.launchers.local.LocalLauncher"
    assert (composed["sweep"]["trials"], composed["sweep"]["sampler"], composed["sweep"]["retries"]) == (3, "tpe", 2)
    assert composed["run_dir"] == f"{Path.home()}/a,b"
    assert compose.compose_sweep([])["run_dir"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.trails=3", "unknown key 'sweep.trails'. Did you mean 'sweep.trials'?"),
        ("sweep.trials=0", "sweep.trials must be a positive integer or null, got 0"),
        ("sweep.sampler=tpee", "sweep.sampler must be auto, grid, random, tpe, cmaes or gp, got 'tpee'"),
        ("launcher=loca", "unknown option 'launcher=loca'. Did you mean 'launcher=local'?"),
        ("launcher.job=1", "Did you mean 'launcher.jobs'?"),
        ("launcher.jobs=none", "launcher.jobs must be a positive integer, got 'none'"),
        ("launcher._target_=os.system", "must be a class of mtrl_cli"),
        ("launcher._target_=mtrl_cli.training.optimizers.Adam", "must be a Launcher defined in mtrl_cli"),
        ("seed=3", "unknown key 'seed'"),
    ],
)
def test_wrong_sweep_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        compose.compose_sweep([override])
    assert message in str(refused.value)


def test_search_path_adds_launchers(tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "two.yaml").write_text("# Two at a time\ndefaults: [local, _self_]\njobs: 2\n")
    assert compose.compose_sweep([f"hydra.searchpath=[{tmp_path}]", "launcher=two"])["launcher"]["jobs"] == 2
    assert options.groups([CONF, tmp_path], "sweep") == ["launcher"]
    assert "launcher" not in options.groups([CONF, tmp_path])
