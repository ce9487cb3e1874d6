"""Interface of task weightings: the losses of all tasks become one gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_cli.machine.saved import Saved


@dataclass(frozen=True)
class Tasks:
    """The K tasks of a run, for the constructor of a weighting.

    Attributes:
        names: names of the tasks, in order.
        random_scores, reference_scores: scores of random play and of the reference; None if unknown.
        seed: seed of random draws.
        device: device of the losses.
    """

    names: tuple[str, ...]
    random_scores: tuple[float | None, ...]
    reference_scores: tuple[float | None, ...]
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.names)


class TaskGradients(ABC):
    """Gradients of the K losses of one batch, computed on demand. P: size of all shared parameters, flattened in order.

    A weighting calls exactly one of `weigh`, `combine` and `replace`, once. The call adds to the `grad` of the parameters.

    Attributes:
        loss_K: float32 `[K]`, detached: mean loss of each task.
    """

    loss_K: torch.Tensor

    @abstractmethod
    def weigh(self, weight_K: torch.Tensor) -> None:
        """Add the gradient of the weighted sum of the losses to all parameters, in one backward pass."""

    def gram(self) -> torch.Tensor:
        """Inner products of the tasks' gradients over the shared parameters, float32 `[K, K]`."""
        rows_KP = self.rows()
        return rows_KP @ rows_KP.T

    @abstractmethod
    def rows(self) -> torch.Tensor:
        """Gradient of each task in the shared parameters, float32 `[K, P]`."""

    @abstractmethod
    def combine(self, weight_K: torch.Tensor) -> None:
        """Add the weighted sum of the task gradients to the gradients of shared parameters, and 1 / K of the task-specific gradients."""

    @abstractmethod
    def replace(self, gradient_P: torch.Tensor) -> None:
        """Add a gradient (float32 `[P]`) to the gradients of shared parameters, and 1 / K of the task-specific gradients."""

    def agreed(self, weight_K: torch.Tensor) -> torch.Tensor:
        """Weights, or another result of a solver, that are equal on all ranks."""
        return weight_K


class TaskWeights(Saved, ABC):
    """Base class of task weightings: convert the losses of all tasks to gradients of all parameters.

    Weights are on the scale of the mean: if all tasks have the same gradient, that gradient is the result.

    Attributes:
        needs: required form of the gradients, which sets the cost of an update: "losses" (one backward pass), "gram" (little more) or
            "rows" (the gradient of every task).
        uses_scores: whether the training loop calls `update_scores`.
        uses_losses_after_step: whether `after_step` is called with the losses of the batch after the optimizer step, at the cost of one
            more forward pass.
        capturable: whether CUDA graphs can record an update (`machine/cuda_graphs.py`): state lives in tensors that are changed in place,
            and computations on the host go through `cuda_graphs.on_host`. Otherwise updates run eagerly.
    """

    needs: ClassVar[str] = "losses"
    uses_scores: ClassVar[bool] = False
    uses_losses_after_step: ClassVar[bool] = False
    capturable: ClassVar[bool] = False

    def __init__(self, tasks: Tasks):
        self.tasks = tasks

    @abstractmethod
    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        """Add the weighted gradient to the `grad` of each parameter.

        Returns:
            The weights, float32 `[K]`, detached.
        """

    def after_step(self, loss_K: torch.Tensor) -> None:
        """Update the weights with the losses (float32 `[K]`) of the same batch after the optimizer step."""

    def update_scores(self, recent: dict[str, float]) -> None:
        """Update the weights with mean unscaled returns of recent training episodes, by task; tasks without episodes are missing."""
