"""Shared parts of task weightings: functions of weights and Gram matrices, and a vector learned with Adam."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from mtrl_cli.machine import cuda_graphs
from mtrl_cli.machine.saved import Saved
from mtrl_cli.task_weights.base import TaskGradients

WeightsOfGram = Callable[[torch.Tensor], torch.Tensor]
"""Gram matrix `[K, K]` to weights `[K]`."""


def finite_or_uniform(weight_K: torch.Tensor) -> torch.Tensor:
    """The weights `[K]`, or 1 / K each if one of them is not finite. Does not synchronize with the device."""
    return torch.where(torch.isfinite(weight_K).all(), weight_K, 1 / len(weight_K))


def weigh_by_softmax(gradients: TaskGradients, logit_K: torch.Tensor) -> torch.Tensor:
    """Weigh the losses by the softmax of logits (float32 `[K]`), or equally if a weight is not finite. Returns the weights, `[K]`."""
    weight_K = finite_or_uniform(logit_K.softmax(0))
    gradients.weigh(weight_K)
    return weight_K


def combine(gradients: TaskGradients, weights_of: WeightsOfGram) -> torch.Tensor:
    """Combine the tasks' gradients with weights computed from their Gram matrix.

    The matrix is float32 `[K, K]`, scaled so that the mean square of the rows is 1. No method depends on the common scale of the
    gradients, and small constants in solvers stay small relative to the matrix. Weights are uniform if all gradients are zero, one
    gradient is not finite, or one weight is not finite.

    Returns:
        The weights, float32 `[K]`.
    """
    gram_KK = gradients.gram()
    weight_K = gradients.agreed(finite_or_uniform(weights_of(gram_KK / gram_KK.diagonal().mean())))
    gradients.combine(weight_K)
    return weight_K


def combine_on_host(gradients: TaskGradients, weights_of: WeightsOfGram, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Combine the tasks' gradients as `combine`, with weights computed on the CPU.

    The methods decide step by step, and each step would wait for the device. There is one transfer each way instead.

    Args:
        gradients: gradients of one batch.
        weights_of: Gram matrix to weights, both in `dtype`. Not called if the matrix is not finite. Weights are uniform after a
            `LinAlgError`.
        dtype: dtype of the computation.

    Returns:
        The weights, float32 `[K]`.
    """

    def solve(host_KK: torch.Tensor) -> torch.Tensor:
        host_KK = host_KK.to(dtype)
        with suppress(torch.linalg.LinAlgError):
            if bool(torch.isfinite(host_KK).all()):
                return weights_of(host_KK)
        return torch.full_like(host_KK[0], torch.nan)

    return combine(gradients, lambda gram_KK: cuda_graphs.on_host(gram_KK, solve, like=gram_KK[0]))


class LearnedVector(Saved):
    """A vector that a weighting learns with Adam (Kingma and Ba 2015, Algorithm 1).

    torch's own Adam counts its steps on the host unless the vector is on a GPU. All state is in tensors here, so that updates can be
    recorded (`machine/cuda_graphs.py`).

    Args:
        value_K: initial value, float32 `[K]`.
        lr: learning rate.
        weight_decay: L2 penalty, added to the gradient.

    Attributes:
        value_K: current value; may be changed in place.
    """

    saved = ("value_K", "_steps", "_mean_K", "_square_K")
    _BETA_1, _BETA_2, _EPS = 0.9, 0.999, 1e-8  # of the paper

    def __init__(self, value_K: torch.Tensor, lr: float, weight_decay: float = 0.0):
        self.value_K = value_K
        self._lr, self._weight_decay = lr, weight_decay
        self._steps = torch.zeros((), device=value_K.device)
        self._mean_K = torch.zeros_like(value_K)
        self._square_K = torch.zeros_like(value_K)

    def step(self, gradient_K: torch.Tensor) -> None:
        """Take one step against a gradient, float32 `[K]`. Entries that are not finite count as 0."""
        gradient_K = torch.nan_to_num(gradient_K, nan=0.0, posinf=0.0, neginf=0.0) + self._weight_decay * self.value_K
        self._steps.add_(1)
        self._mean_K.lerp_(gradient_K, 1 - self._BETA_1)
        self._square_K.mul_(self._BETA_2).addcmul_(gradient_K, gradient_K, value=1 - self._BETA_2)
        mean_K = self._mean_K / (1 - self._BETA_1**self._steps)
        square_K = self._square_K / (1 - self._BETA_2**self._steps)
        self.value_K.sub_(self._lr * mean_K / (square_K.sqrt() + self._EPS))
