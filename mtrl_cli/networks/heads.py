"""Heads: from a task's features to what is said of its actions. Every task has a head of its own.

A head's outputs describe each action's return: by its mean alone (plain, dueling), or by a distribution in Z numbers. Those whose
values lie within fixed ends are `bounded`: they need a value scale that keeps returns within these (see `agents/value_scale.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from mtrl_cli.networks import value_losses
from mtrl_cli.networks.per_task import TaskLinear
from mtrl_cli.types import FiniteFloat, PositiveFloat, PositiveInt


class Head(nn.Module, ABC):
    """Features of all tasks to outputs for all actions, and what these outputs mean.

    Args:
        num_features: length of a feature vector.
        num_actions: how many actions each task has; A is the largest.

    Attributes:
        bounded: whether its values lie within fixed ends, whatever its parameters.
    """

    bounded: ClassVar[bool] = False
    invalid_KA: torch.Tensor

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__()
        actions = torch.arange(max(num_actions))
        self.register_buffer("invalid_KA", actions >= torch.tensor(num_actions)[:, None], persistent=False)

    @abstractmethod
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[K, B, F]` to outputs `[K, B, A]` or `[K, B, A, Z]` (float32), of no meaning for actions that a task does not have."""

    def expectation(self, outputs: torch.Tensor) -> torch.Tensor:
        """The values that outputs mean: `[K, B, ...]` or `[K, B, ..., Z]` to `[K, B, ...]`."""
        return outputs

    def values(self, outputs: torch.Tensor) -> torch.Tensor:
        """Action values `[K, B, A]` (float32) of what `forward` gave; minus infinity for actions that a task does not have."""
        return self.expectation(outputs).masked_fill(self.invalid_KA[:, None], -torch.inf)

    def mixture(self, outputs: torch.Tensor) -> torch.Tensor:
        """What is said of one action over several draws of a state, as one: `[K, draws, B, ...]` to `[K, B, ...]`.

        Values become their mean, distributions their mixture, whose mean is the same.
        """
        return outputs.mean(1)

    @abstractmethod
    def loss(
        self,
        outputs: torch.Tensor,
        next_outputs: torch.Tensor,
        return_KB: torch.Tensor,
        discount_KB: torch.Tensor,
        huber: float,
    ) -> torch.Tensor:
        """How far the outputs of the actions taken are from return_KB + discount_KB times what is said of the next state.

        Args:
            outputs: float32 `[K, B]` or `[K, B, Z]`, of the actions taken.
            next_outputs: the same, of the actions chosen in the next states, by the target network.
            return_KB: float32 `[K, B]`, the window's discounted rewards.
            discount_KB: float32 `[K, B]`, of the next state; 0 where the window terminated.
            huber: the error beyond which it is linear, for heads whose loss is of errors.

        Returns:
            float32 `[K, B]`.
        """

    def rescale(self, factor_K: torch.Tensor, offset_K: torch.Tensor) -> None:
        """Change the parameters so that each task's values become factor (above 0) times themselves plus offset, float32 `[K]` each.

        Raises:
            NotImplementedError: a bounded head, whose values cannot become any others.
        """
        raise NotImplementedError(f"the values of {type(self).__name__} have fixed ends")

    def parameter_counts(self) -> list[int]:
        """Each task's number of parameters."""
        layers = [module.sizes for module in self.modules() if isinstance(module, TaskLinear)]
        return [sum(sizes) for sizes in zip(*layers, strict=True)]


def _scalar_loss(
    q_KB: torch.Tensor, next_q_KB: torch.Tensor, return_KB: torch.Tensor, discount_KB: torch.Tensor, threshold: float
) -> torch.Tensor:
    return value_losses.huber(value_losses.td_target(return_KB, discount_KB, next_q_KB) - q_KB, threshold)


class PlainHead(Head):
    """One linear layer per task (Mnih et al. 2015)."""

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__(num_features, num_actions)
        self.linear = TaskLinear(num_features, num_actions)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)

    def loss(
        self, outputs: torch.Tensor, next_outputs: torch.Tensor, return_KB: torch.Tensor, discount_KB: torch.Tensor, huber: float
    ) -> torch.Tensor:
        return _scalar_loss(outputs, next_outputs, return_KB, discount_KB, huber)

    def rescale(self, factor_K: torch.Tensor, offset_K: torch.Tensor) -> None:
        self.linear.rescale(factor_K, offset_K)


class DuelingHead(Head):
    """A state value and advantages per task (Wang et al. 2016, equation 9): Q = V + A - mean of A over the task's own actions."""

    share_KA1: torch.Tensor

    def __init__(self, num_features: int, num_actions: Sequence[int]):
        super().__init__(num_features, num_actions)
        self.value = TaskLinear(num_features, [1] * len(num_actions))
        self.advantage = TaskLinear(num_features, num_actions)
        share = (~self.invalid_KA).float() / (~self.invalid_KA).sum(1, keepdim=True)
        self.register_buffer("share_KA1", share[..., None], persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        advantage_KBA = self.advantage(features)
        return self.value(features) + advantage_KBA - advantage_KBA @ self.share_KA1

    def loss(
        self, outputs: torch.Tensor, next_outputs: torch.Tensor, return_KB: torch.Tensor, discount_KB: torch.Tensor, huber: float
    ) -> torch.Tensor:
        return _scalar_loss(outputs, next_outputs, return_KB, discount_KB, huber)

    def rescale(self, factor_K: torch.Tensor, offset_K: torch.Tensor) -> None:
        self.value.rescale(factor_K, offset_K)
        self.advantage.rescale(factor_K, torch.zeros_like(offset_K))


class _Distribution(nn.Module):
    """A linear layer per task and action to Z numbers: features `[K, B, F]` to `[K, B, A, Z]`."""

    def __init__(self, num_features: int, num_actions: Sequence[int], numbers: int):
        super().__init__()
        self.numbers = numbers
        self.linear = TaskLinear(num_features, [actions * numbers for actions in num_actions])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features).unflatten(-1, (-1, self.numbers))


