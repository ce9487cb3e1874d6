"""How the losses of tasks become one gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Tasks:
    """What a weighting may know of the run's K tasks.

    Attributes:
        names: in order.
        random_scores, reference_scores: what random play and the reference reach, each None where it is not known.
        seed: for what is drawn.
        device: of the losses.
    """

    names: tuple[str, ...]
    random_scores: tuple[float | None, ...]
    reference_scores: tuple[float | None, ...]
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.names)


class TaskGradients(ABC):
    """The gradients of one batch's K losses, as far as they are asked for; P: all parameters that tasks share, flattened in order.

    One of `weigh`, `combine` and `replace` is called, once: it adds to the parameters' `grad`.

    Attributes:
        loss_K: float32 `[K]`, detached: each task's mean loss.
    """

    loss_K: torch.Tensor

    @abstractmethod
    def weigh(self, weight_K: torch.Tensor) -> None:
        """The gradient of the weighted sum of the losses, to all parameters, in one backward pass."""

    @abstractmethod
    def gram(self) -> torch.Tensor:
        """Inner products of the tasks' gradients over the shared parameters, float32 `[K, K]`."""

    @abstractmethod
    def rows(self) -> torch.Tensor:
        """Each task's gradient of the shared parameters, float32 `[K, P]`."""

    @abstractmethod
    def combine(self, weight_K: torch.Tensor) -> None:
        """The weighted sum of the tasks' gradients to the shared parameters; to each task's own 1 / K of its gradient."""

    @abstractmethod
    def replace(self, gradient_P: torch.Tensor) -> None:
        """A gradient (float32 `[P]`) to the shared parameters; to each task's own 1 / K of its gradient."""

    def agreed(self, weight_K: torch.Tensor) -> torch.Tensor:
        """Weights (or whatever a solver decides), as all processes have them that train together."""
        return weight_K


class TaskWeights(ABC):
    """Losses of all tasks to gradients of all parameters.

    All are brought to the scale of the mean: where every task has the same gradient, that gradient is the result.

    Attributes:
        needs: what of the gradients a method asks for, and so what an update costs: "losses" one backward pass, "gram" hardly more,
            "rows" every task's own gradient.
        uses_scores: whether the method requires `update_scores`.
        uses_losses_after_step: whether the method requires `after_step`: one more forward pass per update.
        capturable: whether an update can be recorded once and replayed (`capture.py`): whatever changes from one update to the next lies in
            tensors that stay where they are, and what the host works out goes through `capture.on_host`. Where not, updates are made one
            operation at a time.
    """

    needs: ClassVar[str] = "losses"
    uses_scores: ClassVar[bool] = False
    uses_losses_after_step: ClassVar[bool] = False
    capturable: ClassVar[bool] = False

    def __init__(self, tasks: Tasks):
        self.tasks = tasks

    @abstractmethod
    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        """Add the weighted gradient to each parameter's `grad`.

        Returns:
            The weights used, float32 `[K]`, detached.
        """

    def after_step(self, loss_K: torch.Tensor) -> None:
        """Update the weights with the losses (float32 `[K]`) of the same batch after the optimizer step."""

    def update_scores(self, recent: dict[str, float]) -> None:
        """Update the weights with mean unscaled returns of recent training episodes, by task; tasks without episodes are absent."""

    def state_dict(self) -> dict[str, Any]:
        """What the weights have learned so far."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
