"""Low-rank adaptation (Hu et al. 2021, "LoRA", section 4.1): per-task additions to the shared layers of a torso."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mtrl_cli.networks.per_task import TORSO_LAYER, Stacked, TaskOwned
from mtrl_cli.networks.sharing import Sharing

ADAPTER = "adapter"
"""Name of the adapter in its layer."""


class LowRank(TaskOwned):
    """Low-rank addition of each task to the output of a layer, for all tasks in one call.

    For a linear layer, this is B A x of the paper. `down` is A, initialised as the weights of a layer. `up` is B, zero at the start, so the
    addition is zero. The factor alpha / r is 1. For a convolution, `down` is a convolution to `rank` channels with the kernel and stride of
    the layer, and `up` one of kernel 1 (Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
    Evaluation", LoCon).

    Args:
        layer: layer to adapt.
        num_tasks: K.
        rank: rank of the addition.

    Raises:
        ValueError: a grouped convolution.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, num_tasks: int, rank: int):
        super().__init__()
        weight = layer.weight
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"transfer.adapters=lora does not support grouped convolutions, got groups={layer.groups}")
        down = torch.empty(num_tasks, rank, *weight.shape[1:], device=weight.device)
        self.down = nn.Parameter(down.uniform_(-1, 1) / math.sqrt(weight[0].numel()))
        self.up = nn.Parameter(torch.zeros(num_tasks, weight.shape[0], rank, device=weight.device))
        self.sizes = [self.down[0].numel() + self.up[0].numel()] * num_tasks
        self._geometry: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            self._geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the low-rank term to add to the layer's outputs, for task-major inputs `[K * B, ...]`, `[K * B, ...]`."""
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
    """Add an adapter to every linear layer and convolution of the shared torso. Stems per task have none.

    The layers and their names do not change.

    Raises:
        ValueError: the structure has several torsos, or no shared layer.
    """
    stacked = [name for name, module in sharing.named_modules() if isinstance(module, Stacked) and _holds_torso(module) and name != "stem"]
    if stacked:
        raise ValueError(
            f"transfer.adapters=lora needs one torso that all tasks share, got several torsos in {type(sharing).__name__} ({stacked[0]}). "
            "Use network/sharing=hard, input_adapters or film"
        )
    in_torso = [module for module in sharing.modules() if getattr(module, TORSO_LAYER, None) is not None]
    layers: Sequence[Any] = [module for module in in_torso if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError("transfer.adapters=lora needs a shared layer in the torso, got none: add layers with network.hidden")
    for layer in layers:
        layer.add_module(ADAPTER, LowRank(layer, sharing.num_tasks, rank))
        layer.register_forward_hook(_add)


def _holds_torso(module: Stacked) -> bool:
    return any(layer is not None for layer in module.torso_layers.values())