def _check_support(numbers: int, name: str, v_min: float, v_max: float) -> None:
    if numbers < 2:
        raise ValueError(f"network.head.{name}={numbers}: expected 2 at least")
    if v_min >= v_max:
        raise ValueError(f"network.head.v_min={v_min:g} is not below network.head.v_max={v_max:g}: expected a range of values")


class C51Head(Head):
    """Logits of fixed, evenly spaced returns per task and action (Bellemare et al. 2017, algorithm 1).

    Args:
        v_min, v_max: the first and the last return; targets beyond them are brought to them.
        atoms: how many returns.

    Raises:
        ValueError: fewer than 2 atoms, or an empty range.
    """

    bounded = True
    atom_Z: torch.Tensor

    def __init__(
        self,
        num_features: int,
        num_actions: Sequence[int],
        *,
        v_min: FiniteFloat = -10.0,
        v_max: FiniteFloat = 10.0,
        atoms: PositiveInt = 51,
    ):
        super().__init__(num_features, num_actions)
        _check_support(atoms, "atoms", v_min, v_max)
        self._v_min, self._v_max = v_min, v_max
        self.distribution = _Distribution(num_features, num_actions, atoms)
        self.register_buffer("atom_Z", torch.linspace(v_min, v_max, atoms), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.distribution(features)

    def expectation(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.softmax(-1) @ self.atom_Z

    def mixture(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.log_softmax(-1).logsumexp(1)

    def loss(
        self, outputs: torch.Tensor, next_outputs: torch.Tensor, return_KB: torch.Tensor, discount_KB: torch.Tensor, huber: float
    ) -> torch.Tensor:
        location_KBZ = return_KB[..., None] + discount_KB[..., None] * self.atom_Z
        target_KBZ = value_losses.project(next_outputs.softmax(-1), location_KBZ, self._v_min, self._v_max)
        return value_losses.cross_entropy(outputs, target_KBZ)


class HLGaussHead(Head):
    """Logits of a histogram per task and action, trained towards a Gaussian around the target (Farebrother et al. 2024, "HL-Gauss").

    Args:
        v_min, v_max: the ends of the histogram; targets beyond them are brought to them.
        bins: of the histogram.
        sigma_ratio: the Gaussian's sigma in widths of a bin (the paper's 0.75).

    Raises:
        ValueError: fewer than 2 bins, or an empty range.
    """

    bounded = True
    edges: torch.Tensor
    centre_Z: torch.Tensor

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
        super().__init__(num_features, num_actions)
        _check_support(bins, "bins", v_min, v_max)
        self._sigma = sigma_ratio * (v_max - v_min) / bins
        self.distribution = _Distribution(num_features, num_actions, bins)
        edges = torch.linspace(v_min, v_max, bins + 1)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("centre_Z", (edges[1:] + edges[:-1]) / 2, persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.distribution(features)

    def expectation(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.softmax(-1) @ self.centre_Z

    def mixture(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.log_softmax(-1).logsumexp(1)

    def loss(
        self, outputs: torch.Tensor, next_outputs: torch.Tensor, return_KB: torch.Tensor, discount_KB: torch.Tensor, huber: float
    ) -> torch.Tensor:
        target_KB = value_losses.td_target(return_KB, discount_KB, self.expectation(next_outputs))
        return value_losses.cross_entropy(outputs, value_losses.gaussian_histogram(target_KB, self.edges, self._sigma))


class QuantileHead(Head):
    """Quantiles of the return per task and action, at the levels (i + 1/2) / Z (Dabney et al. 2018, "QR-DQN").

    Args:
        quantiles: how many (the paper's 200 take four times the work of the default).
    """

    def __init__(self, num_features: int, num_actions: Sequence[int], *, quantiles: PositiveInt = 51):
        super().__init__(num_features, num_actions)
        self.distribution = _Distribution(num_features, num_actions, quantiles)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.distribution(features)

    def expectation(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.mean(-1)

    def mixture(self, outputs: torch.Tensor) -> torch.Tensor:
        """All draws' quantiles side by side, `[K, B, draws * Z]`: as many samples of the target."""
        return outputs.movedim(1, -2).flatten(-2)

    def loss(
        self, outputs: torch.Tensor, next_outputs: torch.Tensor, return_KB: torch.Tensor, discount_KB: torch.Tensor, huber: float
    ) -> torch.Tensor:
        target_KBZ = value_losses.td_target(return_KB[..., None], discount_KB[..., None], next_outputs)
        return value_losses.quantile_huber(outputs, target_KBZ, huber)

    def rescale(self, factor_K: torch.Tensor, offset_K: torch.Tensor) -> None:
        self.distribution.linear.rescale(factor_K, offset_K)
