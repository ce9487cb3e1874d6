"""Random generators that go on from what was saved."""

from __future__ import annotations

import hashlib

import torch


def restore(generator: torch.Generator, state: torch.Tensor) -> None:
    """Let a generator go on from a state (uint8 `[bytes]`, on any device).

    The state of another kind of device (the CPU's on a GPU, or the other way round) cannot be taken: it becomes a seed instead, so that
    what follows still depends on nothing else.

    Raises:
        TypeError, RuntimeError: it is no state of a generator.
    """
    state = state.cpu()
    if state.shape == generator.get_state().shape:
        generator.set_state(state)
    else:
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
