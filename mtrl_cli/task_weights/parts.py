"""What task weights are made of: pure functions of weights and Gram matrices, and a vector that a method learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    host_KK = gram_KK.to("cpu", dtype)
    if not bool(torch.isfinite(host_KK).all()):
        return torch.full_like(gram_KK[0], torch.nan)
    try:
        return weights_of(host_KK).to(gram_KK)
    except torch.linalg.LinAlgError:
        return torch.full_like(gram_KK[0], torch.nan)


class LearnedVector:
    """A vector that a weighting learns by itself with Adam (Kingma and Ba 2015), and all of its state.

    Args:
        value_K: where it starts, float32 `[K]`.
        lr: step size.
        weight_decay: L2 penalty, added to the gradient.

    Attributes:
        value_K: what it is now; may be changed in place.
    """

    def __init__(self, value_K: torch.Tensor, lr: float, weight_decay: float = 0.0):
        self.value_K = value_K
        self._adam = torch.optim.Adam([value_K], lr=lr, weight_decay=weight_decay)

    def step(self, gradient_K: torch.Tensor) -> None:
        """Take one step against a gradient, float32 `[K]`; what of it is not finite counts as 0."""
        self.value_K.grad = torch.nan_to_num(gradient_K, nan=0.0, posinf=0.0, neginf=0.0)
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value_K, "adam": dict(self._adam.state_dict()["state"].get(0, {}))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value_K.copy_(state["value"])
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": {0: state["adam"]} if state["adam"] else {}, "param_groups": groups})
