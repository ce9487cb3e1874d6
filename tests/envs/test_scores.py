"""Random and reference scores."""

from __future__ import annotations

import gymnasium
import pytest
from ale_py import roms

from mtrl_cli.envs.minatar import GAMES
from mtrl_cli.envs.scores import _table, normalised, scores


def test_scores_are_normalised_between_random_and_reference() -> None:
    assert normalised(-20.7, -20.7, 14.6) == 0.0
    assert normalised(14.6, -20.7, 14.6) == 1.0
    assert normalised(16.1, 1.7, 30.5) == pytest.approx(0.5)
    assert normalised(-110.0, -200.0, -110.0) == 1.0
    assert normalised(1.7 - 28.8, 1.7, 30.5) == pytest.approx(-1.0)


def test_all_57_games_are_listed_by_rom_name() -> None:
    games = {task for suite, task in _table() if suite == "atari"}
    assert len(games) == 57
    assert games <= set(roms.get_all_rom_ids())
    assert scores("atari", "breakout") == (1.7, 30.5)


def test_every_reference_is_above_random_play() -> None:
    assert all(random < reference for random, reference in _table().values())


def test_classic_control_references_are_the_reward_thresholds() -> None:
    for task in ("CartPole-v1", "Acrobot-v1", "MountainCar-v0"):
        assert scores("gymnasium", task)[1] == gymnasium.spec(task).reward_threshold


def test_games_of_the_same_name_in_two_suites_have_their_own_scores() -> None:
    assert scores("minatar", "breakout") != scores("atari", "breakout")
    assert {task for suite, task in _table() if suite == "minatar"} == set(GAMES)


def test_unknown_tasks_have_no_scores() -> None:
    assert scores("atari", "adventure") == (None, None)
    assert scores("gymnasium", "pong") == (None, None)
