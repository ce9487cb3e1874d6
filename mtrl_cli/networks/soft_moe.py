"""Soft mixture of experts in place of a torso's last layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mtrl_cli.networks.experts import parts_of, stemmed
from mtrl_cli.networks.parts import mark
from mtrl_cli.networks.per_task import TORSO_LAYER, Stacked
from mtrl_cli.networks.sharing import Sharing, output_shapes
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class SoftMoE(Sharing):
    """Soft mixture of experts in place of the penultimate layer (Obando-Ceron et al. 2024, "Mixtures of Experts Unlock Parameter Scaling
    for Deep RL", section 3, with the layer of Puigcerver et al. 2024, "From Sparse to Soft Mixtures of Experts", section 2.1).

    Every expert has slots. A slot is a mixture of a sample's tokens (a softmax over tokens), and a token's output is a mixture of
    what the experts make of all slots (a softmax over slots). All of it is shared by all tasks, which route as their features do.

    A token is a position of the last feature map with its channels (the paper's PerConv). An expert is the torso's last layer, reading
    a token instead of the whole map, and a linear layer back to the channels; the outputs of all tokens side by side are the
    features, which so become positions times channels (3,136 in Nature's network). Of a vector the one token is the whole vector
    (PerSamp): its experts are the torso's last layer as it is, mixed by one softmax, and features stay the torso's.
    As in the official code, slots per expert are tokens over experts, rounded up, and tokens are not normalised.

    Args:
        experts: how many; 8 in the paper's comparisons.

    Raises:
        ValueError: images, and a torso that ends in anything but one linear layer.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 8):
        super().__init__(torso, shapes)
        parts = parts_of(torso, shapes)
        *before, _ = parts.blocks()
        self.stem, self.before = parts.stem, nn.Sequential(*before)
        channels, *positions = output_shapes(before, parts.shape)[-1] if before else parts.shape
        tokens, self._experts = math.prod(positions), experts
        slots = experts * math.ceil(tokens / experts)
        last = [parts.blocks()[-1] for _ in range(experts)]
        self.experts = Stacked([_of_a_token(layer, channels) for layer in last] if positions else last)
        self.slots = nn.Parameter(torch.randn(channels, slots) / math.sqrt(channels))
        if positions:
            self.num_features = tokens * channels

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        token_NTC = self._tokens(observation)
        logits_NTS = self._logits(token_NTC)
        dispatch_NTS, combine_NTS = logits_NTS.softmax(1).to(token_NTC.dtype), logits_NTS.softmax(2).to(token_NTC.dtype)
        slot_NSC = dispatch_NTS.mT @ token_NTC
        slot_ENC = slot_NSC.unflatten(1, (self._experts, -1)).transpose(0, 1)  # of each expert: [N, its slots, C]
        made_NSO = self.experts(slot_ENC.flatten(1, 2)).unflatten(1, slot_ENC.shape[1:3]).transpose(0, 1).flatten(1, 2)
        return (combine_NTS @ made_NSO).flatten(1).unflatten(0, (self.num_tasks, -1))

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each expert's share in the outputs, over tokens and its slots."""
        combine_NTS = self._logits(self._tokens(observation)).softmax(2)
        expert_NE = combine_NTS.mean(1).unflatten(1, (self._experts, -1)).sum(-1)
        return {"experts": expert_NE.unflatten(0, (self.num_tasks, -1)).mean(1)}

    def _tokens(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, ...]` to tokens `[K * B, tokens, channels]`."""
        x = self.before(stemmed(self.stem, observation).flatten(0, 1)).to(observation.dtype)
        return x.unsqueeze(-1).flatten(2).mT

    def _logits(self, token_NTC: torch.Tensor) -> torch.Tensor:
        return (token_NTC @ self.slots.to(token_NTC.dtype)).float()


def _of_a_token(layer: nn.Module, channels: int) -> nn.Sequential:
    """A torso's last layer, newly initialised to read one token, and back to its channels."""
    layers = list(_flat(layer))
    linear = [each for each in layers if isinstance(each, nn.Linear)]
    if len(linear) != 1 or not isinstance(layers[0], nn.Flatten):
        raise ValueError("network/sharing=soft_moe replaces a torso's last layer: expected a torso of images that ends in one linear layer")
    width = linear[0].out_features
    of_torso: int | None = getattr(linear[0], TORSO_LAYER, None)
    reading = [mark(type(linear[0])(channels, width), of_torso) if each is linear[0] else each for each in layers[1:]]
    return nn.Sequential(*reading, nn.Linear(width, channels))


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    for child in module if isinstance(module, nn.Sequential) else ():
        yield from _flat(child) if isinstance(child, nn.Sequential) else (child,)
