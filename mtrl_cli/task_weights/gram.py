"""Task weights from the inner products of the tasks' gradients."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.common import combine, combine_on_host
from mtrl_cli.types import Fraction, PositiveInt

_HIGHEST_COSINE = 0.99  # of GradVac's targets: the correction for a target of 1 is infinite
_MAX_ABSOLUTE_SUM = 10.0  # of IMTL-G's weights, which sum to 1
_MIN_COSINE = 0.99  # of IMTL-G: between the tasks' projections and the gradient norms


class PCGrad(TaskWeights):
    """Projection of conflicting gradients (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Algorithm 1), as a mean, not a sum.

    All tasks are projected at once, where TorchJD loops over pairs. The order of the other tasks is random for each task and update.
    """

    needs = "gram"
    capturable = True
    saved = ("_generator",)

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        self._generator = torch.Generator(tasks.device).manual_seed(tasks.seed)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        order_KK = random_orders(len(self.tasks), self._generator)
        return combine(gradients, lambda gram_KK: projected(gram_KK, order_KK))


class GradVac(TaskWeights):
    """Gradient vaccine (Wang et al. 2021, "Gradient Vaccine", Algorithm 1 and equation 6), over all shared parameters, as a mean.

    PCGrad raises negative cosines to 0. GradVac raises every cosine to its target, the moving average of its past values. Targets are
    capped at 0.99.

    Args:
        beta: share of the newest cosine in the average.
    """

    needs = "gram"
    capturable = True
    saved = ("_generator", "_target_KK")

    def __init__(self, tasks: Tasks, *, beta: Fraction):
        super().__init__(tasks)
        self._beta = beta
        self._generator = torch.Generator(tasks.device).manual_seed(tasks.seed)
        self._target_KK = torch.zeros(len(tasks), len(tasks), device=tasks.device)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        order_KK = random_orders(len(self.tasks), self._generator)

        def weights_of(gram_KK: torch.Tensor) -> torch.Tensor:
            weight_K, cosine_KK = vaccinated(gram_KK, self._target_KK, order_KK)
            newest_KK = torch.where(torch.isfinite(cosine_KK), cosine_KK, self._target_KK)
            self._target_KK.copy_((1 - self._beta) * self._target_KK + self._beta * newest_KK)
            return weight_K

        return combine(gradients, weights_of)


class MGDA(TaskWeights):
    """Multiple-gradient descent (Désidéri 2012; Sener and Koltun 2018, Algorithm 2): the shortest weighted mean, by Frank-Wolfe.

    Args:
        max_iterations: iterations of Frank-Wolfe.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks, *, max_iterations: PositiveInt):
        super().__init__(tasks)
        self._max_iterations = max_iterations

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return combine_on_host(gradients, lambda host_KK: torch.from_numpy(shortest(host_KK.numpy(), self._max_iterations)))


class IMTLG(TaskWeights):
    """IMTL-G (Liu et al. 2021, "Towards Impartial Multi-task Learning", equation 6): the weighted mean with the same projection onto the
    direction of every task. Weights come from TorchJD, which also handles linearly dependent gradients (Quinton and Rey 2024).

    Weights may be negative. If the gradients cancel, no such mean exists. If the gradients almost cancel, the weights grow without bound.
    So weights are uniform if the projections are not equal after all, or the absolute weights sum to more than 10.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        from torchjd.aggregation import IMTLGWeighting

        self._weighting = IMTLGWeighting()

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        # float32, the precision of the matrix: the test for linear dependence depends on the dtype.
        return combine_on_host(gradients, self._solve, torch.float32)

    def _solve(self, host_KK: torch.Tensor) -> torch.Tensor:
        weight_K = self._weighting(host_KK)
        weight_K = weight_K / weight_K.sum()  # TorchJD returns zeros if there is no solution
        norm_K, along_K = host_KK.diagonal().sqrt(), host_KK @ weight_K
        same = torch.cosine_similarity(along_K, norm_K, dim=0).abs() > _MIN_COSINE
        return torch.where(same & (weight_K.abs().sum() <= _MAX_ABSOLUTE_SUM), weight_K, torch.nan)


class AlignedMTL(TaskWeights):
    """Aligned-MTL (Senushkin et al. 2023, "Independent Component Alignment", Algorithm 1): the mean of the gradients after their singular
    values are made equal. Weights come from TorchJD.

    Args:
        scale: common singular value: the smallest, the median, or the root mean square.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks, *, scale: Literal["min", "median", "rmse"]):
        super().__init__(tasks)
        from torchjd.aggregation import AlignedMTLWeighting

        self._weighting = AlignedMTLWeighting(scale_mode=scale)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        # float32, the precision of the matrix: the test for a singular value of zero depends on the dtype.
        return combine_on_host(gradients, self._weighting, torch.float32)


