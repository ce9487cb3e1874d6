"""Random generators: restore a saved state, and keep the state of the default generators."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager

import torch


def kept(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's default generators, of the CPU and of a GPU device, at the end of the context."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def restore(generator: torch.Generator, state: torch.Tensor) -> None:
    """Restore a generator from a state (uint8 `[bytes]`, on any device).

    CPU and GPU states are incompatible. A state of the other kind is hashed to a seed, so that the result is still deterministic.

    Raises:
        TypeError, RuntimeError: not the state of a generator.
    """
    state = state.cpu()
    if state.shape == generator.get_state().shape:
        generator.set_state(state)
    else:
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
