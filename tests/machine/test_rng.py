"""Restore random generators on the same and on another kind of device."""

from __future__ import annotations

import torch

from mtrl_cli.machine import rng

GPU_STATE = torch.arange(16, dtype=torch.uint8)  # seed and offset; a CPU state has thousands of bytes


def draws(generator: torch.Generator) -> list[float]:
    return torch.rand(5, generator=generator).tolist()


def test_state_is_restored_exactly_on_the_same_kind_of_device() -> None:
    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    draws(one)
    rng.restore(two, one.get_state())
    assert draws(one) == draws(two)


def test_state_of_another_kind_of_device_is_used_as_a_seed() -> None:
    def following(state: torch.Tensor) -> list[float]:
        generator = torch.Generator()
        draws(generator)
        rng.restore(generator, state)
        return draws(generator)

    assert following(GPU_STATE) == following(GPU_STATE.clone())
    assert following(GPU_STATE) != following(GPU_STATE + 1)
