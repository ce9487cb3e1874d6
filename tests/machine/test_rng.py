"""Random generators: going on from a state, on the same kind of device and on another."""

from __future__ import annotations

import torch

from mtrl_cli.machine import rng

OF_A_GPU = torch.arange(16, dtype=torch.uint8)  # seed and offset; the CPU's has thousands of bytes


def draws(generator: torch.Generator) -> list[float]:
    return torch.rand(5, generator=generator).tolist()


def test_it_goes_on_identically_on_the_same_kind_of_device() -> None:
    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    draws(one)
    rng.restore(two, one.get_state())
    assert draws(one) == draws(two)


def test_the_state_of_another_kind_of_device_decides_as_a_seed_does() -> None:
    def following(state: torch.Tensor) -> list[float]:
        generator = torch.Generator()
        draws(generator)
        rng.restore(generator, state)
        return draws(generator)

    assert following(OF_A_GPU) == following(OF_A_GPU.clone())
    assert following(OF_A_GPU) != following(OF_A_GPU + 1)
