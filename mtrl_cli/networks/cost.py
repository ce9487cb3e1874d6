"""What a forward costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mtrl_cli.networks.network import MultiTaskNetwork


def multiply_adds(network: MultiTaskNetwork, shape: Sequence[int]) -> int:
    """Multiply-adds of one forward per observation: those of one observation of each of K tasks, divided by K.

    Counted are matrix products and convolutions as they are computed, what a task is padded with included; elementwise work is not.
    Nothing is computed, wherever the network is: the device `meta` is enough.

    Args:
        shape: of an observation, frames stacked, as the network is given it: padded to the pack's.
    """
    tasks = network.sharing.num_tasks
    # Tensors without memory that pass for the CPU's: autocast, which some structures switch off in places, knows no meta device.
    with FakeTensorMode(), torch.no_grad():
        named = chain(network.named_parameters(), network.named_buffers())
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
        with FlopCounterMode(display=False) as counter:
            functional_call(network, state, (torch.empty(tasks, 1, *shape),))
    return round(counter.get_total_flops() / 2 / tasks)  # each multiply-add is two operations
