"""Torsos: how a task's observations become features.

A torso is a recipe of two modules, so that a sharing structure can decide which tasks share which: the *stem* is the first
layer and reads a task's own observations (its input adapter, where tasks differ in shape), the *body* is everything after it,
block by block, so that structures can work between the blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from mtrl_cli.networks.regularised import Dropout, SpectralLinear
from mtrl_cli.types import Dropped, PositiveFloat, PositiveInt


class Torso(ABC):
    """The recipe of a torso.

    Attributes:
        observation_kind: "image" (observations `[C, H, W]`) or "vector" (`[D]`).
        num_features: length of the feature vector that the body gives.
        scaled_keys: the constructor's keys that make the torso wider or narrower (a whole number or a list of them: units or
            channels; a float: a factor on them), for `network.parameters`. Without any it has one width.
    """

    observation_kind: ClassVar[str]
    scaled_keys: ClassVar[tuple[str, ...]] = ()
    num_features: int

    @abstractmethod
    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        """The first layer, for observations `[B, *shape]` (float)."""

    @abstractmethod
    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        """The rest: from what the stem gives for observations of `shape` to features `[B, num_features]` (float).

        Its children are the torso's blocks, each a layer with its activation; the last one gives the features, and flattens what it
        is given itself where that is an image.
        """


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int, layer_norm: bool) -> nn.Sequential:
    # One group over all channels is LayerNorm over channels and positions (with an affine map per channel),
    # and unlike nn.LayerNorm needs no image size.
    norm = [nn.GroupNorm(1, channels_out)] if layer_norm else []
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel, stride), *norm, nn.ReLU())


@dataclass(frozen=True)
class _Options:
    """What a torso's fully connected layers have beside their weights."""

    layer_norm: bool
    dropout: float
    spectral_norm: bool


def _linear(features_in: int, features_out: int, options: _Options, *, last: bool = True) -> nn.Sequential:
    # Only the last layer before the heads is of spectral norm one, as Gogianu et al. 2021 have it in DQN's network.
    kind = SpectralLinear if options.spectral_norm and last else nn.Linear
    norm = [nn.LayerNorm(features_out)] if options.layer_norm else []
    # Before ReLU it is the same as behind it, and leaves the activation at the end, where some structures take it off.
    dropout = [Dropout(options.dropout)] if options.dropout else []
    return nn.Sequential(kind(features_in, features_out), *norm, *dropout, nn.ReLU())


def _flat_linear(features_in: int, features_out: int, options: _Options) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *_linear(features_in, features_out, options))


