"""Blocks that hold a step: what is written on one side is read on the other, and two take turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtrl_cli.training.host_transfer import Pinned, SharedMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize(("frame_shape", "dtype"), [((3,), np.float32), ((1, 5, 3), np.uint8), ((7,), np.uint8)])
def test_a_step_arrives_as_it_was(frame_shape: tuple[int, ...], dtype: type) -> None:
    random = np.random.default_rng(0)
    transfer = Pinned(2, 3, frame_shape, np.dtype(dtype), CPU)
    for number in range(5):
        observation = transfer.buffers[number % 2]
        observation[...] = random.integers(0, 255, observation.shape)
        reward = random.normal(size=(2, 3)).astype(np.float32)
        flags = random.random((3, 2, 3)) < 0.5
        epsilon_K = random.random(2).astype(np.float32)
        arrived = transfer.bring(observation, reward, flags, epsilon_K)
        shared = SharedMemory().bring(observation, reward, flags, epsilon_K)
        for name in ("observation", "reward", "terminated", "truncated", "done", "epsilon_K"):
            assert torch.equal(getattr(arrived, name), getattr(shared, name)), name
            assert getattr(arrived, name).dtype == getattr(shared, name).dtype


def test_what_is_on_its_way_is_not_what_is_being_written() -> None:
    transfer = Pinned(1, 1, (2,), np.dtype(np.float32), CPU)
    first, second = transfer.buffers
    first[...] = 1
    arrived = transfer.bring(first, np.zeros((1, 1), np.float32), np.zeros((3, 1, 1), bool), np.zeros(1, np.float32))
    second[...] = 2
    assert arrived.observation.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("transfer", [SharedMemory(), Pinned(2, 3, (4,), np.dtype(np.float32), CPU)])
def test_actions_come_back(transfer: SharedMemory | Pinned) -> None:
    for value in range(3):
        action = torch.full((2, 3), value)
        transfer.fetch(action)
        assert transfer.fetched().tolist() == action.tolist()
        assert transfer.fetched().dtype == np.int64
