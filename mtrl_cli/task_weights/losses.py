"""Task weights from the losses, with one backward pass."""

from __future__ import annotations

import torch

from mtrl_cli.errors import unknown
from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.common import LearnedVector, weigh_by_softmax
from mtrl_cli.types import NonNegativeFloat, PositiveFloat, PositiveInt

_TINY = 1e-8  # keeps logarithms and ratios of losses finite; the value of FAMO's code


class Uniform(TaskWeights):
    """Mean of the tasks' losses: every task has weight 1 / K."""

    capturable = True

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        weight_K = torch.full_like(gradients.loss_K, 1 / len(self.tasks))
        gradients.weigh(weight_K)
        return weight_K


class Static(TaskWeights):
    """Constant weights from the configuration, divided by their sum.

    Args:
        weights: weight of each task by name; other tasks have 1.

    Raises:
        ValueError: an unknown task name, or no weight above 0.
    """

    capturable = True

    def __init__(self, tasks: Tasks, *, weights: dict[str, NonNegativeFloat]):
        super().__init__(tasks)
        for name in weights:
            if name not in tasks.names:
                raise ValueError(unknown("task", name, tasks.names, where=" in task_weights.weights"))
        chosen = [float(weights.get(name, 1.0)) for name in tasks.names]
        if not sum(chosen) > 0:
            raise ValueError("task_weights.weights must be above 0 for at least one task, got 0 for all")
        self._weight_K = torch.tensor([weight / sum(chosen) for weight in chosen], device=tasks.device)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        gradients.weigh(self._weight_K)
        return self._weight_K


class Random(TaskWeights):
    """RLW (Lin et al. 2022, "Reasonable Effectiveness of Random Weighting", Algorithm 2): softmax of new normal draws in each update."""

    capturable = True
    saved = ("_generator",)

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        self._generator = torch.Generator(tasks.device).manual_seed(tasks.seed)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return weigh_by_softmax(gradients, torch.randn(len(self.tasks), generator=self._generator, device=self.tasks.device))


class Uncertainty(TaskWeights):
    """Weights from learned uncertainty (Kendall et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", section 3.2).

    The log-variances s minimise sum(exp(-s) L / 2 + s / 2), with a separate Adam. Weights are exp(-s), divided by their sum.

    Args:
        lr: learning rate of the log-variances.
    """

    capturable = True
    saved = ("_log_variance",)

    def __init__(self, tasks: Tasks, *, lr: PositiveFloat):
        super().__init__(tasks)
        self._log_variance = LearnedVector(torch.zeros(len(tasks), device=tasks.device), lr)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        log_variance_K = self._log_variance.value_K
        weight_K = weigh_by_softmax(gradients, -log_variance_K)
        self._log_variance.step(0.5 - 0.5 * (-log_variance_K).exp() * gradients.loss_K)
        return weight_K


class DWA(TaskWeights):
    """Dynamic weight average (Liu et al. 2019, "End-to-End Multi-Task Learning with Attention", equation 7).

    Weights are softmax(r / temperature), with r a task's mean loss in the last epoch divided by that in the epoch before. A task whose
    loss falls slowest has the largest weight. Weights are uniform in the first two epochs.

    Args:
        epoch: updates per epoch. Reinforcement learning has no pass over a data set.
        temperature: larger values give more uniform weights.
    """

    capturable = False  # counts epochs on the host
    saved = ("_updates", "_sum_K", "_last_K", "_before_K")

    def __init__(self, tasks: Tasks, *, epoch: PositiveInt, temperature: PositiveFloat):
        super().__init__(tasks)
        self._epoch, self._temperature = epoch, temperature
        self._updates = 0
        self._sum_K = torch.zeros(len(tasks), device=tasks.device)
        self._last_K = torch.zeros_like(self._sum_K)
        self._before_K = torch.zeros_like(self._sum_K)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        if self._updates and self._updates % self._epoch == 0:
            self._before_K, self._last_K = self._last_K, self._sum_K / self._epoch
            self._sum_K = torch.zeros_like(self._sum_K)
        rate_K = self._last_K / self._before_K.clamp(min=_TINY)
        if self._updates < 2 * self._epoch:
            rate_K = torch.zeros_like(rate_K)
        self._sum_K += gradients.loss_K
        self._updates += 1
        return weigh_by_softmax(gradients, rate_K / self._temperature)


class FAMO(TaskWeights):
    """Fast adaptive multitask optimization (Liu et al. 2023, "FAMO", Algorithm 1), for losses of at least 0.

    The gradient is that of c sum(z log L), with z the softmax of learned logits and c such that the weights c z / L sum to 1 (equation 9).
    After the step, Adam moves the logits so that the task whose log loss fell least has a larger weight. This needs one more forward pass
    per update.

    Args:
        lr: learning rate of the logits.
        weight_decay: weight decay of the logits; gamma in the paper.
    """

    uses_losses_after_step = True
    capturable = True
    saved = ("_logit",)

    def __init__(self, tasks: Tasks, *, lr: PositiveFloat, weight_decay: NonNegativeFloat):
        super().__init__(tasks)
        self._logit = LearnedVector(torch.zeros(len(tasks), device=tasks.device), lr, weight_decay)
        self._before_K = torch.zeros_like(self._logit.value_K)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        self._before_K.copy_(gradients.loss_K)
        # Softmax of log z - log L: the quotient z / L would overflow for a loss near 0.
        return weigh_by_softmax(gradients, self._logit.value_K.log_softmax(0) - (gradients.loss_K + _TINY).log())

    def after_step(self, loss_K: torch.Tensor) -> None:
        fell_K = (self._before_K + _TINY).log() - (loss_K + _TINY).log()
        z_K = self._logit.value_K.softmax(0)
        self._logit.step(z_K * (fell_K - (z_K * fell_K).sum()))  # the gradient of sum(z fell) in the logits


class STCH(TaskWeights):
    """Smooth Tchebycheff scalarization (Lin et al. 2024, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", equation 9).

    The loss is mu log sum(exp(L / (K mu))), a smooth maximum of the losses. Preferences are equal. The ideal point is the same for every
    task, so it cancels. The gradient weighs a task by softmax(L / (K mu)) / K. The factor 1 / K is left out, so that weights sum to 1.

    Args:
        mu: smaller values train mostly the task with the largest loss.
    """

    capturable = True

    def __init__(self, tasks: Tasks, *, mu: PositiveFloat):
        super().__init__(tasks)
        self._mu = mu

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return weigh_by_softmax(gradients, gradients.loss_K / (len(self.tasks) * self._mu))
