"""What task weights are made of: pure functions of weights and Gram matrices, and a vector that a method learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtrl_cli.machine import cuda_graphs
from mtrl_cli.task_weights.base import TaskGradients


def finite_or_uniform(weight_K: torch.Tensor) -> torch.Tensor:
    """The weights `[K]`, or 1 / K each where one of them is not finite. Nothing waits for the device."""
    return torch.where(torch.isfinite(weight_K).all(), weight_K, 1 / len(weight_K))


def combine(gradients: TaskGradients, weights_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Weigh the tasks' gradients by a function of their Gram matrix.

    The function is given float32 `[K, K]`, scaled to a mean square of the rows of 1: no method here depends on the common scale of the
    gradients, and the small constants that solvers add are then small beside any. Where all gradients are zero, or one is not finite,
    or the function gives what is not finite, the weights are uniform.

    Returns:
        The weights used, float32 `[K]`.
    """
    gram_KK = gradients.gram()
    weight_K = gradients.agreed(finite_or_uniform(weights_of(gram_KK / gram_KK.diagonal().mean())))
    gradients.combine(weight_K)
    return weight_K


def on_host(gram_KK: torch.Tensor, weights_of: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Weights worked out on the CPU in a dtype; not a number where the matrix is not finite or cannot be decomposed.

    One transfer each way: these methods decide step by step, and each step would wait for the device.
    """

    def solve(host_KK: torch.Tensor) -> torch.Tensor:
        host_KK = host_KK.to(dtype)
        if not bool(torch.isfinite(host_KK).all()):
            return torch.full_like(host_KK[0], torch.nan)
        try:
            return weights_of(host_KK)
        except torch.linalg.LinAlgError:
            return torch.full_like(host_KK[0], torch.nan)

    return cuda_graphs.on_host(gram_KK, solve, like=gram_KK[0])


class LearnedVector:
    """A vector that a weighting learns by itself with Adam (Kingma and Ba 2015, Algorithm 1), and all of its state.

    torch's own Adam counts its steps on the host unless the vector is on a GPU; this one can be recorded anywhere (`capture.py`).

    Args:
        value_K: where it starts, float32 `[K]`.
        lr: step size.
        weight_decay: L2 penalty, added to the gradient.

    Attributes:
        value_K: what it is now; may be changed in place.
    """

    _BETA_1, _BETA_2, _EPS = 0.9, 0.999, 1e-8  # the paper's

    def __init__(self, value_K: torch.Tensor, lr: float, weight_decay: float = 0.0):
        self.value_K = value_K
        self._lr, self._weight_decay = lr, weight_decay
        self._steps = torch.zeros((), device=value_K.device)
        self._mean_K, self._square_K = torch.zeros_like(value_K), torch.zeros_like(value_K)

    def step(self, gradient_K: torch.Tensor) -> None:
        """Take one step against a gradient, float32 `[K]`; what of it is not finite counts as 0."""
        gradient_K = torch.nan_to_num(gradient_K, nan=0.0, posinf=0.0, neginf=0.0) + self._weight_decay * self.value_K
        self._steps.add_(1)
        self._mean_K.lerp_(gradient_K, 1 - self._BETA_1)
        self._square_K.mul_(self._BETA_2).addcmul_(gradient_K, gradient_K, value=1 - self._BETA_2)
        mean_K = self._mean_K / (1 - self._BETA_1**self._steps)
        square_K = self._square_K / (1 - self._BETA_2**self._steps)
        self.value_K.sub_(self._lr * mean_K / (square_K.sqrt() + self._EPS))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value_K, "adam": {"step": self._steps, "exp_avg": self._mean_K, "exp_avg_sq": self._square_K}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value_K.copy_(state["value"])
        if state["adam"]:  # empty in older checkpoints that had not made a step
            for mine, name in ((self._steps, "step"), (self._mean_K, "exp_avg"), (self._square_K, "exp_avg_sq")):
                mine.copy_(state["adam"][name])
