"""Soft modularization: modules that every task combines in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.per_task import Stacked, TaskVectors
from mtrl_cli.networks.sharing import Sharing, stem_of, through_stem
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class SoftModularization(Sharing):
    """Layers of modules behind the torso, routed by task and state (Yang et al. 2020, "Multi-Task Reinforcement Learning with Soft
    Modularization", section 4; code: github.com/RchalYang/Soft-Module, `ModularGatedCascadeCondNet`).

    The torso (a stem for each task where they differ in shape) encodes the observation. The base network has `num_layers` layers of
    `num_modules` linear modules. Module i of a layer reads relu(sum_j p_ij g_j), the layer before it weighted by a softmax over its
    modules j; one more softmax weighs the last layer's modules into the features, after a ReLU. The weights come from a routing network
    that reads the features times the task's learned vector.

    Where paper and code differ, this does as the code does. Modules' outputs are weighted first and activated then; the paper has it
    the other way round. A layer's weights depend on the softmaxed weights of all layers before it; in the paper on those of the layer
    before alone, before the softmax. The products of features and task pass two more layers before they route. Weights start nearly
    uniform (the logits' layers within 0.003); other layers of the routing and all modules start with biases of 0.1 and weights within
    1 / sqrt(outputs). Two things are otherwise than in the code: it multiplies the features before their last activation, which here
    belongs to the torso, and its linear layer over a one-hot task with a bias is here a vector for each task. Its layer after the
    modules is the task's head.

    Args:
        num_layers: at least 2.
        num_modules: of each layer.
        module_size: outputs of a module, and so the length of the feature vector.
        routing_size: units of the routing network.

    Raises:
        ValueError: one layer has nothing to route between.
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
            raise ValueError(f"network.sharing.num_layers={num_layers}: expected at least 2, between which modules are routed")
        encoded = torso.num_features
        self.num_features = module_size
        self._num_modules = num_modules
        self.stem = stem_of(torso, shapes)
        self.body = torso.body(shapes[0])
        self.embedding = TaskVectors(0.1 + torch.empty(len(shapes), encoded).uniform_(-1, 1) / math.sqrt(encoded))
        inputs = [encoded, *[module_size] * (num_layers - 1)]
        self.layers = nn.ModuleList(Stacked([_linear(each, module_size) for _ in range(num_modules)]) for each in inputs)
        self.routing_base = nn.Sequential(nn.ReLU(), _linear(encoded, routing_size), nn.ReLU(), _linear(routing_size, routing_size))
        each = num_modules**2
        self.routing_conditions = nn.ModuleList(_linear(each * (layer + 1), routing_size) for layer in range(num_layers - 1))
        self.routing_logits = nn.ModuleList(_nearly_zero(routing_size, number) for number in [*[each] * (num_layers - 1), num_modules])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        encoded = self.body(through_stem(self.stem, observation))
        *between, last = self._weights(encoded)
        first, *others = self.layers
        assert isinstance(first, Stacked)
        outputs = first.of_one(encoded)  # [modules, K * B, F]
        for weight, layer in zip(between, others, strict=True):
            outputs = layer(torch.einsum("bij,jbf->ibf", weight, outputs).relu())
        features = torch.einsum("bij,jbf->bf", last, outputs).relu()
        return features.unflatten(0, (self.num_tasks, -1))

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """How much each module takes of each module of the layer before it (`layer2/module1`), and the features of the last (`output`)."""
        *between, last = self._weights(self.body(through_stem(self.stem, observation)))
        mean = [weight.float().unflatten(0, (self.num_tasks, -1)).mean(1) for weight in (*between, last)]
        named = {
            f"layer{layer}/module{module}": weight_KMM[:, module - 1]
            for layer, weight_KMM in enumerate(mean[:-1], 2)
            for module in range(1, self._num_modules + 1)
        }
        return {**named, "output": mean[-1][:, 0]}

    def _weights(self, encoded: torch.Tensor) -> list[torch.Tensor]:
        """From each layer to the next `[K * B, modules, modules of the layer before]`, and from the last `[K * B, 1, modules]`."""
        product = encoded.unflatten(0, (self.num_tasks, -1)) * self.embedding().to(encoded.dtype)[:, None]
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
