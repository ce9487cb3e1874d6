"""Low-rank adaptation: what each task adds to the layers of a torso that all share (Hu et al. 2021, "LoRA", section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mtrl_cli.networks.per_task import TORSO_LAYER, Slice, Stacked, TaskOwned
from mtrl_cli.networks.sharing import Sharing

ADAPTER = "adapter"
"""What the adapter of a layer is called in it."""


class LowRank(TaskOwned, nn.Module):
    """A task's own addition to a layer's output, of low rank, for all tasks at once.

    The paper's B A x of a linear layer: `down` is its A, drawn as a layer's weights are, and `up` its B, zero at first, so that nothing
    changes. Its factor alpha / r is 1. Of a convolution `down` is one to `rank` channels with the layer's own kernel and stride, and `up`
    one of kernel 1 (Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", LoCon).

    Args:
        layer: what it is added to.
        num_tasks: K.
        rank: of the addition.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, num_tasks: int, rank: int):
        super().__init__()
        weight = layer.weight
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError("transfer.adapters=lora knows no convolution in groups")
        down = torch.empty(num_tasks, rank, *weight.shape[1:], device=weight.device)
        self.down = nn.Parameter(down.uniform_(-1, 1) / math.sqrt(weight[0].numel()))
        self.up = nn.Parameter(torch.zeros(num_tasks, weight.shape[0], rank, device=weight.device))
        self.sizes = [self.down[0].numel() + self.up[0].numel()] * num_tasks
        self._geometry: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            self._geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

    def slices(self) -> Iterator[Slice]:
        return (Slice(k, name, name, (k,)) for k in range(len(self.sizes)) for name in ("down", "up"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's input `[K * B, ...]`, task after task, to what is added to its output, `[K * B, ...]`."""
        K = len(self.sizes)
        x_KB = x.unflatten(0, (K, -1))
        if not self._geometry:
            return torch.bmm(torch.bmm(x_KB, self.down.mT.to(x.dtype)), self.up.mT.to(x.dtype)).flatten(0, 1)
        # Tasks side by side as groups of channels.
        x_BK = x_KB.transpose(0, 1).flatten(1, 2)
        low = functional.conv2d(x_BK, self.down.flatten(0, 1).to(x.dtype), groups=K, **self._geometry)
        added = functional.conv2d(low, self.up.flatten(0, 1)[..., None, None].to(x.dtype), groups=K)
        return added.unflatten(1, (K, -1)).transpose(0, 1).flatten(0, 1)


def _add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    adapter: nn.Module = getattr(layer, ADAPTER)
    added: torch.Tensor = adapter(inputs[0])
    return output + added


def add_adapters(sharing: Sharing, rank: int) -> None:
    """Give every linear layer and convolution of a structure's torso adapters of each task's own, but stems that are a task's own already.

    The layers stay what they are, under the same names.

    Raises:
        ValueError: the torso is not run once for the samples of all tasks, or all of it is tasks' own.
    """
    of_torso = [module for module in sharing.modules() if getattr(module, TORSO_LAYER, None) is not None]
    stacked = [name for name, module in sharing.named_modules() if isinstance(module, Stacked) and _holds_torso(module) and name != "stem"]
    layers: Sequence[Any] = [module for module in of_torso if isinstance(module, nn.Linear | nn.Conv2d)]
    if stacked:
        raise ValueError(
            f"transfer.adapters=lora needs a torso that all tasks share, and {type(sharing).__name__} makes several of it ({stacked[0]}): "
            "expected such as network/sharing=hard, input_adapters or film"
        )
    if not layers:
        raise ValueError("transfer.adapters=lora finds no layer of the torso that tasks share: give it more layers (network.hidden)")
    for layer in layers:
        layer.add_module(ADAPTER, LowRank(layer, sharing.num_tasks, rank))
        layer.register_forward_hook(_add)


def _holds_torso(module: Stacked) -> bool:
    return any(layer is not None for layer in module.torso_layers.values())
