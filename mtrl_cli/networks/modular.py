"""Soft modularization: shared modules that each task combines in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.per_task import Stacked, TaskVectors
from mtrl_cli.networks.sharing import HardSharing, Sharing
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class SoftModularization(HardSharing, Sharing):
    """Layers of modules after the torso, routed by task and state (Yang et al. 2020, "Multi-Task Reinforcement Learning with Soft
    Modularization", section 4; code: github.com/RchalYang/Soft-Module, `ModularGatedCascadeCondNet`).

    The torso encodes the observation. The base network has `num_layers` layers of `num_modules` linear modules. Module i of a layer reads
    relu(sum_j p_ij g_j), a softmax-weighted sum over the modules j of the layer before. Another softmax weights the last layer's modules;
    the features are the ReLU of that sum. All weights come from a routing network, which reads the features times a learned vector of
    the task.

    Where the paper and its code differ, this class follows the code:

    - Module outputs are weighted first, then activated (in the paper the other way round).
    - The weights of a layer depend on the softmax weights of all layers before it (in the paper on those of the layer before, without
      softmax).
    - The product of features and task passes two more layers before the routing.
    - Layers of the routing logits start within 0.003, so weights start nearly uniform. All other layers of the routing network and all
      modules start with biases of 0.1 and weights within 1 / sqrt(outputs).

    Differences from the code:

    - The code multiplies the features before their last activation, which here belongs to the torso.
    - The code's linear layer with bias over a one-hot task is a vector per task here.
    - The code's layer after the modules is the head of the task here.

    Args:
        num_layers: number of layers, at least 2.
        num_modules: modules of each layer.
        module_size: outputs of a module, and length of the feature vector.
        routing_size: units of the routing network.

    Raises:
        ValueError: fewer than 2 layers.
    """

    scaled_keys = ("module_size", "routing_size")

    def __init__(
        self,
        torso: Torso,
        shapes: Sequence[tuple[int, ...]],
        *,
        num_layers: PositiveInt = 2,
        num_modules: PositiveInt = 2,
        module_size: PositiveInt = 256,
        routing_size: PositiveInt = 256,
    ):
        super().__init__(torso, shapes)
        if num_layers < 2:
            raise ValueError(f"network.sharing.num_layers must be at least 2, got {num_layers}")
        encoded = torso.num_features
        self.num_features = module_size
        self._num_modules = num_modules
        self.embedding = TaskVectors(0.1 + torch.empty(len(shapes), encoded).uniform_(-1, 1) / math.sqrt(encoded))
        inputs = [encoded, *[module_size] * (num_layers - 1)]
        self.layers = nn.ModuleList(Stacked([_linear(each, module_size) for _ in range(num_modules)]) for each in inputs)
        self.routing_base = nn.Sequential(nn.ReLU(), _linear(encoded, routing_size), nn.ReLU(), _linear(routing_size, routing_size))
        each = num_modules**2
        self.routing_conditions = nn.ModuleList(_linear(each * (layer + 1), routing_size) for layer in range(num_layers - 1))
        self.routing_logits = nn.ModuleList(_nearly_zero(routing_size, number) for number in [*[each] * (num_layers - 1), num_modules])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        encoded_KB = super().forward(observation)
        *between, last = self._weights(encoded_KB)
        first, *others = self.layers
        assert isinstance(first, Stacked)
        outputs = first.broadcast(encoded_KB.flatten(0, 1))  # [modules, K * B, F]
        for weight, layer in zip(between, others, strict=True):
            outputs = layer(torch.einsum("bij,jbf->ibf", weight, outputs).relu())
        return self.by_task(torch.einsum("bij,jbf->bf", last, outputs).relu())

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return routing weights: of each module over the modules of the previous layer (`layer2/module1`), and of the features over the
        modules of the last layer (`output`)."""
        *between, last = [self.by_task(weight.float()).mean(1) for weight in self._weights(super().forward(observation))]
        named = {
            f"layer{layer}/module{module}": weight_KMM[:, module - 1]
            for layer, weight_KMM in enumerate(between, 2)
            for module in range(1, self._num_modules + 1)
        }
        return {**named, "output": last[:, 0]}

    def _weights(self, encoded_KB: torch.Tensor) -> list[torch.Tensor]:
        """Weights from each layer to the next `[K * B, modules, modules of the layer before]`, and of the last `[K * B, 1, modules]`."""
        product = encoded_KB * self.embedding().to(encoded_KB.dtype)[:, None]
        base = self.routing_base(product.flatten(0, 1))
        weights: list[torch.Tensor] = []
        for layer, logits in enumerate(self.routing_logits):
            state = base if layer == 0 else base * self.routing_conditions[layer - 1](torch.cat([each.flatten(1) for each in weights], 1))
            weights.append(logits(state.relu()).unflatten(1, (-1, self._num_modules)).softmax(-1))
        return weights


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.uniform_(layer.weight, -1 / math.sqrt(outputs), 1 / math.sqrt(outputs))
    nn.init.constant_(layer.bias, 0.1)
    return layer


def _nearly_zero(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.uniform_(layer.weight, -0.003, 0.003)
    nn.init.uniform_(layer.bias, -0.003, 0.003)
    return layer
