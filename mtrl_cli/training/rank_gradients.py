"""Task gradients of all ranks, averaged before they are weighted, so that every rank computes the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.task_weights.base import TaskGradients


class RankGradients(TaskGradients):
    """Gradients that one process would compute from the samples of all ranks, with equal batches on each rank.

    The mean over ranks of a weighted sum is one exchange of the size of the network. For inner products of task gradients, the gradients
    are exchanged first, which is K times as much.

    Args:
        mine: gradients of this rank's batch.
        shared, own: shared parameters and task-specific parameters, as in `mine`.
        ranks: processes whose gradients are averaged.
    """

    def __init__(self, mine: TaskGradients, shared: Sequence[torch.nn.Parameter], own: Sequence[torch.nn.Parameter], ranks: Ranks):
        self._mine, self._shared, self._own, self._ranks = mine, list(shared), list(own), ranks
        self._rows: torch.Tensor | None = None
        self.loss_K = mine.loss_K.clone()
        ranks.mean_([self.loss_K])

    def weigh(self, weight_K: torch.Tensor) -> None:
        self._mine.weigh(weight_K)
        self._average([*self._shared, *self._own])

    def rows(self) -> torch.Tensor:
        if self._rows is None:
            self._rows = self._mine.rows().clone()
            self._ranks.mean_([self._rows])
        return self._rows

    def combine(self, weight_K: torch.Tensor) -> None:
        if self._rows is not None:
            self.replace(weight_K @ self._rows)
            return
        self._mine.combine(weight_K)
        self._average([*self._shared, *self._own])

    def replace(self, gradient_P: torch.Tensor) -> None:
        self._mine.replace(gradient_P)
        self._average(self._own)

    def agreed(self, weight_K: torch.Tensor) -> torch.Tensor:
        return self._ranks.agreed(weight_K)

    def _average(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        # A parameter without a gradient has none on any rank, because this depends only on the network.
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            self._ranks.mean_(gradients)
