"""Choosing augmentations: one, several, none; their keys; what is refused, and how; and runs with them, through the command line."""

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


def test_there_are_those_of_the_issue() -> None:
    assert OPTIONS == EVERY


def test_none_is_the_default_and_an_empty_section() -> None:
    assert compose_training([])["augmentation"] == {}
    assert compose_training(["augmentation=none"])["augmentation"] == {}
    assert compose_training(["augmentation=[]"])["augmentation"] == {}


@pytest.mark.parametrize("name", EVERY)
def test_one_is_a_section_of_its_own(name: str) -> None:
    composed = compose_training([f"augmentation={name}"])["augmentation"]
    assert list(composed) == [name]
    assert composed == compose_training([f"augmentation=[{name}]"])["augmentation"]


@pytest.mark.parametrize("names", [["shift", "intensity"], ["intensity", "shift"], ["blur", "noise", "crop", "rotate"]])
def test_a_list_keeps_its_order_into_the_file_and_back(names: list[str], tmp_path: Path) -> None:
    composed = compose_training([f"augmentation=[{','.join(names)}]"])
    assert list(composed["augmentation"]) == names
    (tmp_path / "config.yaml").write_text(compose.dump(composed))
    assert list(compose.load(tmp_path / "config.yaml")["augmentation"]) == names


def test_a_key_is_set_by_the_augmentations_name() -> None:
    composed = compose_training(["augmentation=[shift,intensity]", "augmentation.shift.pad=2", "augmentation.intensity.scale=0.1"])
    assert composed["augmentation"]["shift"]["pad"] == 2
    assert composed["augmentation"]["intensity"]["scale"] == 0.1