def _flat_size(layers: nn.Module, shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        return layers.to("meta")(torch.zeros(1, *shape)).numel()


class NatureCNN(Torso):
    """Three convolutions and a linear layer (Mnih et al. 2015, "Human-level control", Methods).

    Args:
        features: units of the last layer.
        width: factor on the channels 32, 64, 64.
        layer_norm: normalise after each layer (Gallici et al. 2024).
        dropout: share of a fully connected layer's outputs that is dropped while learning.
        spectral_norm: of the last layer (Gogianu et al. 2021, "Spectral Normalisation for Deep Reinforcement Learning").
    """

    observation_kind = "image"
    scaled_keys = ("width", "features")

    def __init__(
        self,
        *,
        features: PositiveInt = 512,
        width: PositiveFloat = 1.0,
        layer_norm: bool = False,
        dropout: Dropped = 0.0,
        spectral_norm: bool = False,
    ):
        self.num_features = features
        self._channels = [max(1, round(width * channels)) for channels in (32, 64, 64)]
        self._options = _Options(layer_norm, dropout, spectral_norm)

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return _convolution(shape[0], self._channels[0], 8, 4, self._options.layer_norm)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        def convolutions() -> nn.Sequential:
            return nn.Sequential(
                _convolution(self._channels[0], self._channels[1], 4, 2, self._options.layer_norm),
                _convolution(self._channels[1], self._channels[2], 3, 1, self._options.layer_norm),
            )

        flat = _flat_size(nn.Sequential(self.stem(shape), convolutions()), shape)
        return nn.Sequential(*convolutions(), _flat_linear(flat, self.num_features, self._options))


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class ImpalaCNN(Torso):
    """The residual network of IMPALA (Espeholt et al. 2018, figure 3, right), without its LSTM.

    Args:
        width: factor on the channels 16, 32, 32.
        features: units of the last layer.
        layer_norm: normalise before the last activation.
        dropout: share of a fully connected layer's outputs that is dropped while learning.
        spectral_norm: of the last layer (Gogianu et al. 2021, "Spectral Normalisation for Deep Reinforcement Learning").
    """

    observation_kind = "image"
    scaled_keys = ("width", "features")

    def __init__(
        self,
        *,
        width: PositiveFloat = 1.0,
        features: PositiveInt = 256,
        layer_norm: bool = False,
        dropout: Dropped = 0.0,
        spectral_norm: bool = False,
    ):
        self.num_features = features
        self._channels = [max(1, round(width * channels)) for channels in (16, 32, 32)]
        self._options = _Options(layer_norm, dropout, spectral_norm)

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return nn.Conv2d(shape[0], self._channels[0], 3, padding=1)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        def blocks() -> nn.Sequential:
            sequences = []
            for index, channels in enumerate(self._channels):
                first = [nn.Conv2d(self._channels[index - 1], channels, 3, padding=1)] if index else []
                sequences.append(nn.Sequential(*first, nn.MaxPool2d(3, 2, padding=1), _Residual(channels), _Residual(channels)))
            sequences[-1].append(nn.ReLU())
            return nn.Sequential(*sequences)

        flat = _flat_size(nn.Sequential(self.stem(shape), blocks()), shape)
        return nn.Sequential(*blocks(), _flat_linear(flat, self.num_features, self._options))


class MLP(Torso):
    """Fully connected layers for vector observations; the first is the stem.

    Args:
        hidden: units of each layer.
        layer_norm: normalise after each layer.
        dropout: share of a fully connected layer's outputs that is dropped while learning.
        spectral_norm: of the last layer (Gogianu et al. 2021, "Spectral Normalisation for Deep Reinforcement Learning").
    """

    observation_kind = "vector"
    scaled_keys = ("hidden",)

    def __init__(self, *, hidden: list[PositiveInt], layer_norm: bool = False, dropout: Dropped = 0.0, spectral_norm: bool = False):
        if not hidden:
            raise ValueError("network.hidden is empty: name the units of one layer at least, for example network.hidden=[256,256]")
        self.num_features = hidden[-1]
        self._hidden = hidden
        self._options = _Options(layer_norm, dropout, spectral_norm)

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return _linear(shape[0], self._hidden[0], self._options, last=len(self._hidden) == 1)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        sizes = list(zip(self._hidden, self._hidden[1:], strict=False))
        last = len(sizes) - 1
        return nn.Sequential(*(_linear(*each, self._options, last=layer == last) for layer, each in enumerate(sizes)))


class MinAtarCNN(Torso):
    """One 3x3 convolution and a linear layer (Young and Tian 2019, "MinAtar", section 4).

    Args:
        channels: filters of the convolution.
        features: units of the linear layer.
        layer_norm: normalise after each layer.
        dropout: share of a fully connected layer's outputs that is dropped while learning.
        spectral_norm: of the last layer (Gogianu et al. 2021, "Spectral Normalisation for Deep Reinforcement Learning").
    """

    observation_kind = "image"
    scaled_keys = ("channels", "features")

    def __init__(
        self,
        *,
        channels: PositiveInt = 16,
        features: PositiveInt = 128,
        layer_norm: bool = False,
        dropout: Dropped = 0.0,
        spectral_norm: bool = False,
    ):
        self.num_features = features
        self._channels = channels
        self._options = _Options(layer_norm, dropout, spectral_norm)

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return _convolution(shape[0], self._channels, 3, 1, self._options.layer_norm)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        return nn.Sequential(_flat_linear(_flat_size(self.stem(shape), shape), self.num_features, self._options))
