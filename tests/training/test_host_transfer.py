"""Transfers between host and device: contents, and alternating blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtrl_cli.envs.vector_tasks import Step
from mtrl_cli.training.host_transfer import Pinned, SharedMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize(("frame_shape", "dtype"), [((3,), np.float32), ((1, 5, 3), np.uint8), ((7,), np.uint8)])
def test_transferred_step_is_unchanged(frame_shape: tuple[int, ...], dtype: type) -> None:
    random = np.random.default_rng(0)
    transfer = Pinned(2, 3, frame_shape, np.dtype(dtype), CPU)
    for number in range(5):
        observation = transfer.buffers[number % 2]
        observation[...] = random.integers(0, 255, observation.shape)
        reward = random.normal(size=(2, 3)).astype(np.float32)
        flags = random.random((3, 2, 3)) < 0.5
        epsilon_K = random.random(2).astype(np.float32)
        step = Step(observation, reward, *flags)
        arrived, arrived_epsilon_K = transfer.to_device(step, epsilon_K)
        shared, shared_epsilon_K = SharedMemory().to_device(step, epsilon_K)
        assert torch.equal(arrived_epsilon_K, shared_epsilon_K)
        for name in ("observation", "reward", "terminated", "truncated", "done"):
            assert torch.equal(getattr(arrived, name), getattr(shared, name)), name
            assert getattr(arrived, name).dtype == getattr(shared, name).dtype


def test_writing_the_next_observation_does_not_change_the_transferred_one() -> None:
    transfer = Pinned(1, 1, (2,), np.dtype(np.float32), CPU)
    first, second = transfer.buffers
    first[...] = 1
    never = np.zeros((1, 1), bool)
    arrived, _ = transfer.to_device(Step(first, np.zeros((1, 1), np.float32), never, never, never), np.zeros(1, np.float32))
    second[...] = 2
    assert arrived.observation.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("transfer", [SharedMemory(), Pinned(2, 3, (4,), np.dtype(np.float32), CPU)])
def test_fetched_actions_are_the_chosen_ones(transfer: SharedMemory | Pinned) -> None:
    for value in range(3):
        action = torch.full((2, 3), value)
        transfer.start_fetch(action)
        assert transfer.fetch().tolist() == action.tolist()
        assert transfer.fetch().dtype == np.int64
