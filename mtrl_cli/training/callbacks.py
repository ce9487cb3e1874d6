"""Callbacks of the learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from mtrl_cli.machine.saved import Saved
from mtrl_cli.networks.per_task import Stacked
from mtrl_cli.networks.regularised import SpectralLinear

if TYPE_CHECKING:
    from mtrl_cli.training.learner import Learner


class Callback(Saved):
    """Extends the updates of a learner. All methods do nothing by default.

    The learner calls `before_update` outside of the CUDA graph of an update. The graph records `before_losses`, `before_step` and
    `after_step`: they must not wait for the device, nor depend on Python values that change between updates.

    Attributes:
        name: key of the state.
        learner: learner that calls the methods; set by its constructor.
    """

    name: ClassVar[str]
    learner: Learner | None = None

    def before_update(self, step: int) -> None:
        """Run before an update at a step (per task)."""

    def before_losses(self) -> None:
        """Run before the losses of an update are computed."""

    def before_step(self) -> None:
        """Run between the backward pass and gradient clipping."""

    def after_step(self) -> None:
        """Run after parameters changed: after an optimizer step or a reset."""

    def row_masks(self, parameters: Sequence[torch.nn.Parameter]) -> dict[int, torch.Tensor]:
        """Return factors of the gradients of partly frozen parameters, by position: 1 for trained rows, 0 for frozen rows."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Return current metrics by name."""
        return {}


class SpectralNorm(Callback):
    """Power iteration of layers with spectral normalization, one step per update.

    Args:
        layers: result of `per_task.spectral_layers`.
    """

    name = "spectral_norm"

    def __init__(self, layers: Sequence[SpectralLinear | Stacked]):
        self._layers = list(layers)

    def before_losses(self) -> None:
        for layer in self._layers:
            layer.power_step()


class DropoutState(Callback):
    """State of the random generator of dropout.

    Args:
        generator: torch's default generator of the device.
    """

    name = "dropout"
    saved = ("_generator",)

    def __init__(self, generator: torch.Generator):
        self._generator = generator
