"""Task weights from losses."""

from __future__ import annotations

import torch

from mtrl_cli.task_weights.base import TaskGradients, TaskWeights


class Uniform(TaskWeights):
    """The mean of the tasks' losses: every task weighs 1 / K."""

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        weight_K = torch.full_like(gradients.loss_K, 1 / len(self.tasks))
        gradients.weigh(weight_K)
        return weight_K
