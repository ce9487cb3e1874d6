"""Running means of training episodes."""

import numpy as np
import pytest

from mtrl_cli.training.episode_statistics import EpisodeStatistics


def _episodes(statistics: EpisodeStatistics, steps: int, seed: int):
    """Add random steps to `statistics`. Return the finished episodes, collected by a plain loop: [(task, return, length)]."""
    random = np.random.default_rng(seed)
    K, N = statistics._returns.shape
    running = np.zeros((K, N, 2))
    finished = []
    for _ in range(steps):
        reward, done = random.normal(size=(K, N)).astype(np.float32), random.random((K, N)) < 0.2
        statistics.add(reward, done)
        for k in range(K):
            for n in range(N):
                running[k, n] += (reward[k, n], 1)
                if done[k, n]:
                    finished.append((k, *running[k, n]))
                    running[k, n] = 0
    return finished


def test_episode_statistics_agree_with_a_plain_loop():
    statistics = EpisodeStatistics(["a", "b"], num_envs=3, window=4)
    finished = _episodes(statistics, 40, seed=0)
    recent, row = statistics.recent(), statistics.row()
    for k, task in enumerate(["a", "b"]):
        returns = [value for index, value, _ in finished if index == k]
        lengths = [length for index, _, length in finished if index == k]
        assert row[f"train/return/{task}"] == pytest.approx(np.mean(returns))
        assert row[f"train/length/{task}"] == pytest.approx(np.mean(lengths))
        assert recent[task] == pytest.approx(np.mean(returns[-4:]))
    assert statistics.row() == {}, "each episode is in one row"


def test_task_without_ended_episodes_is_omitted():
    statistics = EpisodeStatistics(["a", "b"], num_envs=2)
    statistics.add(np.ones((2, 2), np.float32), np.array([[False, True], [False, False]]))
    assert statistics.row() == {"train/return/a": 1.0, "train/length/a": 1.0}
    assert statistics.recent() == {"a": 1.0}


def test_restored_statistics_continue_from_their_state():
    straight, first = EpisodeStatistics(["a"], 2, window=3), EpisodeStatistics(["a"], 2, window=3)
    rewards = np.random.default_rng(0).normal(size=(20, 1, 2)).astype(np.float32)
    dones = np.random.default_rng(1).random((20, 1, 2)) < 0.3
    for index in range(10):
        straight.add(rewards[index], dones[index])
        first.add(rewards[index], dones[index])
    second = EpisodeStatistics(["a"], 2, window=3)
    second.load_state_dict(first.state_dict())
    for index in range(10, 20):
        straight.add(rewards[index], dones[index])
        second.add(rewards[index], dones[index])
    assert second.recent() == straight.recent()
    assert second.row() == straight.row()
    with pytest.raises(ValueError, match="shape"):
        EpisodeStatistics(["a", "b"], 2, window=3).load_state_dict(first.state_dict())
