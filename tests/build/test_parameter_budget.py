"""`network.parameters`: every structure meets the budget within 2% if integer widths allow it; other budgets are refused."""

from __future__ import annotations

import itertools
import random
import re
import types
from functools import partial
from typing import Any

import pytest
import yaml

from mtrl_cli.build import network as build_network
from mtrl_cli.build import parameter_budget, resolve_auto
from mtrl_cli.config import compose, options, validation
from mtrl_cli.config import schema as sections
from mtrl_cli.envs.pack import Task
from mtrl_cli.errors import UserError
from tests.helpers.command import MtrlHere

CONF = [options.conf_folder()]
ANNOTATION = sections.OWN_KEYS["network"]["parameters"].annotation
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "nature": [(4, 84, 84)] * 3,
    "impala": [(3, 24, 24)] * 3,
    "minatar": [(4, 10, 10), (6, 10, 10), (7, 10, 10)],
    "mlp": [(4,), (6,), (2,)],
}


def pack_of(torso: str) -> Any:
    """Return a minimal pack for building a network: three tasks with observations for `torso`."""
    shaped = zip("xyz", SHAPES[torso], (2, 6, 3), strict=True)
    tasks = [Task(name, shape, actions, tuple("abcdef"[:actions]), 1, None, None) for name, shape, actions in shaped]
    return types.SimpleNamespace(observation_kind="vector" if torso == "mlp" else "image", stack=1, tasks=tasks, observation_scale=1.0)


def composed(torso: str, *overrides: str) -> dict[str, Any]:
    env = {"minatar": "minatar_pack", "mlp": "classic_pack"}.get(torso, "atari_pack")
    return compose.compose_training([f"env={env}", f"network={torso}", "device=cpu", *overrides])


def total(configured: dict[str, Any], torso: str) -> int:
    return build_network.empty_network(configured, pack_of(torso)).parameter_counts().total


def within(configured: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return configured | {"network": configured["network"] | changes}


# -- values ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "number"),
    [
        (1_700_000, 1_700_000),
        (1.7e6, 1_700_000),
        ("1.7M", 1_700_000),
        ("850k", 850_000),
        ("850K", 850_000),
        ("2G", 2 * 10**9),
        ("0.05M", 50_000),
    ],
)
def test_budget_may_have_a_unit(written: Any, number: int) -> None:
    given = validation.check_value("network.parameters", written, ANNOTATION)
    assert parameter_budget.parse(given) == number
    assert given == written, "kept as written"
    assert isinstance(given, int | str)


def test_default_budget_is_null() -> None:
    assert composed("nature")["network"]["parameters"] is None
    assert composed("nature", "network.parameters=1.7e6")["network"]["parameters"] == 1_700_000


@pytest.mark.parametrize(
    "written",
    [0, -5, "lots", 1.5, "0k", "0.0M", "-1M", "1.7m", "M", "", "1.7 M", "1.7M ", "9" * 30 + "k", 1e400, float("nan"), True, [1], 10**20],
)
def test_invalid_budget_is_refused_in_one_line(written: Any) -> None:
    with pytest.raises(UserError, match=r"network\.parameters must be (a number|below)") as caught:
        validation.check_value("network.parameters", written, ANNOTATION)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("written", "shown"), [("0", "0"), ("-5", "-5"), ("lots", "'lots'")])
def test_command_refuses_an_invalid_budget_and_creates_nothing(here: MtrlHere, written: str, shown: str) -> None:
    message = here("train", f"network.parameters={written}", code=2).stderr
    assert message == (
        f"mtrl: error: network.parameters must be a number of parameters, such as 1700000, 850k, 1.7M or 2G or null, got {shown}\n"
    )
    assert list(here.folder.iterdir()) == []


# -- the search -----------------------------------------------------------------------------------------------------------------


STRUCTURES = list(options.options("network/sharing", CONF))


@pytest.mark.parametrize(
    ("torso", "sharing"),
    # Large torsos are slow to build and add no further cases.
    [*itertools.product(["minatar", "mlp"], STRUCTURES), *itertools.product(["nature", "impala"], ["hard", "independent"])],
)
def test_every_structure_meets_random_budgets_and_resolving_twice_changes_nothing(torso: str, sharing: str) -> None:
    draw = random.Random(f"{torso}/{sharing}")
    head = draw.choice(list(options.options("network/head", CONF)))
    parts = {group: schema_section(f"network/{group}", name) for group, name in (("sharing", sharing), ("head", head))}
    plain = within(composed(torso), parts)
    default = total(plain, torso)
    for _ in range(2):
        wanted = round(default * 2 ** draw.uniform(-2, 4))
        fitted = resolve_auto.fit_network(within(plain, {"parameters": wanted}), pack_of(torso))
        assert abs(total(fitted, torso) / wanted - 1) <= 0.02
        assert resolve_auto.fit_network(fitted, pack_of(torso)) == fitted
        assert fitted["network"]["parameters"] == wanted
        before = dict(compose.flat(plain))
        changed = {key for key, value in compose.flat(fitted) if value != before[key]}
        assert changed <= {"network.parameters", *resolve_auto.scaled_keys(fitted)}


def schema_section(group: str, option: str) -> dict[str, Any]:
    """Compose the keys of an option."""
    return yaml.safe_load(options.options(group, CONF)[option].read_text())


@pytest.mark.parametrize("head", options.options("network/head", CONF))
def test_parameters_of_every_head_are_counted(head: str) -> None:
    plain = within(composed("minatar"), {"head": schema_section("network/head", head)})
    wanted = 2 * total(plain, "minatar")
    fitted = resolve_auto.fit_network(within(plain, {"parameters": wanted}), pack_of("minatar"))
    assert abs(total(fitted, "minatar") / wanted - 1) <= 0.02


