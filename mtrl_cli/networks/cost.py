"""Cost of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mtrl_cli.networks.network import MultiTaskNetwork


def multiply_adds(network: MultiTaskNetwork, shape: Sequence[int]) -> int:
    """Count multiply-adds per observation: those of a forward pass of one observation of each of K tasks, divided by K.

    Only matrix products and convolutions count, including the padding of tasks. Nothing is computed, so a network on the `meta` device is
    enough.

    Args:
        network: network on any device.
        shape: padded shape of an observation, frames stacked.
    """
    tasks = network.sharing.num_tasks
    # Fake CPU tensors instead of meta tensors: some structures disable autocast, which does not support the meta device.
    with FakeTensorMode(), torch.no_grad():
        named = chain(network.named_parameters(), network.named_buffers())
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
        with FlopCounterMode(display=False) as counter:
            functional_call(network, state, (torch.empty(tasks, 1, *shape),))
    return round(counter.get_total_flops() / 2 / tasks)  # a multiply-add is two operations
