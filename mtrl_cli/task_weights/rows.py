"""Task weights that need the gradient of every task, or its norm."""

from __future__ import annotations

import torch

from mtrl_cli.machine import rng
from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.common import LearnedVector, finite_or_uniform
from mtrl_cli.types import Fraction, NonNegativeFloat, PositiveFloat

_TINY = 1e-8
_LOWEST = 1e-3  # bound of GradNorm's weights: the paper does not keep them positive
_COLUMNS = 2**17  # of each row that GradDrop processes at a time on a CPU: they stay in the cache from one step to the next


class GradNorm(TaskWeights):
    """GradNorm (Chen et al. 2018, "GradNorm", Algorithm 1): learned loss weights, so that tasks train at similar rates.

    The gradient norm of each weighted loss moves towards the mean norm times the task's relative loss ratio to the power of alpha. The loss
    ratio is loss / first loss, divided by its mean over tasks (equation 2). The paper uses the gradients in the last shared layer, to save
    time. This class uses those in all shared parameters, whose norms are in the Gram matrix. Adam moves the
    weights, and their sum is fixed.

    Args:
        alpha: strength with which slow tasks are favoured; 0 gives equal norms.
        lr: learning rate of the weights.
    """

    needs = "gram"
    capturable = True
    saved = ("_weight", "_first_K")

    def __init__(self, tasks: Tasks, *, alpha: NonNegativeFloat, lr: PositiveFloat):
        super().__init__(tasks)
        self._alpha = alpha
        self._weight = LearnedVector(torch.ones(len(tasks), device=tasks.device), lr)  # sums to K, as in the paper
        self._first_K = torch.full_like(self._weight.value_K, torch.nan)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        self._first_K.copy_(torch.where(self._first_K.isnan(), gradients.loss_K, self._first_K))
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


class GradDrop(TaskWeights):
    """GradDrop (Chen et al. 2020, "Just Pick a Sign", Algorithm 1 without leaks), computed by TorchJD and divided by K (a mean, not a sum).

    For each entry of the gradient one sign is drawn. The probability of a sign grows with the fraction of the tasks' absolute values that
    has this sign. Entries of the other sign are dropped. The reported weight of a task is the fraction of the task's squared gradient norm
    in kept entries, divided by K: 1 / K if nothing is dropped, 0 if everything is dropped.
    """

    needs = "rows"
    capturable = False  # draws a seed on the host
    saved = ("_generator",)

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        from torchjd.aggregation import GradDrop as Aggregator

        self._aggregator = Aggregator()
        self._generator = torch.Generator().manual_seed(tasks.seed)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        rows_KP = gradients.rows()
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))  # on the host, equal for all devices
        kept, kept_K, all_K = [], torch.zeros_like(gradients.loss_K), torch.zeros_like(gradients.loss_K)
        with rng.kept(rows_KP.device):
            torch.manual_seed(seed)
            for part_KC in rows_KP.split(_COLUMNS if rows_KP.device.type == "cpu" else rows_KP.shape[1], 1):
                kept.append(self._aggregator(part_KC))
                square_KC = part_KC.square()
                kept_K += torch.where(part_KC.sign() == kept[-1].sign(), square_KC, 0.0).sum(1)
                all_K += square_KC.sum(1)
        gradients.replace(torch.cat(kept) / len(self.tasks))
        share_K = torch.where(all_K > 0, kept_K / all_K, 1.0)
        return finite_or_uniform(share_K / len(self.tasks))


class DBMTL(TaskWeights):
    """DB-MTL (Lin et al. 2023, "Dual-Balancing for Multi-Task Learning", Algorithm 1): log losses, and gradients of equal norm.

    The gradient of log(loss) of each task enters a moving average. The averages are scaled to the norm of the longest and summed. The sum
    is divided by the sum of the weights, which gives the scale of the mean. The average starts with the first gradient (with zero in the
    authors' code). The weight of a task is the factor of its gradients in the average; it contains a moving average of 1 / loss.

    Args:
        beta: share of the past in the average.
        beta_decay: the share at update t is beta / t^beta_decay; 0 keeps it constant.
    """

    needs = "rows"
    capturable = False  # counts updates on the host
    saved = ("_updates", "_average_KP", "_inverse_K")

    def __init__(self, tasks: Tasks, *, beta: Fraction, beta_decay: NonNegativeFloat):
        super().__init__(tasks)
        self._beta, self._beta_decay = beta, beta_decay
        self._updates = 0
        self._average_KP: torch.Tensor | None = None
        self._inverse_K = torch.zeros(len(tasks), device=tasks.device)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        inverse_K = 1 / (gradients.loss_K + _TINY)
        newest_KP = gradients.rows() * inverse_K[:, None]
        self._updates += 1
        if self._average_KP is None:
            average_KP, self._inverse_K = newest_KP, inverse_K
        else:
            past = self._beta * self._updates**-self._beta_decay
            average_KP = newest_KP.lerp(self._average_KP.to(newest_KP.device), past)  # a restored average is on the CPU
            self._inverse_K = inverse_K.lerp(self._inverse_K, past)
        self._average_KP = average_KP
        norm_K = torch.linalg.vector_norm(average_KP, dim=1)
        factor_K = torch.where(norm_K > 0, norm_K.max() / norm_K, 1.0)
        weight_K = factor_K * self._inverse_K
        gradients.replace(factor_K @ average_KP / weight_K.sum())
        return weight_K / weight_K.sum()
