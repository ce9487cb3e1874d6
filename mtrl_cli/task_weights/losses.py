"""Task weights from losses: one number per task, and one backward pass."""

from __future__ import annotations

from typing import Any

import torch

from mtrl_cli.machine import rng
from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.parts import LearnedVector, finite_or_uniform
from mtrl_cli.types import NonNegativeFloat, PositiveFloat, PositiveInt

_TINY = 1e-8  # keeps logarithms and ratios of losses finite; FAMO's own


class Uniform(TaskWeights):
    """The mean of the tasks' losses: every task weighs 1 / K."""

    capturable = True

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        weight_K = torch.full_like(gradients.loss_K, 1 / len(self.tasks))
        gradients.weigh(weight_K)
        return weight_K


class Static(TaskWeights):
    """Weights that the user chose, divided by their sum.

    Args:
        weights: a number for each task by name; tasks that are not named weigh 1.

    Raises:
        ValueError: a name that is not a task's, or no task weighs more than 0.
    """

    capturable = True

    def __init__(self, tasks: Tasks, *, weights: dict[str, NonNegativeFloat]):
        super().__init__(tasks)
        for name in weights:
            if name not in tasks.names:
                raise ValueError(f"task_weights.weights names {name}, which is not in env.tasks; there are {', '.join(tasks.names)}")
        chosen = [float(weights.get(name, 1.0)) for name in tasks.names]
        if not sum(chosen) > 0:
            raise ValueError("task_weights.weights gives every task 0: expected a number above 0 for at least one")
        self._weight_K = torch.tensor([weight / sum(chosen) for weight in chosen], device=tasks.device)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        gradients.weigh(self._weight_K)
        return self._weight_K


class Random(TaskWeights):
    """RLW (Lin et al. 2022, "Reasonable Effectiveness of Random Weighting", Algorithm 2): the softmax of normal draws, new each update."""

    capturable = True

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        self._generator = torch.Generator(tasks.device).manual_seed(tasks.seed)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        weight_K = torch.randn(len(self.tasks), generator=self._generator, device=self.tasks.device).softmax(0)
        gradients.weigh(weight_K)
        return weight_K

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rng.restore(self._generator, state["generator"])


class Uncertainty(TaskWeights):
    """Weights by learned uncertainty (Kendall et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", section 3.2).

    The log-variances s minimise sum(exp(-s) L / 2 + s / 2), by an Adam of their own beside the network's. A task weighs exp(-s),
    divided by the sum of these.

    Args:
        lr: step size of the log-variances.
    """

    capturable = True

    def __init__(self, tasks: Tasks, *, lr: PositiveFloat):
        super().__init__(tasks)
        self._log_variance = LearnedVector(torch.zeros(len(tasks), device=tasks.device), lr)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        log_variance_K = self._log_variance.value_K
        weight_K = finite_or_uniform((-log_variance_K).softmax(0))
        gradients.weigh(weight_K)
        self._log_variance.step(0.5 - 0.5 * (-log_variance_K).exp() * gradients.loss_K)
        return weight_K

    def state_dict(self) -> dict[str, Any]:
        return {"log_variance": self._log_variance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_variance.load_state_dict(state["log_variance"])


class DWA(TaskWeights):
    """Dynamic weight average (Liu et al. 2019, "End-to-End Multi-Task Learning with Attention", equation 7).

    A task weighs softmax(r / temperature), r being its mean loss of the last epoch over that of the epoch before: more where the loss
    falls slowest. Uniform in the first two epochs.

    Args:
        epoch: what counts as an epoch, in updates: reinforcement learning has no pass over a data set.
        temperature: larger is closer to uniform.
    """

    capturable = False  # epochs are counted on the host

    def __init__(self, tasks: Tasks, *, epoch: PositiveInt, temperature: PositiveFloat):
        super().__init__(tasks)
        self._epoch, self._temperature = epoch, temperature
        self._sum_K = torch.zeros(len(tasks), device=tasks.device)
        self._last_K, self._before_K = torch.zeros_like(self._sum_K), torch.zeros_like(self._sum_K)
        self._updates = 0

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        if self._updates and self._updates % self._epoch == 0:
            self._before_K, self._last_K = self._last_K, self._sum_K / self._epoch
            self._sum_K = torch.zeros_like(self._sum_K)
        rate_K = self._last_K / self._before_K.clamp(min=_TINY)
        if self._updates < 2 * self._epoch:
            rate_K = torch.zeros_like(rate_K)
        weight_K = finite_or_uniform((rate_K / self._temperature).softmax(0))
        gradients.weigh(weight_K)
        self._sum_K += gradients.loss_K
        self._updates += 1
        return weight_K

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "sum": self._sum_K, "last": self._last_K, "before": self._before_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = int(state["updates"])
        for name, mine_K in (("sum", self._sum_K), ("last", self._last_K), ("before", self._before_K)):
            mine_K.copy_(state[name])


class FAMO(TaskWeights):
    """Fast adaptive multitask optimization (Liu et al. 2023, "FAMO", Algorithm 1; losses are at least 0, as ours are).

    The gradient is that of c sum(z log L), z the softmax of learned logits, c such that the weights c z / L sum to 1 (equation 9).
    After the step, the logits move by Adam so that the task whose logarithm of the loss fell least weighs more: one more forward pass
    each update.

    Args:
        lr: step size of the logits.
        weight_decay: of the logits; the paper's gamma.
    """

    uses_losses_after_step = True
    capturable = True

    def __init__(self, tasks: Tasks, *, lr: PositiveFloat, weight_decay: NonNegativeFloat):
        super().__init__(tasks)
        self._logit = LearnedVector(torch.zeros(len(tasks), device=tasks.device), lr, weight_decay)
        self._before_K = torch.zeros_like(self._logit.value_K)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        # log z - log L, by softmax: a loss near 0 must not make the quotient overflow.
        weight_K = finite_or_uniform((self._logit.value_K.log_softmax(0) - (gradients.loss_K + _TINY).log()).softmax(0))
        gradients.weigh(weight_K)
        self._before_K.copy_(gradients.loss_K)
        return weight_K

    def after_step(self, loss_K: torch.Tensor) -> None:
        fell_K = (self._before_K + _TINY).log() - (loss_K + _TINY).log()
        z_K = self._logit.value_K.softmax(0)
        self._logit.step(z_K * (fell_K - (z_K * fell_K).sum()))  # the gradient of sum(z fell) by the logits

    def state_dict(self) -> dict[str, Any]:
        return {"logit": self._logit.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logit.load_state_dict(state["logit"])


class STCH(TaskWeights):
    """Smooth Tchebycheff scalarization (Lin et al. 2024, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", equation 9).

    The loss is mu log sum(exp(L / (K mu))), a smooth largest loss: preferences are equal, the ideal point is the same for every task and
    so drops out. Its gradient weighs a task by softmax(L / (K mu)) / K; the last factor is left out, so that the weights sum to 1.

    Args:
        mu: smaller is closer to training the task of the largest loss alone.
    """

    capturable = True

    def __init__(self, tasks: Tasks, *, mu: PositiveFloat):
        super().__init__(tasks)
        self._mu = mu

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        weight_K = finite_or_uniform((gradients.loss_K / (len(self.tasks) * self._mu)).softmax(0))
        gradients.weigh(weight_K)
        return weight_K
