"""Task weights from losses."""

from __future__ import annotations

import torch

from mtrl_cli.task_weights.base import TaskWeights


class Uniform(TaskWeights):
    """The mean of the tasks' losses: every task weighs 1 / K."""

    def backward(self, loss_K: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        loss_K.mean().backward()
        return torch.full_like(loss_K, 1 / loss_K.shape[0])
