"""Soft mixture of experts in place of the last layer of a torso."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mtrl_cli.networks.experts import encode, split_torso
from mtrl_cli.networks.parts import tag
from mtrl_cli.networks.per_task import TORSO_LAYER, Stacked
from mtrl_cli.networks.sharing import Sharing, output_shapes
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class SoftMoE(Sharing):
    """Soft mixture of experts in place of the penultimate layer (Obando-Ceron et al. 2024, "Mixtures of Experts Unlock Parameter Scaling
    for Deep RL", section 3, with the layer of Puigcerver et al. 2024, "From Sparse to Soft Mixtures of Experts", section 2.1).

    Every expert has slots. A slot is a mixture of a sample's tokens (softmax over tokens). The output of a token is a mixture of the
    experts' outputs for all slots (softmax over slots). Tasks share all parameters; the routing follows from the features.

    For an image, a token is one position of the last feature map with its channels (PerConv in the paper). An expert is the torso's last
    layer, which reads a token instead of the whole map, and a linear layer back to the channels. The features are the outputs of all
    tokens side by side: positions times channels (3,136 in the Nature network).

    For a vector, the one token is the whole vector (PerSamp). Experts are copies of the torso's last layer, mixed by one softmax, and the
    number of features is that of the torso.

    As in the official code, the slots per expert are tokens over experts, rounded up, and tokens are not normalised.

    Args:
        experts: number of experts; 8 in the paper's comparisons.

    Raises:
        ValueError: a torso for images does not end in exactly one linear layer.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 8):
        super().__init__(torso, shapes)
        split = split_torso(torso, shapes)
        *before, _ = split.blocks()
        self.stem, self.before = split.stem, nn.Sequential(*before)
        channels, *positions = output_shapes(before, split.shape)[-1] if before else split.shape
        tokens, self._experts = math.prod(positions), experts
        slots = experts * math.ceil(tokens / experts)
        last = [split.blocks()[-1] for _ in range(experts)]
        self.experts = Stacked([_token_expert(layer, channels) for layer in last] if positions else last)
        self.slots = nn.Parameter(torch.randn(channels, slots) / math.sqrt(channels))
        if positions:
            self.num_features = tokens * channels

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        token_NTC = self._tokens(observation)
        logits_NTS = self._logits(token_NTC)
        dispatch_NTS, combine_NTS = logits_NTS.softmax(1).to(token_NTC.dtype), logits_NTS.softmax(2).to(token_NTC.dtype)
        slot_NSC = dispatch_NTS.mT @ token_NTC
        slot_ENC = slot_NSC.unflatten(1, (self._experts, -1)).transpose(0, 1)  # per expert: [N, its slots, C]
        output_NSO = self.experts(slot_ENC.flatten(1, 2)).unflatten(1, slot_ENC.shape[1:3]).transpose(0, 1).flatten(1, 2)
        return self.by_task((combine_NTS @ output_NSO).flatten(1))

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Share of each expert in the outputs, over tokens and the expert's slots."""
        combine_NTS = self._logits(self._tokens(observation)).softmax(2)
        expert_NE = combine_NTS.mean(1).unflatten(1, (self._experts, -1)).sum(-1)
        return {"experts": self.by_task(expert_NE).mean(1)}

    def _tokens(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` to tokens `[K * B, tokens, channels]`."""
        x = self.before(encode(self.stem, observation).flatten(0, 1)).to(observation.dtype)
        return x.unsqueeze(-1).flatten(2).mT

    def _logits(self, token_NTC: torch.Tensor) -> torch.Tensor:
        return (token_NTC @ self.slots.to(token_NTC.dtype)).float()


def _token_expert(layer: nn.Module, channels: int) -> nn.Sequential:
    """A torso's last layer, newly initialised for one token as input, and a linear layer back to the token's channels."""
    layers = list(_flat(layer))
    linear = [each for each in layers if isinstance(each, nn.Linear)]
    if len(linear) != 1 or not isinstance(layers[0], nn.Flatten):
        raise ValueError(
            f"network/sharing=soft_moe needs a torso for images that ends in one linear layer, got {len(linear)} in the last block: "
            "choose another network or another sharing structure"
        )
    width = linear[0].out_features
    torso_layer: int | None = getattr(linear[0], TORSO_LAYER, None)
    reading = [tag(type(linear[0])(channels, width), torso_layer) if each is linear[0] else each for each in layers[1:]]
    return nn.Sequential(*reading, nn.Linear(width, channels))


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    for child in module if isinstance(module, nn.Sequential) else ():
        yield from _flat(child) if isinstance(child, nn.Sequential) else (child,)
