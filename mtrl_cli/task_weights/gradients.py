"""Task gradients by plain autograd, for any network: the reference in the tests of faster implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mtrl_cli.task_weights.base import TaskGradients


class AutogradGradients(TaskGradients):
    """One backward pass per task for rows.

    Args:
        loss_K: float32 `[K]`, with its graph.
        shared: parameters that several tasks share.
        own: parameters whose rows belong to one task each.
        trained: factors on the gradients of partly frozen shared parameters, by position in `shared`: 1 for trained rows, 0 for frozen.
    """

    def __init__(
        self,
        loss_K: torch.Tensor,
        shared: Sequence[torch.nn.Parameter],
        own: Sequence[torch.nn.Parameter],
        trained: Mapping[int, torch.Tensor] | None = None,
    ):
        self.loss_K = loss_K.detach()
        self._loss_K, self._shared, self._own = loss_K, list(shared), list(own)
        self._trained = trained or {}
        self._rows: torch.Tensor | None = None

    def weigh(self, weight_K: torch.Tensor) -> None:
        (weight_K * self._loss_K).sum().backward()

    def rows(self) -> torch.Tensor:
        if self._rows is None:
            self._rows = torch.stack([self._row(loss) for loss in self._loss_K])
        return self._rows

    def _row(self, loss: torch.Tensor) -> torch.Tensor:
        gradients = list(torch.autograd.grad(loss, self._shared, retain_graph=True, materialize_grads=True))
        for index, mask in self._trained.items():
            gradients[index] = gradients[index] * mask
        return torch.cat([gradient.flatten() for gradient in gradients])

    def combine(self, weight_K: torch.Tensor) -> None:
        if self._rows is not None:
            self.replace(weight_K @ self._rows)
            return
        self._add(torch.autograd.grad((weight_K * self._loss_K).sum(), self._shared, retain_graph=True, materialize_grads=True))

    def replace(self, gradient_P: torch.Tensor) -> None:
        self._add(split_like(gradient_P, self._shared))

    def _add(self, of_shared: Sequence[torch.Tensor]) -> None:
        of_own = torch.autograd.grad(self._loss_K.mean(), self._own, materialize_grads=True)
        add_gradients([*self._shared, *self._own], [*of_shared, *of_own])


def split_like(gradient_P: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Divide a flat gradient into the shapes of parameters."""
    parts = gradient_P.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


def add_gradients(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
    """Add gradients to the `grad` of parameters, in the memory layout of the parameter: fused optimizers require it."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
