"""Atari through ale-py: protocols, action sets, and exact reproduction of episodes."""

from __future__ import annotations

import numpy as np
import pytest

from mtrl_cli.envs import atari
from mtrl_cli.envs.atari import AtariPack
from mtrl_cli.envs.vector_tasks import Step, VectorTasks
from mtrl_cli.errors import UserError
from tests.helpers.played import assert_restores, play


def make(*games: str, num_envs: int = 1, training: bool = True, num_threads: int = 1, **options: object) -> VectorTasks:
    pack = AtariPack(name="test", tasks=list(games), num_envs=num_envs, **options)  # type: ignore[arg-type]
    return VectorTasks(pack, num_envs=num_envs, seed=1, num_threads=num_threads, training=training, stream="test")


def play_episode(played: VectorTasks, action: int) -> list[Step]:
    played.reset()
    taken = []
    while not taken or not taken[-1].done.any():
        played.send(np.full(played.episodes.shape, action))
        taken.append(played.recv())
    return taken


@pytest.mark.parametrize("steps_between_seeds", [None, 150], ids=["seeded once", "seeded again"])
@pytest.mark.parametrize("protocol", ["machado", "nature"])
def test_state_restores_every_pixel_after_several_episodes(
    protocol: str, steps_between_seeds: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if steps_between_seeds:
        monkeypatch.setattr(AtariPack, "steps_between_seeds", steps_between_seeds)
    games = ["breakout", "road_runner"]  # about 200 and 100 steps per episode
    uninterrupted = make(*games, num_envs=2, protocol=protocol)
    uninterrupted.reset()
    last = play(uninterrupted, 250, seed=0)[-1].observation
    state = uninterrupted.state_dict()
    assert state["episode"].max() > state["episode"].min() > 0
    if steps_between_seeds:
        assert (state["episode"] > state["seeded_episode"]).any()
        assert (state["seeded_episode"] > 0).any()
        assert len(np.unique(state["lengths"])) >= 3
    else:
        assert not state["seeded_episode"].any(), "seeded only every few thousand steps"
        assert (state["lengths"] == 250).all()
    assert_restores(uninterrupted, make(*games, num_envs=2, num_threads=4, protocol=protocol), last)


def test_unseeded_episodes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atari, "MAX_FRAMES", 200)
    played = make("breakout")
    played.reset()
    actions = np.random.default_rng(0).integers(0, 4, 50)
    episodes = [tuple(play_one(played, action).observation.tobytes() for action in actions) for _ in range(3)]
    assert played.episodes.item() == 3
    assert played.state_dict()["seeded_episode"].item() == 0
    assert len(set(episodes)) == 3


def test_machado_episodes_start_identically_and_diverge_by_sticky_actions() -> None:
    played = make("breakout", num_envs=2)
    first = played.reset()[0]
    assert np.array_equal(first[0], first[1])
    actions = np.random.default_rng(0).integers(0, 4, 40)
    observation = first
    for action in actions:
        played.send(np.full((1, 2), action))
        observation = played.recv().observation[0]
    assert not np.array_equal(observation[0], observation[1])


def test_nature_episodes_differ_only_by_no_op_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(atari.PROTOCOLS, "nature", atari.PROTOCOLS["nature"] | {"noop_max": 0})
    played = make("pong", num_envs=2, protocol="nature")
    played.reset()
    for action in np.random.default_rng(0).integers(0, 6, 40):
        played.send(np.full((1, 2), action))
        observation = played.recv().observation[0]
        assert np.array_equal(observation[0], observation[1])


@pytest.mark.parametrize(
    ("protocol", "training", "ends"), [("nature", True, 5), ("nature", False, 1), ("machado", True, 1), ("machado", False, 1)]
)
def test_lost_life_terminates_without_done_only_in_nature_training(protocol: str, training: bool, ends: int) -> None:
    fire = 1
    steps = play_episode(make("breakout", training=training, protocol=protocol), fire)
    assert sum(step.terminated.item() for step in steps) == ends  # Breakout has five lives
    assert [step.done.item() for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].terminated.item()
    assert not any(step.truncated.item() for step in steps)


