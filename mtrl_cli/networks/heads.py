"""Heads: networks from the features of a task to the values of its actions. Every task has a head.

The outputs of a head describe the return of each action: its mean (plain, dueling), or its distribution by Z numbers. A `bounded` head
has values in a fixed range, and needs a value scale that keeps returns within that range (see `agents/value_scale.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtrl_cli.networks import value_losses
from mtrl_cli.networks.per_task import TaskLinear
from mtrl_cli.types import FiniteFloat, PositiveFloat, PositiveInt


class Head(nn.Module, ABC):
    """Features of all tasks to outputs for all actions, and the meaning of the outputs.

    Args:
        num_features: length of a feature vector.
        num_actions: number of actions of each task; A is the largest.

    Attributes:
        bounded: whether values lie in a fixed range for any parameters.
    """

    bounded: ClassVar[bool] = False
    invalid_KA: Tensor

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__()
        actions = torch.arange(max(num_actions))
        self.register_buffer("invalid_KA", actions >= torch.tensor(num_actions)[:, None], persistent=False)

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Features `[K, B, F]` to outputs `[K, B, A]` or `[K, B, A, Z]` (float32). Outputs of a task's invalid actions are undefined."""

    def expectation(self, outputs: Tensor) -> Tensor:
        """Expected values of outputs: `[K, B, ...]` or `[K, B, ..., Z]` to `[K, B, ...]`."""
        return outputs

    def values(self, outputs: Tensor) -> Tensor:
        """Action values `[K, B, A]` (float32) of the outputs of `forward`; minus infinity for a task's invalid actions."""
        return self.expectation(outputs).masked_fill(self.invalid_KA[:, None], -torch.inf)

    def mixture(self, outputs: Tensor) -> Tensor:
        """Combine the outputs of one action over several augmented views of a state: `[K, draws, B, ...]` to `[K, B, ...]`.

        Values are averaged. Distributions become their mixture, which has the averaged mean.
        """
        return outputs.mean(1)

    def loss(self, outputs: Tensor, next_outputs: Tensor, return_KB: Tensor, discount_KB: Tensor, huber: float) -> Tensor:
        """Distance of outputs from return_KB + discount_KB times the outputs of the next state. By default the Huber loss of the values.

        Args:
            outputs: float32 `[K, B]` or `[K, B, Z]`, of the actions taken.
            next_outputs: same shape, of the actions chosen in the next states, by the target network.
            return_KB: float32 `[K, B]`, discounted rewards of the n-step window.
            discount_KB: float32 `[K, B]`, of the next state; 0 if the window terminated.
            huber: error beyond which the loss is linear; heads that compare distributions ignore it.

        Returns:
            float32 `[K, B]`.
        """
        return value_losses.huber(value_losses.td_target(return_KB, discount_KB, next_outputs) - outputs, huber)

    def rescale(self, factor_K: Tensor, offset_K: Tensor) -> None:
        """Change the parameters so that each task's values become factor (above 0) times value plus offset, float32 `[K]` each.

        Raises:
            NotImplementedError: the head is bounded.
        """
        raise NotImplementedError(f"the values of {type(self).__name__} have a fixed range")


class PlainHead(Head):
    """One linear layer per task (Mnih et al. 2015)."""

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__(num_features, num_actions)
        self.linear = TaskLinear(num_features, num_actions)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def rescale(self, factor_K: Tensor, offset_K: Tensor) -> None:
        self.linear.rescale(factor_K, offset_K)


class DuelingHead(Head):
    """State value and advantages per task (Wang et al. 2016, equation 9): Q = V + A - mean of A over the actions of the task."""

    share_KA1: Tensor

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__(num_features, num_actions)
        self.value = TaskLinear(num_features, [1] * len(num_actions))
        self.advantage = TaskLinear(num_features, num_actions)
        share = (~self.invalid_KA).float() / (~self.invalid_KA).sum(1, keepdim=True)
        self.register_buffer("share_KA1", share[..., None], persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        advantage_KBA = self.advantage(features)
        return self.value(features) + advantage_KBA - advantage_KBA @ self.share_KA1

    def rescale(self, factor_K: Tensor, offset_K: Tensor) -> None:
        self.value.rescale(factor_K, offset_K)
        self.advantage.rescale(factor_K, torch.zeros_like(offset_K))


class _Distribution(nn.Module):
    """Linear layer per task and action to Z numbers: features `[K, B, F]` to `[K, B, A, Z]`."""

    def __init__(self, num_features: int, num_actions: Sequence[int], numbers: int):
        super().__init__()
        self.numbers = numbers
        self.linear = TaskLinear(num_features, [actions * numbers for actions in num_actions])

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features).unflatten(-1, (-1, self.numbers))


