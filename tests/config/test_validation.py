"""Validation reads class signatures from source code and imports nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mtrl_cli.config import introspection, validation
from mtrl_cli.config.compose import compose_training
from mtrl_cli.errors import UserError
from mtrl_cli.types import Auto, Fraction, Names, NonNegativeInt, PositiveFloat, PositiveInt

SOURCE = """
from __future__ import annotations
import shutil
from abc import ABC
from typing import ClassVar
from shapes import Torso as Imported
raise SystemExit("imported")

class Torso(ABC):
    pass

class Other(ABC):
    pass

Alias = shutil.copy
Renamed = Imported

class Small(Torso):
    observation_kind: ClassVar[str] = "image"
    computed = len("abc")

    def __init__(self, shape: tuple[int, ...], *, size: PositiveInt = 3, mode: Literal["a", "b"],
                 names: dict[str, Fraction] = {}, rest: float = 1 / 3):
        pass

class Bare(Torso):
    pass

class Stranger(Other):
    pass

class Grandchild(Small):
    pass

if True:
    class Hidden(Torso):
        pass

def make():
    class Inner(Torso):
        pass
"""

KIND = "mtrl_cli.networks.torsos.Torso"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "mtrl_cli"
    (folder / "toys").mkdir(parents=True)
    (folder / "toys" / "__init__.py").write_text("class Packaged(Torso): pass\n")
    (folder / "toys" / "torsos.py").write_text(SOURCE)
    (tmp_path / "outside.py").write_text("class Outside(Torso): pass\n")
    return folder


def read(target: Any, root: Path, trusted: tuple[str, ...] = ()) -> introspection.Signature:
    return introspection.read("network._target_", target, KIND, trusted, root)


def test_signature_has_keyword_only_parameters_with_types_and_defaults(root: Path) -> None:
    found = read("mtrl_cli.toys.torsos.Small", root)
    assert list(found.keys) == ["size", "mode", "names", "rest"]
    assert found.keys["size"].annotation == PositiveInt
    assert found.keys["size"].default == 3
    assert found.keys["mode"].annotation == Literal["a", "b"]
    assert found.keys["mode"].default is introspection.MISSING
    assert found.keys["names"].default == {}
    assert found.keys["rest"].default is introspection.UNKNOWN
    assert found.attributes == {"observation_kind": "image"}


def test_class_without_init_has_no_keys_and_may_be_defined_in_a_package(root: Path) -> None:
    assert read("mtrl_cli.toys.torsos.Bare", root).keys == {}
    assert read("mtrl_cli.toys.Packaged", root).target == "mtrl_cli.toys.Packaged"


@pytest.mark.parametrize(
    "target",
    [
        "mtrl_cli.toys.torsos.Alias",  # alias of a function
        "mtrl_cli.toys.torsos.Imported",  # an import
        "mtrl_cli.toys.torsos.Renamed",
        "mtrl_cli.toys.torsos.shutil.copy",  # through an import
        "mtrl_cli.toys.torsos.Torso",  # the base class itself
        "mtrl_cli.toys.torsos.Stranger",  # another base class
        "mtrl_cli.toys.torsos.Grandchild",
        "mtrl_cli.toys.torsos.Hidden",
        "mtrl_cli.toys.torsos.Inner",
        "mtrl_cli.toys.torsos.make",
        "mtrl_cli.toys.torsos.Small.__init__",
        "mtrl_cli.toys.torsos",
        "mtrl_cli.toys",
        "mtrl_cli",
        "mtrl_cli.nothing.Small",
        "mtrl_cli...outside.Outside",
        "mtrl_cli./../outside.Outside",
        "mtrl_clix.toys.torsos.Small",
        "os.system",
        "builtins.eval",
        "",
        ".",
        "small",
        None,
        3,
        ["mtrl_cli.toys.torsos.Small"],
    ],
)
def test_target_that_is_not_a_class_of_the_package_is_refused(target: Any, root: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(target, root)
    assert "network._target_" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_link_out_of_the_package_is_not_followed(root: Path) -> None:
    (root / "linked.py").symlink_to(root.parent / "outside.py")
    with pytest.raises(UserError, match="must be a Torso defined in mtrl_cli"):
        read("mtrl_cli.linked.Outside", root)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a user package with a class of the base class, other classes and imports."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "mtrl_plugin_of_mine.py").write_text(
        "import shutil\nfrom mtrl_cli.task_weights.base import TaskWeights\nfrom mtrl_cli.types import PositiveInt\n"
        "class Mine(TaskWeights):\n    def __init__(self, tasks, *, power: PositiveInt = 2): pass\n"
        "class NotOne: pass\n"
        "from mtrl_cli.training.optimizers import Optimizer\n"
        "class Moves(Optimizer):\n    def __init__(self, *network, mine: PositiveInt = 4, max_grad_norm: PositiveInt, **common): pass\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield "mtrl_plugin_of_mine"
    sys.modules.pop("mtrl_plugin_of_mine", None)


WEIGHTS = "mtrl_cli.task_weights.base.TaskWeights"


def test_only_trusted_packages_are_imported(plugin: str) -> None:
    for trusted in ((), ("mtrl_plugin",), (plugin + "x",), ("",)):
        with pytest.raises(UserError, match=rf"trusted_packages=\[{plugin}\]"):
            introspection.read("task_weights._target_", f"{plugin}.Mine", WEIGHTS, trusted)
        assert plugin not in sys.modules
    found = introspection.read("task_weights._target_", f"{plugin}.Mine", WEIGHTS, (plugin,))
    assert found.keys["power"] == introspection.Key(PositiveInt, 2)
    assert introspection.import_class(f"{plugin}.Mine").__name__ == "Mine"


def test_class_with_further_keywords_has_the_keys_of_its_base_class(plugin: str) -> None:
    """Built-in classes are read, user classes imported. A key of the class replaces the key of the base class."""
    kind = "mtrl_cli.training.optimizers.Optimizer"
    common = {"lr", "lr_final", "schedule", "warm_up", "factors", "weight_decay", "max_grad_norm"}
    ours = introspection.read("optimizer._target_", "mtrl_cli.training.optimizers.SGD", kind)
    assert set(ours.keys) == common | {"momentum", "nesterov"}
    assert ours.keys["warm_up"].default == 0
    theirs = introspection.read("optimizer._target_", f"{plugin}.Moves", kind, (plugin,))
    assert set(theirs.keys) == common | {"mine"}
    assert theirs.keys["max_grad_norm"].annotation == PositiveInt
    assert theirs.keys["warm_up"] == ours.keys["warm_up"]


@pytest.mark.parametrize("name", ["NotOne", "shutil", "TaskWeights", "nothing", "shutil.copy", "Mine.__init__"])
def test_trusted_package_must_define_a_subclass_of_the_base_class(plugin: str, name: str) -> None:
    with pytest.raises(UserError, match=r"must be a subclass of .*TaskWeights|cannot be imported"):
        introspection.read("task_weights._target_", f"{plugin}.{name}", WEIGHTS, (plugin,))


@pytest.mark.parametrize(
    ("annotation", "value", "result"),
    [
        (PositiveFloat, 1, 1.0),
        (PositiveInt | Auto, "auto", "auto"),
        (PositiveInt | Auto, 7, 7),
        (bool | Auto, False, False),
        (Names, ["a"], ["a"]),
        (dict[str, Fraction], {"a": 0}, {"a": 0.0}),
        (str | None, None, None),
    ],
)
def test_values_of_the_right_type_are_accepted(annotation: Any, value: Any, result: Any) -> None:
    checked = validation.check_value("key", value, annotation)
    assert checked == result
    assert type(checked) is type(result)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (PositiveInt, 0, "a positive integer"),
        (PositiveInt, True, "a positive integer"),
        (PositiveInt, 1.5, "a positive integer"),
        (PositiveInt, "1", "a positive integer"),
        (NonNegativeInt, -1, "a non-negative integer"),
        (PositiveFloat, True, "a positive number"),
        (PositiveFloat, float("inf"), "a positive number"),
        (PositiveFloat, float("nan"), "a positive number"),
        (PositiveInt, 2**63, "below 2**63"),
        (Fraction, 1.5, "a number from 0 to 1"),
        (Fraction, float("nan"), "a number from 0 to 1"),
        (bool, 1, "true or false"),
        (bool | Auto, "maybe", "true or false or auto"),
        (Literal["auto", "fp32", "bf16"], "fp16", "auto, fp32 or bf16"),
        (PositiveInt | Auto, "lots", "a positive integer or auto"),
        (Names, [], "a non-empty list of names"),
        (Names, "pong", "a non-empty list of names"),
        (list[PositiveInt], [3, 0], "a list, each a positive integer"),
        (dict[str, Fraction], {"a": 2}, "a mapping of names to values, each a number from 0 to 1"),
        (str | None, 3, "text or null"),
        (Annotated[str, Field(pattern="^a$", description="an a")], "b", "an a"),
    ],
)
def test_value_of_a_wrong_type_is_refused_with_the_expected_type(annotation: Any, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        validation.check_value("agent.key", value, annotation)
    assert str(caught.value) == f"agent.key must be {expected}, got {repr(value) if isinstance(value, str) else validation.show(value)}"


def changed(key: str, value: Any) -> dict[str, Any]:
    """Return the default configuration with one key changed, added, or (`...`) removed."""
    config = compose_training([])
    node = config
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return config


def test_valid_configuration_is_unchanged() -> None:
    config = compose_training([])
    assert validation.validate(config) == config


def test_omitted_defaults_are_filled_in() -> None:
    assert validation.validate(changed("network.width", ...))["network"]["width"] == 1.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("agent.n_stp", 3, "unknown key 'agent.n_stp' in DQN. Did you mean 'agent.n_step'?"),
        ("n_step", 3, "unknown key 'n_step'. Did you mean 'agent.n_step'?"),
        ("learning_rate", 3, "unknown key 'learning_rate'"),
        ("checkpoint.evry", 3, "unknown key 'checkpoint.evry'. Did you mean 'checkpoint.every'?"),
        ("network.sharing.x", 3, "unknown key 'network.sharing.x' in HardSharing. Keys of network.sharing: none"),
        ("agent.n_step", ..., "agent.n_step is missing. Set agent.n_step to a positive integer"),
        ("eval", ..., "eval is missing"),
        ("resets", ..., "resets is missing"),
        ("eval.test_seed", ..., "eval.test_seed is missing"),
        ("ranks", ..., "ranks is missing"),
        ("seed", ..., "seed is missing"),
        ("network._target_", ..., "network has no _target_. Choose an option with network=NAME (see `mtrl ls network`)"),
        ("network.head", "plain", "network.head must be a section of keys and values, got plain. Choose an option with network/head=NAME"),
        ("eval", 5, "eval must be a section of keys and values, got 5"),
        ("agent", None, "agent must be a section of keys and values, got null"),
        ("env.name", "../up", "env.name must be letters, digits"),
        ("env.name", "..", "env.name must be letters, digits"),
        ("device", "gpu", "device must be auto, cpu, cuda or cuda:<index>, got 'gpu'"),
        ("device", "cuda:", "device must be auto, cpu"),
        ("steps_per_task", 0, "steps_per_task must be a positive integer, got 0"),
        ("steps_per_task", -5, "steps_per_task must be a positive integer, got -5"),
        ("env.tasks", [], "env.tasks must be a non-empty list of names, got []"),
        ("env.tasks", ["pong", "qbert", "pong"], "env.tasks contains pong twice"),
        ("agent.epsilon_start", 0.001, "agent.epsilon_end must be at most agent.epsilon_start=0.001, got 0.01"),
        ("agent.epsilon_tasks", {"pog": 0.1}, "unknown task 'pog' in agent.epsilon_tasks. Did you mean 'pong'?"),
        ("steps_per_task", 5000, "agent.learning_starts must be at most steps_per_task=5000, got 10000"),
        ("replay.capacity", 3, "replay.capacity must be above agent.n_step=3, got 3"),
        ("network._target_", "mtrl_cli.networks.torsos.MLP", "network.hidden is missing"),
    ],
)
def test_invalid_configuration_is_refused_in_at_most_two_lines(key: str, value: Any, message: str) -> None:
    config = changed(key, value)
    if message == "network.hidden is missing":
        config["network"] = {name: config["network"][name] for name in ("_target_", "sharing", "head")}
    with pytest.raises(UserError) as caught:
        validation.validate(config)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_target_network_without_updates_is_refused() -> None:
    config = changed("agent.target_period", 0)
    config["agent"]["target_tau"] = 0.0
    with pytest.raises(UserError, match=r"target_tau must be above 0 and at most 1 with agent\.target_period=0, got 0\.0"):
        validation.validate(config)


@pytest.mark.parametrize(("env", "network"), [("atari_pack", "mlp"), ("minatar_pack", "mlp")])
def test_torso_for_other_observations_is_refused(env: str, network: str) -> None:
    with pytest.raises(UserError, match=f"network=MLP requires vector observations, and env={env} has image observations"):
        compose_training([f"env={env}", f"network={network}"])


@pytest.mark.parametrize("value", ["a\x1b[2Jb", "line\nline", "x" * 500, {"a": "b\n"}, None, True])
def test_shown_value_is_one_short_line(value: Any) -> None:
    shown = validation.show(value)
    assert shown.isprintable()
    assert len(shown) <= 80


def test_integer_may_be_written_with_an_exponent() -> None:
    value = validation.check_value("steps_per_task", 1e6, PositiveInt)
    assert (value, type(value)) == (1_000_000, int)
    assert type(validation.check_value("lr", 1.0, PositiveFloat)) is float
    assert validation.check_value("capacity", 1e5, PositiveInt | Auto) == 100_000
