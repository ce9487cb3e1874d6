"""Metrics of updates, accumulated on the device, and the check for finite losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mtrl_cli.errors import RunError
from mtrl_cli.metric_names import GRAD_NORM, LOSS, Q_MEAN, WEIGHT
from mtrl_cli.parallel.distributed import Ranks

_NEVER = torch.iinfo(torch.int64).max


class UpdateMetrics:
    """Means of loss, value and weight of each task and of the gradient norm.

    `add` is part of an update's CUDA graph and never waits for the device. `read` and `check_finite` wait.

    Args:
        task_names: names of the K tasks.
        device: device of the losses.
        ranks: ranks whose metrics are averaged.
    """

    def __init__(self, task_names: Sequence[str], device: torch.device, ranks: Ranks):
        K = len(task_names)
        self._task_names = task_names
        self._ranks = ranks
        self._totals = {name: torch.zeros(K, device=device) for name in ("loss", "q", "weight")} | {"norm": torch.zeros((), device=device)}
        self._count = 0
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_step_K = torch.full((K,), _NEVER, dtype=torch.int64, device=device)

    def start_update(self, step: int) -> None:
        """Set the step (per task) of the next `add`."""
        self._step.fill_(step)
        self._count += 1

    def add(self, loss_K: torch.Tensor, q_K: torch.Tensor, weight_K: torch.Tensor, norm: torch.Tensor) -> None:
        """Add the metrics of an update: float32 `[K]` each, and the scalar gradient norm."""
        # A loss that is not finite corrupts the shared parameters, and then the next loss of every task: only the first is recorded.
        # If all losses are finite and the gradient is not, the task with the largest loss is recorded.
        bad_K = ~torch.isfinite(loss_K)
        bad_K = torch.where(bad_K.any() | torch.isfinite(norm), bad_K, loss_K == loss_K.max())
        first = bad_K & (self._bad_step_K == _NEVER).all()
        self._bad_step_K.copy_(torch.where(first, self._step, self._bad_step_K))
        for name, value in (("loss", loss_K), ("q", q_K), ("weight", weight_K), ("norm", norm)):
            self._totals[name].add_(value)

    def check_finite(self) -> None:
        """Check that all losses and gradients so far were finite.

        Raises:
            RunError: a loss or gradient was not finite; the message names the first task and step.
        """
        first, task = self._bad_step_K.min(0)
        if first.item() != _NEVER:
            raise RunError(
                f"the loss of task {self._task_names[int(task)]} or its gradient is not finite at step {int(first)}. "
                "Lower optimizer.lr or optimizer.max_grad_norm"
            )

    def read(self) -> dict[str, float]:
        """Return means since the last call, by metric; empty if there was no update."""
        count, self._count = self._count, 0
        self._ranks.mean_([*self._totals.values()])  # only the values of actions differ between ranks
        metrics: dict[str, float] = {}
        if count:
            means: dict[str, Any] = {name: (total / count).tolist() for name, total in self._totals.items()}
            for k, name in enumerate(self._task_names):
                metrics |= {LOSS + name: means["loss"][k], Q_MEAN + name: means["q"][k], WEIGHT + name: means["weight"][k]}
            metrics[GRAD_NORM] = means["norm"]
        for total in self._totals.values():
            total.zero_()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "totals": dict(self._totals)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        self._count = int(state["count"])
        for name, total in self._totals.items():
            total.copy_(state["totals"][name])
