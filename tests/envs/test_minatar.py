"""MinAtar: observations, actions, and exact reproduction of episodes."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest

from mtrl_cli.envs.minatar import GAMES, MinAtarPack
from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras

pytest.importorskip("minatar", reason="an extra")


def make(*games: str, **options: Any) -> MinAtarPack:
    return MinAtarPack(name="test", tasks=list(games or GAMES), num_envs=2, **options)


def start(pack: MinAtarPack, seed: int = 0) -> VectorTasks:
    return VectorTasks(pack, num_envs=2, seed=seed, num_threads=1, training=True, stream="test")


def play(played: VectorTasks, steps: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    num_actions = np.array([[each.num_actions] for each in played.tasks])
    taken = []
    for _ in range(steps):
        played.send(generator.integers(0, num_actions, played.episodes.shape))
        step = played.recv()
        taken += [step.observation.copy(), step.reward, step.terminated, step.truncated, step.done]
    return taken


@pytest.mark.parametrize("steps_between_seeds", [0, 100])
@pytest.mark.parametrize("steps", [1, 40, 333])
def test_state_restores_every_environment(steps: int, steps_between_seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MinAtarPack, "steps_between_seeds", steps_between_seeds)
    left_alone, resumed = start(make()), start(make())
    left_alone.reset()
    before = play(left_alone, steps, seed=1)
    assert np.array_equal(resumed.load_state_dict(left_alone.state_dict()), before[-5])
    ours, theirs = play(left_alone, 100, seed=2), play(resumed, 100, seed=2)
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_reset_clears_the_last_action() -> None:
    """MinAtar's own reset keeps it, and the first sticky action would repeat it."""
    games = [make("breakout", sticky=1.0)._game("breakout") for _ in range(2)]
    games[0].reset(5)
    games[0].step(1)
    first = [game.reset(7) for game in games]
    second = [game.step(0)[0] for game in games]
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
    truncated, done, terminated = steps[-2], steps[-1], steps[-3]
    assert truncated.all()
    assert done.all()
    assert not terminated.any()
    assert not np.any(steps[4:-5:5])


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
