"""Torsos: networks from observations to features.

A torso is built in two parts, so that a sharing structure can choose which tasks share which part. The *stem* is the first layer. It
reads the observations of one task; tasks of different observation shapes need a stem each. The *body* is everything after the stem,
block by block, so that a structure can work between the blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from mtrl_cli.networks.regularised import Dropout, SpectralLinear
from mtrl_cli.types import Dropped, PositiveFloat, PositiveInt


class Torso(ABC):
    """Factory for the stem and the body of a torso.

    A subclass that forwards `**layers` to this constructor accepts the parameters below as configuration keys.

    Args:
        layer_norm: normalise after each layer, before the activation (Gallici et al. 2024).
        dropout: dropout probability of fully connected layers, applied in training updates only.
        spectral_norm: give the last layer a spectral norm of one (Gogianu et al. 2021, "Spectral Normalisation for Deep Reinforcement
            Learning").

    Attributes:
        observation_kind: "image" (observations `[C, H, W]`) or "vector" (`[D]`).
        num_features: length of the body's feature vector.
        scaled_keys: constructor keys that set the torso's width, for `network.parameters`. An int or a list of ints is a number of units
            or channels; a float multiplies them. A torso without such keys has a fixed width.
    """

    observation_kind: ClassVar[str]
    scaled_keys: ClassVar[tuple[str, ...]] = ()
    num_features: int

    def __init__(self, *, layer_norm: bool = False, dropout: Dropped = 0.0, spectral_norm: bool = False):
        self._layer_norm = layer_norm
        self._dropout = dropout
        self._spectral_norm = spectral_norm

    @abstractmethod
    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        """Make the first layer, for observations `[B, *shape]` (float)."""

    @abstractmethod
    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        """Make the layers after the stem: from its output for observations of `shape` to features `[B, num_features]` (float).

        The children are the torso's blocks, each a layer with its activation. The last block gives the features, and flattens an image
        itself.
        """

    def _convolution(self, channels_in: int, channels_out: int, kernel: int, stride: int) -> nn.Sequential:
        # One group over all channels is LayerNorm over channels and positions (with an affine map per channel).
        # Unlike nn.LayerNorm it needs no image size.
        norm = [nn.GroupNorm(1, channels_out)] if self._layer_norm else []
        return nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel, stride), *norm, nn.ReLU())

    def _linear(self, features_in: int, features_out: int, *, last: bool = True) -> nn.Sequential:
        # As in the DQN network of Gogianu et al. 2021, only the last layer before the heads has spectral normalisation.
        layer = SpectralLinear if self._spectral_norm and last else nn.Linear
        norm = [nn.LayerNorm(features_out)] if self._layer_norm else []
        # Dropout and ReLU commute. ReLU is last because some structures remove it.
        dropout = [Dropout(self._dropout)] if self._dropout else []
        return nn.Sequential(layer(features_in, features_out), *norm, *dropout, nn.ReLU())

    def _image_body(self, shape: tuple[int, ...], make_blocks: Callable[[], list[nn.Module]]) -> nn.Sequential:
        """Convolutional blocks, then a linear layer on the flattened image."""
        probe = nn.Sequential(self.stem(shape), *make_blocks()).to("meta")
        with torch.device("meta"):
            flat = probe(torch.zeros(1, *shape)).numel()
        return nn.Sequential(*make_blocks(), nn.Sequential(nn.Flatten(), *self._linear(flat, self.num_features)))


class NatureCNN(Torso):
    """Three convolutions and a linear layer (Mnih et al. 2015, "Human-level control", Methods).

    Args:
        features: units of the last layer.
        width: factor on the channels 32, 64, 64.
        layers: see `Torso`.
    """

    observation_kind = "image"
    scaled_keys = ("width", "features")

    def __init__(self, *, features: PositiveInt = 512, width: PositiveFloat = 1.0, **layers: Any):
        super().__init__(**layers)
        self.num_features = features
        self._channels = [max(1, round(width * channels)) for channels in (32, 64, 64)]

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return self._convolution(shape[0], self._channels[0], 8, 4)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        first, second, third = self._channels
        return self._image_body(shape, lambda: [self._convolution(first, second, 4, 2), self._convolution(second, third, 3, 1)])


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class ImpalaCNN(Torso):
    """Residual network of IMPALA (Espeholt et al. 2018, figure 3, right), without the LSTM. Only the last layer is normalised.

    Args:
        width: factor on the channels 16, 32, 32.
        features: units of the last layer.
        layers: see `Torso`.
    """

    observation_kind = "image"
    scaled_keys = ("width", "features")

    def __init__(self, *, width: PositiveFloat = 1.0, features: PositiveInt = 256, **layers: Any):
        super().__init__(**layers)
        self.num_features = features
        self._channels = [max(1, round(width * channels)) for channels in (16, 32, 32)]

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return nn.Conv2d(shape[0], self._channels[0], 3, padding=1)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        return self._image_body(shape, self._residual_blocks)

    def _residual_blocks(self) -> list[nn.Module]:
        blocks: list[nn.Module] = []
        for index, channels in enumerate(self._channels):
            first = [nn.Conv2d(self._channels[index - 1], channels, 3, padding=1)] if index else []
            last = [nn.ReLU()] if index == len(self._channels) - 1 else []
            blocks.append(nn.Sequential(*first, nn.MaxPool2d(3, 2, padding=1), _Residual(channels), _Residual(channels), *last))
        return blocks


class MLP(Torso):
    """Fully connected layers for vector observations. The first layer is the stem.

    Args:
        hidden: units of each layer.
        layers: see `Torso`.

    Raises:
        ValueError: `hidden` is empty.
    """

    observation_kind = "vector"
    scaled_keys = ("hidden",)

    def __init__(self, *, hidden: list[PositiveInt], **layers: Any):
        super().__init__(**layers)
        if not hidden:
            raise ValueError("network.hidden must have at least one layer, got []; for example network.hidden=[256,256]")
        self.num_features = hidden[-1]
        self._hidden = hidden

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return self._linear(shape[0], self._hidden[0], last=len(self._hidden) == 1)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        sizes = list(zip(self._hidden, self._hidden[1:], strict=False))
        return nn.Sequential(*(self._linear(*size, last=index == len(sizes)) for index, size in enumerate(sizes, 1)))


class MinAtarCNN(Torso):
    """One 3x3 convolution and a linear layer (Young and Tian 2019, "MinAtar", section 4).

    Args:
        channels: channels of the convolution.
        features: units of the linear layer.
        layers: see `Torso`.
    """

    observation_kind = "image"
    scaled_keys = ("channels", "features")

    def __init__(self, *, channels: PositiveInt = 16, features: PositiveInt = 128, **layers: Any):
        super().__init__(**layers)
        self.num_features = features
        self._channels = channels

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return self._convolution(shape[0], self._channels, 3, 1)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        return self._image_body(shape, list)