def test_an_experiment_may_choose_several(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /augmentation: [noise, shift]\n")
    composed = compose_training([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert list(composed["augmentation"]) == ["noise", "shift"]


def test_runs_from_before_there_was_any_still_load(tmp_path: Path) -> None:
    older = compose_training([]) | {"augmentation": {"_target_": "mtrl_cli.augmentation.NoAugmentation"}}
    for name in ("loss_draws", "target_draws"):
        del older["agent"][name]
    del older["env"]["symmetric"]
    (tmp_path / "config.yaml").write_text(compose.dump(older))
    loaded = compose.load(tmp_path / "config.yaml")
    assert loaded["augmentation"] == {}
    assert (loaded["agent"]["loss_draws"], loaded["agent"]["target_draws"]) == (1, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["augmentation=shfit"], "augmentation=shfit: there is no such option; did you mean shift?"),
        (["augmentation=[shift,intensty]"], "augmentation=intensty: there is no such option; did you mean intensity?"),
        (["augmentation=[shift,blur,shift]"], "augmentation names shift twice: expected each once"),
        (["augmentation=[none,shift]"], "augmentation names none beside others: expected none alone, or the others"),
        (["augmentation=shift", "augmentation.shift.pda=2"],
         "augmentation.shift.pda: there is no such key in Shift; did you mean augmentation.shift.pad?"),
        (["augmentation=shift", "augmentation.shift.degrees=2"],
         "augmentation.shift.degrees: there is no such key in Shift; it is one of augmentation=rotate"),
        (["augmentation=shift", "augmentation.pad=2"], "augmentation.pad=2: expected augmentation.shift.pad, or another of its keys"),
        (["augmentation=shift", "augmentation.shift.pad=-1"], "augmentation.shift.pad=-1: expected a whole number of at least 0 or auto"),
        (["augmentation=shift", "augmentation.shift.pad=much"], "shift.pad=much: expected a whole number of at least 0 or auto"),
        (["augmentation=shift", "augmentation.blur.low=1"], "blur is not chosen here"),
        (["agent.loss_draws=2"], "agent.loss_draws=2 averages over draws of an augmentation, and there is none"),
        (["agent.target_draws=3"], "agent.target_draws=3 averages over draws of an augmentation, and there is none"),
        (["agent=pqn", "augmentation=shift", "agent.loss_draws=2"], "agent.loss_draws: there is no such key in PQN"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_line(words: list[str], message: str) -> None:
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
def test_a_strangers_section_is_refused_in_two_lines(section: object, tmp_path: Path) -> None:
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
def test_the_shell_completes_lists_and_keys(incomplete: str, given: list[str], words: list[str]) -> None:
    assert [word for word, _ in completion.complete("train", given, incomplete)] == words


def test_auto_becomes_the_pad_of_the_packs_images() -> None:
    for task, env, pad in (("pong", "atari_pack", 4), ("asterix", "minatar_pack", 1)):
        words = [f"env={env}", f"env.tasks=[{task}]", "device=cpu", "compile=false", "replay.capacity=500"]
        composed = compose_training([*words, "augmentation=[intensity,shift]"])
        settled = resolve_auto.settle(composed, build_run.make_pack(composed), print)
        assert settled["augmentation"]["shift"]["pad"] == pad
        assert list(settled["augmentation"]) == ["intensity", "shift"]


# -- mirrors ------------------------------------------------------------------------------------------------------------------


def test_names_in_a_mirror() -> None:
    assert [mirrored_name(name) for name in ("NOOP", "LEFT", "UPRIGHTFIRE", "DOWNLEFT")] == ["NOOP", "RIGHT", "UPLEFTFIRE", "DOWNRIGHT"]
    assert mirrored_actions(["NOOP", "RIGHT", "LEFT", "UPLEFT", "UPRIGHT"]) == [0, 2, 1, 4, 3]
    with pytest.raises(ValueError, match="has the action UPLEFT and no UPRIGHT"):
        mirrored_actions(["NOOP", "UPLEFT"])


@pytest.mark.parametrize("full", [False, True])
def test_every_games_actions_have_their_mirror_images_among_them_and_twice_mirrored_are_themselves(full: bool) -> None:
    games = yaml.safe_load((options.conf_folder() / "env" / "atari_57.yaml").read_text())["env"]["tasks"]
    for task in AtariPack(name="all", tasks=games, full_action_space=full).tasks:
        mirrored = mirrored_actions(task.action_meanings)
        assert [mirrored[each] for each in mirrored] == list(range(task.num_actions)), task.name
        sides = [name for name in task.action_meanings if "LEFT" in name or "RIGHT" in name]
        assert sum(mirrored[each] != each for each in range(task.num_actions)) == len(sides), task.name


@pytest.mark.parametrize("env", ["atari_pack", "minatar_pack"])
def test_games_that_are_symmetric_are_known_and_of_the_pack(env: str) -> None:
    composed = compose_training([f"env={env}"])
    assert len(composed["env"]["symmetric"]) >= 4
    composed["env"]["tasks"] = composed["env"]["symmetric"]
    assert all(task.symmetric for task in build_run.make_pack(composed).tasks)
    composed["env"]["symmetric"] = ["braekout"]
    with pytest.raises(UserError, match="'braekout' is not"):
        build_run.make_pack(composed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env=atari_pack"], "augmentation=flip: pong looks or plays otherwise in a mirror (it is not in env.symmetric); "
                             "of these tasks such as can be flipped are env.tasks=[breakout,space_invaders,seaquest]"),
        (["env=minatar_pack"], "freeway looks or plays otherwise in a mirror"),
        (["env=atari_pack", "env.tasks=[pong,freeway]"], "none of these tasks can be flipped"),
        (["env=classic_pack"], "Flip changes images, and this pack's are vectors; for these there are noise and scale"),
    ],
)  # fmt: skip
def test_a_flip_of_what_is_otherwise_in_a_mirror_is_refused_before_anything_starts(words: list[str], message: str, here: MtrlHere) -> None:
    refused = here("train", *words, "augmentation=flip", "device=cpu", "compile=false", "replay.capacity=500", "run_dir=run", code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (here.folder / "run").exists()


def test_ranks_draw_differently_and_the_first_as_one_alone() -> None:
    composed = compose_training(["env=minatar_pack", "augmentation=[shift,crop]", "device=cpu", "compile=false", "replay.capacity=500"])
    pack = build_run.make_pack(composed)

    class Second(type(ALONE)):  # type: ignore[misc]
        def label(self, purpose: str) -> str:
            return f"{purpose}, rank 1"

    agent = build_run.make_run(resolve_auto.settle(composed, pack, print), pack, print).agent
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
def test_with_every_augmentation_a_run_learns_otherwise_and_resumes_exactly(
    words: list[str], augmentation: list[str], here: MtrlHere
) -> None:
    here("train", *words, *augmentation, "run_dir=run")
    rows = [json.loads(line) for line in (here.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in rows if "grad/norm" in row][-1]["updates"] >= 8
    assert all(math.isfinite(value) for row in rows for value in row.values())
    last = here.folder / "run" / "checkpoints" / "96"
    before = [(last / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")]
    shutil.rmtree(last)  # as if it had been killed before
    assert "resuming from step 48" in here("resume", "run").stdout
    assert [(last / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")] == before
    if augmentation == ["augmentation=shift"]:
        here("train", *words, "run_dir=plain")
        assert (here.folder / "plain" / "checkpoints" / "96" / "model.safetensors").read_bytes() != before[0]


def test_rollouts_are_augmented_too(here: MtrlHere) -> None:
    kept = [word for word in IMAGES if not word.startswith("agent.")]
    for overlap in ("false", "true"):
        rollouts = ["agent=pqn", "agent.rollout_length=8", "agent.minibatches=4", f"agent.overlap={overlap}"]
        here("train", *kept, *rollouts, "augmentation=[flip,shift]", f"run_dir={overlap}")
        rows = [json.loads(line) for line in (here.folder / overlap / "metrics.jsonl").read_text().splitlines()]
        assert [row for row in rows if "grad/norm" in row][-1]["updates"] >= 8
