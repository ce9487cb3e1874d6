"""Augmentations through the command line: composition, keys, errors, and runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mtrl_cli.augmentation.mirror import mirrored_actions, mirrored_name
from mtrl_cli.build import augmentation as build_augmentation
from mtrl_cli.build import resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.cli import completion
from mtrl_cli.config import compose, options
from mtrl_cli.config.compose import compose_training
from mtrl_cli.envs.atari import AtariPack
from mtrl_cli.errors import UserError
from mtrl_cli.parallel.distributed import ALONE
from tests.helpers.command import MtrlHere

OPTIONS = sorted(set(options.options("augmentation", [options.conf_folder()])) - {"none"})
EVERY = ["blur", "crop", "cutout", "flip", "intensity", "noise", "rotate", "scale", "shift"]
CLASSIC = [
    "env=classic_pack",
    "env.num_envs=4",
    "steps_per_task=96",
    "agent.learning_starts=16",
    "agent.batch_size=8",
    "agent.samples_per_step=1",
    "network.hidden=[16,16]",
    "eval.every=0",
    "eval.episodes=1",
    "eval.max_steps=20",
    "checkpoint.every=48",
    "log.every=48",
    "log.diagnostics=48",
    "threads=1",
    "device=cpu",
    "compile=false",
]
IMAGES = [
    *(word for word in CLASSIC if not word.startswith(("env=", "network."))),
    "env=minatar_pack",
    "env.tasks=[breakout,seaquest]",
    "network.features=16",
]


# -- composing ----------------------------------------------------------------------------------------------------------------


def test_all_documented_augmentations_exist() -> None:
    assert OPTIONS == EVERY


def test_default_is_none_an_empty_section() -> None:
    assert compose_training([])["augmentation"] == {}
    assert compose_training(["augmentation=none"])["augmentation"] == {}
    assert compose_training(["augmentation=[]"])["augmentation"] == {}


@pytest.mark.parametrize("name", EVERY)
def test_single_augmentation_is_a_section_with_its_name(name: str) -> None:
    composed = compose_training([f"augmentation={name}"])["augmentation"]
    assert list(composed) == [name]
    assert composed == compose_training([f"augmentation=[{name}]"])["augmentation"]


@pytest.mark.parametrize("names", [["shift", "intensity"], ["intensity", "shift"], ["blur", "noise", "crop", "rotate"]])
def test_list_keeps_its_order_when_saved_and_loaded(names: list[str], tmp_path: Path) -> None:
    composed = compose_training([f"augmentation=[{','.join(names)}]"])
    assert list(composed["augmentation"]) == names
    (tmp_path / "config.yaml").write_text(compose.dump(composed))
    assert list(compose.load(tmp_path / "config.yaml")["augmentation"]) == names


def test_key_is_set_by_the_name_of_the_augmentation() -> None:
    composed = compose_training(["augmentation=[shift,intensity]", "augmentation.shift.pad=2", "augmentation.intensity.scale=0.1"])
    assert composed["augmentation"]["shift"]["pad"] == 2
    assert composed["augmentation"]["intensity"]["scale"] == 0.1


def test_experiment_may_choose_several_augmentations(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /augmentation: [noise, shift]\n")
    composed = compose_training([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert list(composed["augmentation"]) == ["noise", "shift"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["augmentation=shfit"], "unknown option 'augmentation=shfit'. Did you mean 'augmentation=shift'?"),
        (["augmentation=[shift,intensty]"], "unknown option 'augmentation=intensty'. Did you mean 'augmentation=intensity'?"),
        (["augmentation=[shift,blur,shift]"], "augmentation contains shift twice. List each option once"),
        (["augmentation=[none,shift]"], "augmentation contains none and other options"),
        (["augmentation=shift", "augmentation.shift.pda=2"],
         "unknown key 'augmentation.shift.pda' in Shift. Did you mean 'augmentation.shift.pad'?"),
        (["augmentation=shift", "augmentation.shift.degrees=2"],
         "unknown key 'augmentation.shift.degrees' in Shift. Remove the key, or choose augmentation=rotate"),
        (["augmentation=shift", "augmentation.pad=2"], "unknown key 'augmentation.pad'. Use augmentation.shift.pad"),
        (["augmentation=shift", "augmentation.shift.pad=-1"], "augmentation.shift.pad must be a non-negative integer or auto, got -1"),
        (["augmentation=shift", "augmentation.shift.pad=much"], "shift.pad must be a non-negative integer or auto, got 'much'"),
        (["augmentation=shift", "augmentation.blur.low=1"], "blur is not chosen"),
        (["agent.loss_draws=2"], "agent.loss_draws=2 requires an augmentation"),
        (["agent.target_draws=3"], "agent.target_draws=3 requires an augmentation"),
        (["agent=pqn", "augmentation=shift", "agent.loss_draws=2"], "unknown key 'agent.loss_draws' in PQN"),
    ],
)  # fmt: skip
def test_wrong_override_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_training(words)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "section",
    [
        {"shift": {"_target_": "os.system", "command": "touch x"}},
        {"shift": {"_target_": "mtrl_cli.augmentation.geometry.torch.load", "f": "x"}},
        {"shift": {"_target_": "mtrl_cli.augmentation.geometry.Augmentation"}},
        {"shift": {"_target_": "mtrl_cli.augmentation.base.Pipeline"}},
        {"shift": {"_target_": "mtrl_cli.networks.torsos.MLP", "hidden": [4]}},
        {"shift": {"_target_": "evil.Shift"}},
        {"shift": {"inner": {"_target_": "os.system"}}},
        {"a/b": {"_target_": "mtrl_cli.augmentation.geometry.Shift", "pad": 1}},
        {"../x": {"_target_": "mtrl_cli.augmentation.geometry.Shift", "pad": 1}},
        {1: {"_target_": "mtrl_cli.augmentation.geometry.Shift", "pad": 1}},
        {"_target_": "pickle.loads", "_args_": ["x"]},
        {"_target_": "mtrl_cli.augmentation.NoAugmentation", "shift": {}},
        {"_target_": "mtrl_cli.augmentation.geometry.Shift", "pad": 1},
        {"shift": None},
        ["shift"],
        "shift",
        None,
    ],
)
def test_invalid_section_of_a_run_folder_is_refused_in_two_lines(section: object, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(compose.dump(compose_training([]) | {"augmentation": section}))
    with pytest.raises(UserError) as caught:
        compose.load(tmp_path / "config.yaml")
    assert len(str(caught.value).splitlines()) <= 2
    assert "augmentation" in str(caught.value)


@pytest.mark.parametrize(
    ("incomplete", "given", "words"),
    [
        ("augmentation=sh", [], ["augmentation=shift"]),
        ("augmentation=[sh", [], ["augmentation=[shift]", "augmentation=[shift,"]),
        ("augmentation=[shift,in", [], ["augmentation=[shift,intensity]", "augmentation=[shift,intensity,"]),
        ("augmentation.sh", ["augmentation=[shift,blur]"], ["augmentation.shift.pad=auto"]),
        ("augmentation.blur.", ["augmentation=[shift,blur]"], ["augmentation.blur.low=", "augmentation.blur.high="]),
    ],
)
def test_completion_of_lists_and_keys(incomplete: str, given: list[str], words: list[str]) -> None:
    assert [word for word, _ in completion.complete("train", given, incomplete)] == words


def test_auto_pad_depends_on_the_images_of_the_pack() -> None:
    for task, env, pad in (("pong", "atari_pack", 4), ("asterix", "minatar_pack", 1)):
        words = [f"env={env}", f"env.tasks=[{task}]", "device=cpu", "compile=false", "replay.capacity=500"]
        composed = compose_training([*words, "augmentation=[intensity,shift]"])
        resolved = resolve_auto.resolve(composed, build_run.make_pack(composed), print)
        assert resolved["augmentation"]["shift"]["pad"] == pad
        assert list(resolved["augmentation"]) == ["intensity", "shift"]


# -- mirrors ------------------------------------------------------------------------------------------------------------------


def test_mirrored_action_names() -> None:
    assert [mirrored_name(name) for name in ("NOOP", "LEFT", "UPRIGHTFIRE", "DOWNLEFT")] == ["NOOP", "RIGHT", "UPLEFTFIRE", "DOWNRIGHT"]
    assert mirrored_actions(["NOOP", "RIGHT", "LEFT", "UPLEFT", "UPRIGHT"]) == [0, 2, 1, 4, 3]


@pytest.mark.parametrize("full", [False, True])
def test_mirrored_actions_of_every_game_exist_and_mirroring_twice_changes_nothing(full: bool) -> None:
    games = yaml.safe_load((options.conf_folder() / "env" / "atari_57.yaml").read_text())["env"]["tasks"]
    for task in AtariPack(name="all", tasks=games, full_action_space=full).tasks:
        mirrored = mirrored_actions(task.action_meanings)
        assert [mirrored[each] for each in mirrored] == list(range(task.num_actions)), task.name
        sides = [name for name in task.action_meanings if "LEFT" in name or "RIGHT" in name]
        assert sum(mirrored[each] != each for each in range(task.num_actions)) == len(sides), task.name


@pytest.mark.parametrize("env", ["atari_pack", "minatar_pack"])
def test_symmetric_games_are_tasks_of_the_pack(env: str) -> None:
    composed = compose_training([f"env={env}"])
    assert len(composed["env"]["symmetric"]) >= 4
    composed["env"]["tasks"] = composed["env"]["symmetric"]
    assert all(task.symmetric for task in build_run.make_pack(composed).tasks)
    composed["env"]["symmetric"] = ["braekout"]
    with pytest.raises(UserError, match="unknown task 'braekout'"):
        build_run.make_pack(composed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env=atari_pack"], "augmentation=flip requires tasks that can be mirrored, but pong is not in env.symmetric. "
                             "Use env.tasks=[breakout,space_invaders,seaquest]"),
        (["env=minatar_pack"], "freeway is not in env.symmetric"),
        (["env=atari_pack", "env.tasks=[pong,freeway]"], "Use another augmentation"),
        (["env=classic_pack"], "Flip requires image observations, got vector observations. Use noise or scale"),
    ],
)  # fmt: skip
def test_flip_of_an_asymmetric_task_is_refused_before_the_run_starts(words: list[str], message: str, here: MtrlHere) -> None:
    refused = here("train", *words, "augmentation=flip", "device=cpu", "compile=false", "replay.capacity=500", "run_dir=run", code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (here.folder / "run").exists()


def test_ranks_draw_differently_and_the_first_rank_as_a_single_process() -> None:
    composed = compose_training(["env=minatar_pack", "augmentation=[shift,crop]", "device=cpu", "compile=false", "replay.capacity=500"])
    pack = build_run.make_pack(composed)

    class Second(type(ALONE)):  # type: ignore[misc]
        def label(self, purpose: str) -> str:
            return f"{purpose}, rank 1"

    agent = build_run.make_run(resolve_auto.resolve(composed, pack, print), pack, print).agent
    device = torch.device("cpu")
    of_ranks = [
        build_augmentation.make_augmentation(composed, pack, agent, device, ranks).state_dict() for ranks in (ALONE, ALONE, Second())
    ]
    states = [[part["generator"] for part in each.values()] for each in of_ranks]
    assert all(torch.equal(mine, other) for mine, other in zip(states[0], states[1], strict=True))
    assert not any(torch.equal(mine, other) for mine, other in zip(states[0], states[2], strict=True))
    assert not torch.equal(*states[0])


# -- runs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "augmentation"),
    [
        *((IMAGES, [f"augmentation={name}"]) for name in EVERY),
        (IMAGES, ["augmentation=[shift,intensity]", "agent.loss_draws=2", "agent.target_draws=2", "task_weights=pcgrad"]),
        (IMAGES, ["augmentation=[flip,noise]", "agent.target_draws=2", "replay=prioritized"]),
        (CLASSIC, ["augmentation=[noise,scale]", "augmentation.noise.std=0.1"]),
    ],
    ids=lambda words: ",".join(words) if words[0].startswith("augmentation") else "",
)
def test_every_augmentation_changes_training_and_resumes_exactly(words: list[str], augmentation: list[str], here: MtrlHere) -> None:
    here("train", *words, *augmentation, "run_dir=run")
    rows = [json.loads(line) for line in (here.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in rows if "grad/norm" in row][-1]["updates"] >= 8
    assert all(math.isfinite(value) for row in rows for value in row.values())
    last = here.folder / "run" / "checkpoints" / "96"
    before = [(last / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")]
    shutil.rmtree(last)  # as after a kill before the checkpoint
    assert "resuming from step 48" in here("resume", "run").stdout
    assert [(last / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")] == before
    if augmentation == ["augmentation=shift"]:
        here("train", *words, "run_dir=plain")
        assert (here.folder / "plain" / "checkpoints" / "96" / "model.safetensors").read_bytes() != before[0]


def test_rollouts_are_augmented(here: MtrlHere) -> None:
    kept = [word for word in IMAGES if not word.startswith("agent.")]
    for overlap in ("false", "true"):
        rollouts = ["agent=pqn", "agent.rollout_length=8", "agent.minibatches=4", f"agent.overlap={overlap}"]
        here("train", *kept, *rollouts, "augmentation=[flip,shift]", f"run_dir={overlap}")
        rows = [json.loads(line) for line in (here.folder / overlap / "metrics.jsonl").read_text().splitlines()]
        assert [row for row in rows if "grad/norm" in row][-1]["updates"] >= 8
