"""MinAtar: observations, actions, and exact reproduction of episodes."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest

from mtrl_cli.envs.minatar import GAMES, MinAtarPack
from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras
from tests.helpers.played import assert_restores, play, start

pytest.importorskip("minatar", reason="an extra")


def make(*games: str, **options: Any) -> MinAtarPack:
    return MinAtarPack(name="test", tasks=list(games or GAMES), num_envs=2, **options)


@pytest.mark.parametrize("steps_between_seeds", [0, 100])
@pytest.mark.parametrize("steps", [1, 40, 333])
def test_state_restores_every_environment(steps: int, steps_between_seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MinAtarPack, "steps_between_seeds", steps_between_seeds)
    uninterrupted, resumed = start(make()), start(make())
    uninterrupted.reset()
    assert_restores(uninterrupted, resumed, play(uninterrupted, steps, seed=1)[-1].observation)


def test_reset_clears_the_last_action() -> None:
    """MinAtar's own reset keeps it, and the first sticky action would repeat it."""
    envs = [make("breakout", sticky=1.0)._env("breakout") for _ in range(2)]
    envs[0].reset(5)
    envs[0].step(1)
    first = [env.reset(7) for env in envs]
    second = [env.step(0)[0] for env in envs]
    assert np.array_equal(*first)
    assert np.array_equal(*second)


def test_channels_and_actions_of_each_game() -> None:
    pack = make()
    assert [task.observation_shape for task in pack.tasks] == [(4, 10, 10), (4, 10, 10), (7, 10, 10), (10, 10, 10), (6, 10, 10)]
    assert [task.num_actions for task in pack.tasks] == [5, 3, 3, 6, 4]
    assert pack.tasks[1].action_meanings == ("NOOP", "LEFT", "RIGHT")
    assert pack.observation_shape == (10, 10, 10)
    assert {task.num_actions for task in make(minimal_actions=False).tasks} == {6}


def test_observations_are_binary_and_padded_with_zeros() -> None:
    played = start(make("breakout", "seaquest"))
    observation = played.reset()
    assert observation.dtype == np.uint8
    assert observation.shape == (2, 2, 10, 10, 10)
    assert set(np.unique(observation)) == {0, 1}
    assert not observation[0, :, 4:].any()


def test_actions_are_mapped_to_the_minimal_set() -> None:
    """The third minimal action of Breakout moves the paddle right; MinAtar's own index of that action is 3."""
    played = start(make("breakout", sticky=0.0))
    before = played.reset()[0, 0, 0].argmax() % 10
    played.send(np.full((1, 2), 2))
    assert played.recv().observation[0, 0, 0].argmax() % 10 == before + 1


def test_max_episode_steps_truncates_without_terminating() -> None:
    played = start(make("freeway", max_episode_steps=20))
    played.reset()
    steps = play(played, 20, seed=0)
    assert steps[-1].truncated.all()
    assert steps[-1].done.all()
    assert not steps[-1].terminated.any()
    assert not any(step.done.any() for step in steps[:-1])


def test_all_games_have_random_and_reference_scores() -> None:
    assert all(task.random_score is not None and task.reference_score is not None for task in make().tasks)


def test_missing_package_is_named_with_an_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minatar", None)
    with pytest.raises(UserError, match=re.escape(extras.install_command("minatar"))):
        make()


def test_unknown_game_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"unknown task 'pong' in env\.tasks: not a MinAtar game\. Expected one of: asterix",
    ):
        make("pong")


def test_each_cell_is_rendered_as_a_block() -> None:
    pack = make("breakout")
    played = start(pack)
    played.reset()
    actions = [0, 1, 2, 1, 0]
    for action in actions:
        played.send(np.full((1, 2), action))
        observation = played.recv().observation
    assert not played.episodes.any()
    frames = list(pack.render(0, played.episode_seed(0, 0, 0), actions))
    assert len(frames) == len(actions) + 1
    assert frames[-1].shape == (160, 160, 3)
    assert frames[-1].dtype == np.uint8
    lit = frames[-1].reshape(10, 16, 10, 16, 3).any(axis=-1)
    assert np.array_equal(lit.all(axis=(1, 3)), observation[0, 0].any(axis=0))
    assert np.array_equal(lit.any(axis=(1, 3)), observation[0, 0].any(axis=0))
