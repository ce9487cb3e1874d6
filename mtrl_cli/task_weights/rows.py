"""Task weights that need every task's own gradient, or its norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mtrl_cli.machine import rng
from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.parts import LearnedVector, finite_or_uniform
from mtrl_cli.types import Fraction, NonNegativeFloat, PositiveFloat

_TINY = 1e-8
_LOWEST = 1e-3  # GradNorm's weights stay above this: nothing in the paper keeps them from turning negative


_COLUMNS = 2**17
"""So many entries of each row are worked on at a time on a CPU: they stay in its cache from one step to the next."""


class GradNorm(TaskWeights):
    """GradNorm (Chen et al. 2018, "GradNorm", Algorithm 1): weights on losses, learned so that tasks train at similar rates.

    The norm of each weighted loss's gradient is led towards the mean of these norms, times (loss / first loss, divided by the tasks'
    mean of it) to the power of alpha (equation 2). The paper takes the gradient by the last shared layer alone, to save time;
    here it is that by all shared parameters, whose norms the Gram matrix holds. Weights move by Adam, and are divided by their sum.

    Args:
        alpha: how strongly a task that trains slower is pulled up; 0: equal norms.
        lr: step size of the weights.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks, *, alpha: NonNegativeFloat, lr: PositiveFloat):
        super().__init__(tasks)
        self._alpha = alpha
        self._weight = LearnedVector(torch.ones(len(tasks), device=tasks.device), lr)  # sums to K, as in the paper
        self._first_K: torch.Tensor | None = None

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        if self._first_K is None:
            self._first_K = gradients.loss_K.clone()
        learned_K, K = self._weight.value_K, len(self.tasks)
        norm_K = gradients.gram().diagonal().clamp(min=0).sqrt()
        weight_K = learned_K / K
        gradients.weigh(weight_K)
        progress_K = gradients.loss_K / self._first_K.clamp(min=_TINY)
        rate_K = progress_K / progress_K.mean().clamp(min=_TINY)
        target_K = (learned_K * norm_K).mean() * rate_K**self._alpha
        self._weight.step(torch.sign(learned_K * norm_K - target_K) * norm_K)
        learned_K.clamp_(min=_LOWEST)
        learned_K.mul_(K / learned_K.sum())
        return weight_K

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight.state_dict(), "first": self._first_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight.load_state_dict(state["weight"])
        self._first_K = None if state["first"] is None else state["first"].to(self.tasks.device, copy=True)


class GradDrop(TaskWeights):
    """GradDrop (Chen et al. 2020, "Just Pick a Sign", Algorithm 1 without leaks), by TorchJD, as a mean, not a sum.

    In each entry of the gradient one sign is drawn, the more probable the more of the tasks' absolute values have it, and only entries of
    that sign are kept. A task's weight, for the metrics, is the coefficient of its gradient in what is kept of it: the share of its
    squared norm in kept entries, divided by K. It is 1 / K where nothing is dropped, and 0 where everything is.
    """

    needs = "rows"
    capturable = False  # a seed is drawn on the host each time

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        from torchjd.aggregation import GradDrop as Aggregator

        self._aggregator = Aggregator()
        self._generator = torch.Generator().manual_seed(tasks.seed)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        rows_KP = gradients.rows()
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))  # on the host, for any device
        kept, kept_K, all_K = [], torch.zeros_like(gradients.loss_K), torch.zeros_like(gradients.loss_K)
        with seeded(rows_KP.device, seed):
            for part_KC in rows_KP.split(_COLUMNS if rows_KP.device.type == "cpu" else rows_KP.shape[1], 1):
                kept.append(self._aggregator(part_KC))
                square_KC = part_KC.square()
                kept_K += torch.where(part_KC.sign() == kept[-1].sign(), square_KC, 0.0).sum(1)
                all_K += square_KC.sum(1)
        gradients.replace(torch.cat(kept) / len(self.tasks))
        share_K = torch.where(all_K > 0, kept_K / all_K, 1.0)
        return finite_or_uniform(share_K / len(self.tasks))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rng.restore(self._generator, state["generator"])


class DBMTL(TaskWeights):
    """DB-MTL (Lin et al. 2023, "Dual-Balancing for Multi-Task Learning", Algorithm 1): logarithms of losses, gradients of one length.

    Each task's gradient of log(loss) goes into a moving average; the averages are scaled to the length of the longest and summed. On the
    mean's scale: divided by the sum of the weights. The average begins with the first gradient, where the authors' code begins with zero.
    A task's weight is the factor of the gradients in its average, whose losses' inverses are averaged beside them.

    Args:
        beta: share of the past in the average.
        beta_decay: the share at update t is beta / t^beta_decay; 0: constant.
    """

    needs = "rows"
    capturable = False  # updates are counted on the host

    def __init__(self, tasks: Tasks, *, beta: Fraction, beta_decay: NonNegativeFloat):
        super().__init__(tasks)
        self._beta, self._beta_decay = beta, beta_decay
        self._updates = 0
        self._average_KP: torch.Tensor | None = None
        self._inverse_K: torch.Tensor | None = None

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        inverse_K = 1 / (gradients.loss_K + _TINY)
        newest_KP = gradients.rows() * inverse_K[:, None]
        self._updates += 1
        if self._average_KP is None or self._inverse_K is None:
            self._average_KP, self._inverse_K = newest_KP, inverse_K
        else:
            past = self._beta * self._updates**-self._beta_decay
            self._average_KP, self._inverse_K = newest_KP.lerp(self._average_KP, past), inverse_K.lerp(self._inverse_K, past)
        norm_K = torch.linalg.vector_norm(self._average_KP, dim=1)
        factor_K = torch.where(norm_K > 0, norm_K.max() / norm_K, 1.0)
        weight_K = factor_K * self._inverse_K
        gradients.replace(factor_K @ self._average_KP / weight_K.sum())
        return weight_K / weight_K.sum()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "average": self._average_KP, "inverse": self._inverse_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = int(state["updates"])
        average_KP, inverse_K = state["average"], state["inverse"]
        self._average_KP = None if average_KP is None else average_KP.to(self.tasks.device, copy=True)
        self._inverse_K = None if inverse_K is None else inverse_K.to(self.tasks.device, copy=True)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Within, what draws from torch's own generator of a device draws from a seed; after it, that generator is as it was before."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        generator.manual_seed(seed)
        yield
