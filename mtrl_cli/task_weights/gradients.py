"""Gradients of tasks by plain autograd: for any network, and what quicker ways are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mtrl_cli.task_weights.base import TaskGradients


class AutogradGradients(TaskGradients):
    """A backward pass for each task where rows are asked for.

    Args:
        loss_K: float32 `[K]`, with its graph.
        shared: parameters that several tasks reach.
        own: parameters whose rows belong to one task each.
        trained: of shared parameters that are frozen in part, by position: what multiplies their gradients, 1 where they are trained.
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

    def gram(self) -> torch.Tensor:
        rows_KP = self.rows()
        return rows_KP @ rows_KP.T

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
        weighted = torch.autograd.grad((weight_K * self._loss_K).sum(), self._shared, retain_graph=True, materialize_grads=True)
        self._add(weighted)

    def replace(self, gradient_P: torch.Tensor) -> None:
        parts = gradient_P.split([parameter.numel() for parameter in self._shared])
        self._add([part.view_as(parameter) for part, parameter in zip(parts, self._shared, strict=True)])

    def _add(self, of_shared: Sequence[torch.Tensor]) -> None:
        of_own = torch.autograd.grad(self._loss_K.mean(), self._own, materialize_grads=True)
        add_gradients([*self._shared, *self._own], [*of_shared, *of_own])


def add_gradients(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
    """Add to each parameter's `grad`, in the parameter's own layout, as a backward pass would: fused optimizers count on it."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
