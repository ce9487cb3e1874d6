"""Frame stacks: order, starts of episodes, and saved state."""

from __future__ import annotations

import copy

import torch

from mtrl_cli.training.frame_stack import FrameStack


def stack_of(size: int = 3) -> FrameStack:
    return FrameStack(1, 2, size, (1,), torch.uint8, torch.device("cpu"))


def push(frames: FrameStack, values: list[int], start: list[bool]) -> list[list[int]]:
    """Push one frame, a single number, for each of two environments. Return their stacks."""
    frames.push(torch.tensor([values], dtype=torch.uint8)[..., None], torch.tensor([start]))
    return frames.observation[0, :, :, 0].tolist()


def test_newest_frame_is_last_and_an_episode_starts_with_zeros() -> None:
    frames = stack_of()
    assert push(frames, [1, 5], [True, True]) == [[0, 0, 1], [0, 0, 5]]
    assert push(frames, [2, 6], [False, False]) == [[0, 1, 2], [0, 5, 6]]
    assert push(frames, [3, 7], [False, True]) == [[1, 2, 3], [0, 0, 7]]
    assert push(frames, [4, 8], [False, False]) == [[2, 3, 4], [0, 7, 8]]
    assert frames.newest[0, :, 0].tolist() == [4, 8]
    assert frames.start.tolist() == [[False, False]]


def test_stack_of_size_one_is_the_frame() -> None:
    frames = stack_of(1)
    push(frames, [1, 2], [True, True])
    assert push(frames, [3, 4], [False, True]) == [[3], [4]]
    assert frames.start.tolist() == [[False, True]]


def test_observation_is_one_tensor_updated_in_place() -> None:
    frames = stack_of()
    push(frames, [1, 2], [True, True])
    seen, state = frames.observation, copy.deepcopy(frames.state_dict())
    push(frames, [3, 4], [False, False])
    assert seen is frames.observation
    assert seen[0, :, :, 0].tolist() == [[0, 1, 3], [0, 2, 4]]
    frames.load_state_dict(state)
    assert seen[0, :, :, 0].tolist() == [[0, 0, 1], [0, 0, 2]]


def test_restored_stack_continues_from_its_state() -> None:
    frames, twin = stack_of(), stack_of()
    push(frames, [1, 5], [True, True])
    push(frames, [2, 6], [False, True])
    twin.load_state_dict(frames.state_dict())
    assert torch.equal(twin.start, frames.start)
    assert push(twin, [3, 7], [False, False]) == push(frames, [3, 7], [False, False]) == [[1, 2, 3], [0, 6, 7]]