@pytest.mark.parametrize("seed", range(30))
def test_small_network_meets_its_budget_where_integer_widths_allow(seed: int) -> None:
    """Compare with all widths of a small torso: a budget is refused only if no width meets it, and the error names possible sizes."""
    draw = random.Random(seed)
    tasks, weight = draw.randint(1, 8), draw.randint(1, 9)

    def count(values: dict[str, Any]) -> int:
        channels, features = values["channels"], values["features"]
        return tasks * ((weight + 1) * channels + (16 * channels + 1) * features + 4 * (features + 1))

    wanted = draw.randint(100, 3000)
    sizes = {count({"channels": channels, "features": features}) for channels in range(1, 100) for features in range(1, 200)}
    possible = [size for size in sizes if abs(size - wanted) <= 0.02 * wanted]
    fit = partial(parameter_budget.fit, {"channels": 16, "features": 128}, wanted, count)
    if possible:
        assert count(fit()) in possible
        return
    with pytest.raises(UserError) as caught:
        fit()
    named = [int(word.replace(",", "")) for word in re.findall(r"[\d,]*\d(?!%)", str(caught.value).partition(":")[2])]
    assert named
    assert set(named) <= sizes


def test_ratios_of_widths_are_kept() -> None:
    def count(values: dict[str, Any]) -> int:
        return sum(a * b for a, b in zip([100, *values["hidden"]], values["hidden"], strict=False)) + round(1e5 * values["factor"])

    fitted = parameter_budget.fit({"hidden": [512, 256, 128], "factor": 2.0}, 3_000_000, count)
    factor = fitted["factor"] / 2
    assert fitted["hidden"] == [round(units * factor) for units in (512, 256, 128)]
    assert abs(count(fitted) - 3_000_000) <= 60_000


def test_width_that_a_structure_refuses_is_skipped() -> None:
    """A width with count 0 is never chosen: here fewer than 8 units cannot be built."""

    def count(values: dict[str, Any]) -> int:
        return 10 * values["units"] if values["units"] >= 8 else 0

    assert parameter_budget.fit({"units": 64}, 80, count) == {"units": 8}
    with pytest.raises(UserError, match="Use a nearby size: 80"):
        parameter_budget.fit({"units": 64}, 50, count)


# -- refusals, through the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["network.parameters=40"], ["network.parameters must be at least ", "the size of this network at its smallest width, got 40"]),
        (["network.parameters=900000G"], ["network.parameters=900000G requires", "GiB"]),
        (["network.parameters=90000000000000"], ["GiB"]),
        (
            ["network.parameters=60", "network.hidden=[64]", "network.layer_norm=false"],
            ["is not within 2% of any size", "nearby size: 5"],
        ),
    ],
)
def test_budget_that_no_width_meets_is_refused_before_anything_is_created(here: MtrlHere, overrides: list[str], words: list[str]) -> None:
    message = here("train", "env=classic_pack", *overrides, code=2).stderr
    for word in words:
        assert word in message
    assert len(message.splitlines()) <= 2
    assert list(here.folder.iterdir()) == []


def test_budget_for_a_torso_of_one_width_is_refused(here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.folder / "narrow.py").write_text(
        "from torch import nn\n"
        "from mtrl_cli.networks.torsos import Torso\n"
        "class Narrow(Torso):\n"
        "    observation_kind = 'vector'\n"
        "    def __init__(self, *, units: int = 4):\n"
        "        self.num_features = units\n"
        "    def stem(self, shape):\n"
        "        return nn.Linear(shape[0], self.num_features)\n"
        "    def body(self, shape):\n"
        "        return nn.Sequential(nn.ReLU())\n"
    )
    monkeypatch.syspath_prepend(str(here.folder))
    own = here.folder / "conf" / "network" / "narrow.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# Narrow\n_target_: narrow.Narrow\nunits: 4\n")
    words = ["env=classic_pack", "network=narrow", "trusted_packages=[narrow]", f"hydra.searchpath=[file://{here.folder}/conf]"]
    message = here("train", *words, "network.parameters=1k", code=2).stderr
    assert "narrow.Narrow, which has one width" in message
    assert len(message.splitlines()) == 1


# -- a run ----------------------------------------------------------------------------------------------------------------------

RUN = [
    "env=classic_pack", "network/sharing=independent", "network.parameters=9k", "agent.learning_starts=50", "agent.batch_size=8",
    "agent.samples_per_step=2", "steps_per_task=160", "eval.episodes=1", "eval.max_steps=5", "checkpoint.every=80", "device=cpu",
    "replay.capacity=200",
]  # fmt: skip


def test_resumed_run_keeps_its_widths(here: MtrlHere) -> None:
    here("train", *RUN, "run_dir=run")
    saved = yaml.safe_load((here.folder / "run" / "config.yaml").read_text())
    assert saved["network"]["parameters"] == "9k"
    assert saved["network"]["hidden"] != [256, 256]
    metrics = (here.folder / "run" / "metrics.jsonl").read_text().splitlines()[0]
    counted = yaml.safe_load(metrics)["parameters/total"]
    assert abs(counted / 9000 - 1) <= 0.02
    for words in (["resume", "run", "steps_per_task=240"], ["train", *RUN, "run_dir=run", "--or-resume", "steps_per_task=320"]):
        printed = here(*words).stdout
        assert "ignored from this command" not in printed
        after = yaml.safe_load((here.folder / "run" / "config.yaml").read_text())
        assert after["network"] == saved["network"]
    assert (here.folder / "run" / "checkpoints" / "latest").read_text().strip() == "320"
    assert "Validation at step 320" in here("eval", "run", "eval.episodes=1").stdout
