"""Composition without Hydra gives the same configuration as Hydra: the same values in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mtrl_cli.config import compose, merge, options
from mtrl_cli.config.overrides import parse

CONF = options.conf_folder()


def both(overrides: Sequence[str], command: str = "train", folders: Sequence[Path] = (CONF,)) -> tuple[str, str]:
    """Return the merged configuration and the one that Hydra composes, as text."""
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
def test_options_chosen_by_packs_and_experiments_equal_hydra(agent: str) -> None:
    for choice in [f"{group}={option}" for group in ("env", "experiment") for option in options.options(group, [CONF])]:
        merged, composed = both([choice, f"agent={agent}"])
        assert merged == composed, choice


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("train", ["augmentation=[noise,shift]", "env=atari_57"]),
        ("train", ["augmentation=[]"]),
        ("train", ["agent.n_step=5", "network.sharing={_target_: a, x: 1}", "network.sharing.x=2"]),
        ("train", ["agent.epsilon_tasks={pong: 0.1}", "agent.epsilon_tasks.CartPole-v1=1e-4"]),
        ("train", ["env.new.deep.key=[1,[2,{a: null}]]", "env.tasks=[pong,'a b']"]),
        ("train", ["seed.x=3", "env.tasks=null", "optimizer.lr='1e-4'"]),
        ("train", ["experiment=quickstart", "env=minatar_pack", "network=mlp", "agent=pqn", "optimizer=sgd"]),
        ("eval", ["eval.episodes=3"]),
        ("sweep", ["launcher=ray", "sweep.trials=3"]),
    ],
)
def test_overrides_equal_hydra(command: str, overrides: list[str]) -> None:
    merged, composed = both(overrides, command)
    assert merged == composed


@pytest.mark.parametrize("override", ["~augmentation", "env.tasks.0=pong", "env.tasks={a: 1}", "seed=${steps_per_task}", "seed=???"])
def test_other_overrides_are_left_to_hydra(override: str) -> None:
    with pytest.raises(merge.NeedsHydra):
        both([override])


def test_folders_of_users_are_left_to_hydra(tmp_path: Path) -> None:
    with pytest.raises(merge.NeedsHydra):
        both([], folders=[CONF, tmp_path])


def test_compositions_share_no_values() -> None:
    first = merge.compose("train", {}, [])
    first["env"]["tasks"].append("other")
    assert "other" not in merge.compose("train", {}, [])["env"]["tasks"]
