"""What a forward costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from mtrl_cli.networks.network import MultiTaskNetwork


def multiply_adds(network: MultiTaskNetwork, shape: Sequence[int]) -> int:
    """Multiply-adds of one forward per observation: those of one observation of each of K tasks, divided by K.

    Counted are matrix products and convolutions as they are computed, what a task is padded with included; elementwise work is not.

    Args:
        network: on the device `meta` for nothing to be computed.
        shape: of an observation, frames stacked, as the network is given it: padded to the pack's.
    """
    tasks, device = network.sharing.num_tasks, next(network.parameters()).device
    # Past MultiTaskNetwork.forward, whose autocast knows no meta device.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.head(network.sharing(torch.zeros(tasks, 1, *shape, device=device)))
    return round(counter.get_total_flops() / 2 / tasks)  # each multiply-add is two operations