def test_lost_life_starts_no_new_episode() -> None:
    played = make("breakout", protocol="nature")
    played.reset()
    while not (lost := play_one(played, 1)).terminated.item():
        pass
    assert not lost.done.item()
    assert played.episodes.item() == 0


def play_one(played: VectorTasks, action: int) -> Step:
    played.send(np.full(played.episodes.shape, action))
    return played.recv()


def test_frame_limit_truncates_without_terminating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atari, "MAX_FRAMES", 40)
    steps = play_episode(make("pong", protocol="nature"), 0)
    assert len(steps) == 10
    assert steps[-1].truncated.item()
    assert not steps[-1].terminated.item()


def test_rewards_are_unclipped() -> None:
    played = make("qbert")
    played.reset()
    rewards = {step.reward.item() for step in play(played, 150, seed=0)}
    assert 25.0 in rewards  # for a cube


def test_action_sets_are_minimal_unless_full_action_space() -> None:
    games = ["breakout", "freeway", "pong"]
    pack = AtariPack(name="test", tasks=games, num_envs=1)
    assert [task.num_actions for task in pack.tasks] == [4, 3, 6]
    assert pack.tasks[0].action_meanings == ("NOOP", "FIRE", "RIGHT", "LEFT")
    full = AtariPack(name="test", tasks=games, num_envs=1, full_action_space=True)
    assert {task.num_actions for task in full.tasks} == {18}
    assert len(set(full.tasks[0].action_meanings)) == 18


def test_every_action_of_both_sets_is_accepted() -> None:
    for full in (False, True):
        played = make("breakout", full_action_space=full)
        played.reset()
        for action in range(played.tasks[0].num_actions):
            play_one(played, action)
        assert played.state_dict()["lengths"].item() == played.tasks[0].num_actions


def test_task_attributes() -> None:
    pack = AtariPack(name="test", tasks=["pong", "adventure"], num_envs=1)
    assert pack.tasks[0].observation_shape == pack.observation_shape == (1, 84, 84)
    assert (pack.observation_dtype, pack.observation_scale, pack.stack) == (np.uint8, 255.0, 4)
    assert (pack.tasks[0].random_score, pack.tasks[0].reference_score) == (-20.7, 14.6)
    assert (pack.tasks[1].random_score, pack.tasks[1].reference_score) == (None, None)


@pytest.mark.parametrize(
    ("game", "words"),
    [
        ("brekout", "Did you mean 'breakout'?"),
        ("SpaceInvaders", "Did you mean 'space_invaders'?"),
        ("combat", "unknown task 'combat' in env.tasks: not an Atari game"),
    ],
)
def test_unknown_game_is_refused(game: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        AtariPack(name="test", tasks=["pong", game], num_envs=1)


def test_rendering_reproduces_the_episode_in_color() -> None:
    played = make("breakout", num_envs=2)
    played.reset()
    observation = play(played, 60, seed=3)[-1].observation[0, :, 0]
    actions = played.state_dict()["actions"].reshape(2, 60)[1]
    frames = list(played.pack.render(0, played.episode_seed(0, 1, 0), actions.tolist()))
    assert len(frames) == 61
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((210, 160, 3), "uint8")}
    grey = area_average(frames[-1] @ np.array([0.299, 0.587, 0.114]), 84)
    difference = np.abs(grey - observation).mean(axis=(1, 2))
    assert difference[1] < min(1.0, difference[0])


def area_average(picture: np.ndarray, size: int) -> np.ndarray:
    """Shrink a picture to `size` x `size` by averaging areas."""

    def weights(length: int) -> np.ndarray:
        edges = np.arange(size + 1) * length / size
        low, high = edges[:-1, None], edges[1:, None]
        covered = np.minimum(high, np.arange(1, length + 1)) - np.maximum(low, np.arange(length))
        return np.clip(covered, 0, None) / (length / size)

    return weights(picture.shape[0]) @ picture @ weights(picture.shape[1]).T
