"""Task weights from the inner products of the tasks' gradients, by TorchJD's solvers of small convex problems.

The solvers are the extra `solvers` and run on the host. If a solver finds no solution, the weights of the update are uniform.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch

from mtrl_cli.machine import extras
from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.common import WeightsOfGram, combine_on_host
from mtrl_cli.types import NonNegativeFloat, PositiveFloat, PositiveInt

_SMALLEST_SQUARE = 1e-12  # of a gradient relative to the mean of all; smaller gradients count as zero


class CAGrad(TaskWeights):
    """Conflict-averse gradient descent (Liu et al. 2021, "Conflict-Averse Gradient Descent", Algorithm 1), by TorchJD and clarabel.

    The result is divided by 1 + c, as the authors' code does in its second rescaling mode, so that it is the mean of the gradients if there
    is no conflict. The direction is undefined if not all tasks can improve, or one has no gradient. The result is then the mean divided by
    1 + c, so that training continues towards the minimum of the mean loss.

    Args:
        c: largest distance from the mean, as a share of its norm; 0 gives the mean.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks, *, c: NonNegativeFloat):
        super().__init__(tasks)
        self._c = c
        self._weighting = _torchjd("cagrad", "CAGradWeighting", c=c)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return _combine(gradients, self._solve)

    def _solve(self, host_KK: torch.Tensor) -> torch.Tensor:
        weight_K = self._weighting(host_KK)
        # TorchJD returns zeros if the direction is undefined.
        return torch.where((weight_K == 0).all(), 1 / len(weight_K), weight_K) / (1 + self._c)


class FairGrad(TaskWeights):
    """FairGrad (Ban and Ji 2024, "Fair Resource Allocation in Multi-Task Learning", equation 4), by TorchJD and scipy.

    The paper's weights grow as gradients shrink. Here they are divided by their sum, so that the result is a weighted mean. Weights are
    uniform if a task has no gradient.

    Args:
        alpha: 0 would give the mean, 1 gives proportional fairness (as Nash-MTL), large values approach max-min fairness.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks, *, alpha: PositiveFloat):
        super().__init__(tasks)
        self._weighting = _torchjd("fairgrad", "FairGradWeighting", alpha=alpha, max_iters=100)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return _combine(gradients, lambda host_KK: _to_sum_1(self._weighting(host_KK)), allow_zero=False)


class NashMTL(TaskWeights):
    """Nash-MTL (Navon et al. 2022, "Multi-Task Learning as a Bargaining Game", Algorithm 1), by TorchJD and ecos.

    The paper's weights grow as gradients shrink. Here they are divided by their sum, so that the result is a weighted mean. The solver
    takes tens of milliseconds. As in the paper, it runs only at intervals, and the weights stay constant in between (table 5: every 50 or
    100 updates in reinforcement learning). Weights are uniform if a task has no gradient.

    Args:
        every: updates between solutions.
        max_iterations: convex problems per solution.
    """

    needs = "gram"
    capturable = False  # most updates run without the solver
    saved = ("_updates", "_weight_K")

    def __init__(self, tasks: Tasks, *, every: PositiveInt, max_iterations: PositiveInt):
        super().__init__(tasks)
        self._every, self._updates, self._found = every, 0, False
        self._weighting = _torchjd("nash_mtl", "NashMTL", len(tasks), max_norm=0.0, optim_niter=max_iterations).weighting
        self._weight_K = torch.full((len(tasks),), 1 / len(tasks), device=tasks.device)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        if self._updates % self._every == 0:
            self._found = False
            self._weight_K = _combine(gradients, self._solve, allow_zero=False)
            found = gradients.agreed(torch.tensor(self._found, dtype=torch.uint8, device=self.tasks.device))
            self._updates += int(found)  # a failure is retried with the gradients of the next update
        else:
            gradients.combine(self._weight_K)
            self._updates += 1
        return self._weight_K

    def _solve(self, host_KK: torch.Tensor) -> torch.Tensor:
        # TorchJD expects rows and computes their inner products: any root of the Gram matrix has the same inner products.
        value_K, vector_KK = torch.linalg.eigh(host_KK)
        weight_K = _to_sum_1(self._weighting(vector_KK * value_K.clamp(min=0).sqrt()))
        self._found = bool(torch.isfinite(weight_K).all())
        return weight_K

    def state_dict(self) -> dict[str, Any]:
        # The solver's only state is its last solution, from which the next one starts.
        return {**super().state_dict(), "start": np.asarray(self._weighting.prvs_alpha)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._weighting.prvs_alpha = np.array(state["start"])


class UPGrad(TaskWeights):
    """UPGrad (Quinton and Rey 2024, "Jacobian Descent for Multi-Objective Optimization", equation 5), by TorchJD and quadprog.

    Each gradient is projected onto the cone of directions that conflict with no task. The result is the mean of the projections.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        self._weighting = _torchjd("upgrad", "UPGradWeighting")

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return _combine(gradients, self._weighting)


def _torchjd(option: str, name: str, *args: Any, **options: Any) -> Any:
    """Make an aggregator or a weighting of TorchJD. The import takes seconds, so it happens only in runs that need it.

    Raises:
        UserError: its solver is not installed.
    """
    try:
        import torchjd.aggregation

        return getattr(torchjd.aggregation, name)(*args, **options)
    except ImportError as error:
        raise extras.missing(f"task_weights={option}", "a convex solver", "solvers") from error


@cache
def _failures() -> tuple[type[Exception], ...]:
    """Exceptions for a problem without solution: of TorchJD, numpy, torch and the installed solvers."""
    found: list[type[Exception]] = [ValueError, ArithmeticError, RuntimeError]
    with suppress(ImportError):
        from cvxpy.error import SolverError

        found.append(SolverError)
    with suppress(ImportError):
        from qpsolvers.exceptions import QPError

        found.append(QPError)
    return tuple(found)


def _to_sum_1(weight_K: torch.Tensor) -> torch.Tensor:
    return weight_K / weight_K.sum()


def _combine(gradients: TaskGradients, solve: WeightsOfGram, *, allow_zero: bool = True) -> torch.Tensor:
    """Combine gradients with the weights of a solver; uniform without solution, or if a gradient is zero and `allow_zero` is false."""

    def attempt(host_KK: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings(), suppress(*_failures()):
            warnings.simplefilter("ignore")  # of problems compiled again each time, or solved with lower accuracy
            if allow_zero or bool(host_KK.diagonal().min() >= _SMALLEST_SQUARE):
                return solve(host_KK)
        return torch.full_like(host_KK[0], torch.nan)

    return combine_on_host(gradients, attempt)
