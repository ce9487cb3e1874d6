"""Composition without Hydra gives what Hydra gives, key by key and in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mtrl_cli.config import compose, merge, options
from mtrl_cli.config.overrides import parse

CONF = options.conf_folder()


def both(overrides: Sequence[str], folders: Sequence[Path] = (CONF,), command: str = "train") -> tuple[str, str]:
    """The configuration as text: merged, and composed by Hydra."""
    given = [parse(text, command) for text in overrides]
    known = [] if command == "eval" else options.groups(folders, command)
    for_hydra = [compose._checked(each, known, folders) for each in given]
    return str(compose._merged(command, folders, given, for_hydra)), str(compose._composed_by_hydra(command, folders, for_hydra))


def test_every_option_of_every_group_equals_hydra() -> None:
    """The n-th composition takes the n-th option of each group, so that each option occurs."""
    names = {group: list(options.options(group, [CONF])) for group in options.groups([CONF], "train")}
    for number in range(max(map(len, names.values()))):
        chosen = [f"{group}={found[number % len(found)]}" for group, found in names.items() if group != "experiment"]
        merged, composed = both(chosen)
        assert merged == composed, chosen


@pytest.mark.parametrize("agent", options.options("agent", [CONF]))
def test_what_packs_and_experiments_choose_equals_hydra(agent: str) -> None:
    for choice in [f"{group}={option}" for group in ("env", "experiment") for option in options.options(group, [CONF])]:
        merged, composed = both([choice, f"agent={agent}"])
        assert merged == composed, choice


@pytest.mark.parametrize(
    "overrides",
    [
        ["augmentation=[noise,shift]", "env=atari_57"],
        ["augmentation=[]"],
        ["agent.n_step=5", "network.sharing={_target_: a, x: 1}", "network.sharing.x=2"],
        ["agent.epsilon_tasks={pong: 0.1}", "agent.epsilon_tasks.CartPole-v1=1e-4"],
        ["env.new.deep.key=[1,[2,{a: null}]]", "env.tasks=[pong,'a b']"],
        ["seed.x=3", "env.tasks=null", "optimizer.lr='1e-4'"],
        ["experiment=quickstart", "env=minatar_pack", "network=mlp", "agent=pqn", "optimizer=sgd"],
    ],
)
def test_overrides_equal_hydra(overrides: list[str]) -> None:
    merged, composed = both(overrides)
    assert merged == composed


@pytest.mark.parametrize(("command", "overrides"), [("eval", ["eval.episodes=3"]), ("sweep", ["launcher=ray", "sweep.trials=3"])])
def test_other_commands_equal_hydra(command: str, overrides: list[str]) -> None:
    merged, composed = both(overrides, command=command)
    assert merged == composed


def user_folder(folder: Path, files: dict[str, str]) -> list[Path]:
    """The search path of a user whose folder holds these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [CONF, folder]


def test_files_of_users_equal_hydra(tmp_path: Path) -> None:
    folders = user_folder(
        tmp_path,
        {
            "env/mine.yaml": "# @package _global_\ndefaults:\n  - classic_pack\n\nenv:\n  tasks: [CartPole-v1]\nsteps_per_task: 7\n",
            "experiment/both.yaml": "# @package _global_\ndefaults:\n  - override /env: mine\n  - override /network: small\n\nseed: 3\n",
            "network/small.yaml": "_target_: mtrl_cli.networks.torsos.MLP\nhidden: [8]\nday: 2026-01-01\nlr: 1e-4\nyes_: yes\n",
            "optimizer/empty.yaml": "",
        },
    )
    for overrides in (["env=mine"], ["experiment=both"], ["experiment=both", "env=atari_57"], ["network=small", "optimizer=empty"]):
        merged, composed = both(overrides, folders)
        assert merged == composed, overrides


@pytest.mark.parametrize(
    ("file", "text", "override"),
    [
        ("network/mine.yaml", "hidden: ${seed}\n", "network=mine"),
        ("network/mine.yaml", "hidden: ???\n", "network=mine"),
        ("network/mine.yaml", "hidden: [8]\nhidden: [9]\n", "network=mine"),
        ("network/mine.yaml", "# @package _group_\nhidden: [8]\n", "network=mine"),
        ("network/mine.yaml", "defaults:\n  - mlp\nhidden: [8]\n", "network=mine"),
        ("env/mine.yaml", "# @package _global_\ndefaults:\n  - /network: mlp\n", "env=mine"),
        ("env/mine.yaml", "# @package _global_\ndefaults:\n  - override /nothing: mlp\n", "env=mine"),
        ("env/mine.yaml", "# @package _global_\ndefaults:\n  - nothing\n", "env=mine"),
        ("env/mine.yaml", "# @package _global_\nnetwork: [8]\n", "env=mine"),
        ("env/mine.yaml", "", "~augmentation"),
        ("env/mine.yaml", "", "env.tasks.0=pong"),
        ("env/mine.yaml", "", "seed=${steps_per_task}"),
    ],
)
def test_other_features_are_left_to_hydra(file: str, text: str, override: str, tmp_path: Path) -> None:
    folders = user_folder(tmp_path, {file: text})
    with pytest.raises(merge.NeedsHydra):
        both([override], folders)


def test_a_changed_file_is_read_again_and_results_share_nothing(tmp_path: Path) -> None:
    folders = user_folder(tmp_path, {"network/mine.yaml": "hidden: [8]\n"})
    first = merge.compose("train", folders, {"network": "mine"}, [])
    first["network"]["hidden"].append(9)
    assert merge.compose("train", folders, {"network": "mine"}, [])["network"]["hidden"] == [8]
    (tmp_path / "network/mine.yaml").write_text("hidden: [7]\n")
    assert merge.compose("train", folders, {"network": "mine"}, [])["network"]["hidden"] == [7]