def random_orders(num_tasks: int, generator: torch.Generator) -> torch.Tensor:
    """Random order of the other tasks for each task: int64 `[K, K - 1]`, on the generator's device."""
    draw_KK = torch.rand(num_tasks, num_tasks, generator=generator, device=generator.device)
    return draw_KK.fill_diagonal_(torch.inf).argsort(1)[:, :-1]


def projected(gram_KK: torch.Tensor, order_KK: torch.Tensor) -> torch.Tensor:
    """PCGrad's weights `[K]` for a Gram matrix `[K, K]`, with an order of the other tasks for each task `[K, K - 1]`."""
    task_K = torch.arange(len(gram_KK), device=gram_KK.device)
    coefficient_KK = torch.eye(len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device)  # row k: task k's gradient, projected
    square_K = gram_KK.diagonal()
    for other_K in order_KK.T:
        product_K = (coefficient_KK * gram_KK[other_K]).sum(1)
        conflicts_K = (product_K < 0) & (square_K[other_K] > 0)
        step_K = torch.where(conflicts_K, product_K / square_K[other_K], 0.0)
        coefficient_KK[task_K, other_K] -= step_K
    # Adding zero times the matrix makes the weights NaN for a matrix that is not finite.
    return coefficient_KK.mean(0) + 0 * gram_KK.sum()


def vaccinated(
    gram_KK: torch.Tensor, target_KK: torch.Tensor, order_KK: torch.Tensor, eps: float = 1e-8
) -> tuple[torch.Tensor, torch.Tensor]:
    """GradVac's weights `[K]`, and the cosines `[K, K]` between each corrected gradient and the others (targets on the diagonal).

    Args:
        gram_KK: Gram matrix with a diagonal of about 1.
        target_KK: target cosines.
        order_KK: `[K, K - 1]`, order of the other tasks for each task.
        eps: added to denominators.
    """
    task_K = torch.arange(len(gram_KK), device=gram_KK.device)
    coefficient_KK = torch.eye(len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device)
    found_KK, norm_K = target_KK.clone(), gram_KK.diagonal().clamp(min=0).sqrt()
    for other_K in order_KK.T:
        product_KK = coefficient_KK @ gram_KK
        mine_K, others_K = (product_KK * coefficient_KK).sum(1).clamp(min=0).sqrt(), norm_K[other_K]
        cosine_K = product_KK[task_K, other_K] / (mine_K * others_K + eps)
        target_K = target_KK[task_K, other_K].clamp(max=_HIGHEST_COSINE)
        sine_K, target_sine_K = (1 - cosine_K.square()).clamp(min=0).sqrt(), (1 - target_K.square()).clamp(min=0).sqrt()
        step_K = mine_K * (target_K * sine_K - cosine_K * target_sine_K) / (others_K * target_sine_K + eps)
        # No step towards a zero gradient changes the angle.
        coefficient_KK[task_K, other_K] += torch.where((cosine_K < target_K) & (others_K > 0), step_K, 0.0)
        found_KK[task_K, other_K] = cosine_K
    return coefficient_KK.mean(0) + 0 * gram_KK.sum(), found_KK


def shortest(gram_KK: NDArray[np.float64], max_iterations: int, tolerance: float = 1e-9) -> NDArray[np.float64]:
    """Weights `[K]` (at least 0, sum 1) of the shortest weighted mean, by Frank-Wolfe with exact steps from uniform weights.

    Stops when no step would shorten the squared length by more than about `tolerance`.
    """
    weight_K = np.full(len(gram_KK), 1 / len(gram_KK))
    for _ in range(max_iterations):
        product_K = gram_KK @ weight_K
        to = int(product_K.argmin())
        a, b, c = product_K[to], product_K @ weight_K, gram_KK[to, to]
        if b - a <= tolerance:
            break
        step = 1.0 if c <= a else (b - a) / (b + c - 2 * a)
        weight_K *= 1 - step
        weight_K[to] += step
    return weight_K