class _CategoricalHead(Head):
    """Logits of Z fixed returns per task and action.

    Args:
        key: configuration key that sets the number of returns.
        numbers: Z.
        v_min, v_max: range of the returns.

    Raises:
        ValueError: fewer than 2 returns, or an empty range.
    """

    value_Z: Tensor

    def __init__(self, num_features: int, num_actions: Sequence[int], key: str, numbers: int, v_min: float, v_max: float):
        super().__init__(num_features, num_actions)
        if numbers < 2:
            raise ValueError(f"network.head.{key} must be at least 2, got {numbers}")
        if v_min >= v_max:
            raise ValueError(f"network.head.v_min must be below network.head.v_max, got {v_min:g} and {v_max:g}")
        self.distribution = _Distribution(num_features, num_actions, numbers)

    def forward(self, features: Tensor) -> Tensor:
        return self.distribution(features)

    def expectation(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1) @ self.value_Z

    def mixture(self, outputs: Tensor) -> Tensor:
        return outputs.log_softmax(-1).logsumexp(1)


class C51Head(_CategoricalHead, Head):
    """Distribution over fixed, evenly spaced returns per task and action (Bellemare et al. 2017, algorithm 1).

    Args:
        v_min, v_max: first and last return; targets are clipped to this range.
        atoms: number of returns.

    Raises:
        ValueError: fewer than 2 atoms, or an empty range.
    """

    bounded = True

    def __init__(
        self,
        num_features: int,
        num_actions: Sequence[int],
        *,
        v_min: FiniteFloat = -10.0,
        v_max: FiniteFloat = 10.0,
        atoms: PositiveInt = 51,
    ):
        super().__init__(num_features, num_actions, "atoms", atoms, v_min, v_max)
        self._range = v_min, v_max
        self.register_buffer("value_Z", torch.linspace(v_min, v_max, atoms), persistent=False)

    def loss(self, outputs: Tensor, next_outputs: Tensor, return_KB: Tensor, discount_KB: Tensor, huber: float) -> Tensor:
        location_KBZ = return_KB[..., None] + discount_KB[..., None] * self.value_Z
        target_KBZ = value_losses.project(next_outputs.softmax(-1), location_KBZ, *self._range)
        return value_losses.cross_entropy(outputs, target_KBZ)


class HLGaussHead(_CategoricalHead, Head):
    """Histogram of the return per task and action, trained towards a Gaussian around the target (Farebrother et al. 2024, "HL-Gauss").

    Args:
        v_min, v_max: range of the histogram; targets are clipped to this range.
        bins: number of bins.
        sigma_ratio: sigma of the Gaussian in bin widths (0.75 in the paper).

    Raises:
        ValueError: fewer than 2 bins, or an empty range.
    """

    bounded = True
    edges: Tensor

    def __init__(
        self,
        num_features: int,
        num_actions: Sequence[int],
        *,
        v_min: FiniteFloat = -10.0,
        v_max: FiniteFloat = 10.0,
        bins: PositiveInt = 101,
        sigma_ratio: PositiveFloat = 0.75,
    ):
        super().__init__(num_features, num_actions, "bins", bins, v_min, v_max)
        self._sigma = sigma_ratio * (v_max - v_min) / bins
        edges = torch.linspace(v_min, v_max, bins + 1)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("value_Z", (edges[1:] + edges[:-1]) / 2, persistent=False)

    def loss(self, outputs: Tensor, next_outputs: Tensor, return_KB: Tensor, discount_KB: Tensor, huber: float) -> Tensor:
        target_KB = value_losses.td_target(return_KB, discount_KB, self.expectation(next_outputs))
        return value_losses.cross_entropy(outputs, value_losses.gaussian_histogram(target_KB, self.edges, self._sigma))


class QuantileHead(Head):
    """Quantiles of the return per task and action, at the levels (i + 1/2) / Z (Dabney et al. 2018, "QR-DQN").

    Args:
        quantiles: number of quantiles (200 in the paper, at four times the work of the default).
    """

    def __init__(self, num_features: int, num_actions: Sequence[int], *, quantiles: PositiveInt = 51):
        super().__init__(num_features, num_actions)
        self.distribution = _Distribution(num_features, num_actions, quantiles)

    def forward(self, features: Tensor) -> Tensor:
        return self.distribution(features)

    def expectation(self, outputs: Tensor) -> Tensor:
        return outputs.mean(-1)

    def mixture(self, outputs: Tensor) -> Tensor:
        """Concatenate the quantiles of all draws, `[K, B, draws * Z]`: more samples of the target."""
        return outputs.movedim(1, -2).flatten(-2)

    def loss(self, outputs: Tensor, next_outputs: Tensor, return_KB: Tensor, discount_KB: Tensor, huber: float) -> Tensor:
        target_KBZ = value_losses.td_target(return_KB[..., None], discount_KB[..., None], next_outputs)
        return value_losses.quantile_huber(outputs, target_KBZ, huber)

    def rescale(self, factor_K: Tensor, offset_K: Tensor) -> None:
        self.distribution.linear.rescale(factor_K, offset_K)
