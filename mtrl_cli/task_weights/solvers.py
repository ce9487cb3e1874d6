"""Task weights from the inner products of the tasks' gradients, found by TorchJD's solvers of small convex problems.

The solvers are the extra `solvers`. They run on the host. Where a solver finds no solution, the weights of that update are uniform.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

from mtrl_cli.machine import extras
from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.parts import combine, on_host
from mtrl_cli.types import NonNegativeFloat, PositiveFloat, PositiveInt

_Made = TypeVar("_Made")
_SMALLEST_SQUARE = 1e-12  # of a row beside the mean of all: less counts as no gradient


class CAGrad(TaskWeights):
    """Conflict-averse gradient descent (Liu et al. 2021, "Conflict-Averse Gradient Descent", Algorithm 1), by TorchJD and clarabel.

    Divided by 1 + c, as the authors' code does with its second way to rescale: without conflict the result is the mean of the gradients.
    Where the tasks cannot all be improved, or one has no gradient, the direction is undefined; the step is then the ball's centre, the
    mean itself (divided by 1 + c, too), so that learning goes on to the minimum of the mean loss.

    Args:
        c: how far from the mean the result may lie, as a share of its length; 0 is the mean.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks, *, c: NonNegativeFloat):
        super().__init__(tasks)
        self._c, self._weighting = c, _made("cagrad", lambda: _torchjd().CAGradWeighting(c=c))

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        def weights_of(host_KK: torch.Tensor) -> torch.Tensor:
            weight_K = self._weighting(host_KK)
            # TorchJD's are all zero where the direction is undefined.
            return torch.where((weight_K == 0).all(), 1 / len(weight_K), weight_K) / (1 + self._c)

        return combine(gradients, lambda gram_KK: _solved(gram_KK, weights_of))


class FairGrad(TaskWeights):
    """FairGrad (Ban and Ji 2024, "Fair Resource Allocation in Multi-Task Learning", equation 4), by TorchJD and scipy.

    The paper's weights are longer where the gradients are short; here they are divided by their sum, so that the result is a weighted
    mean. Uniform where a task has no gradient.

    Args:
        alpha: 0 would be the plain mean, 1 proportional fairness (as Nash-MTL), towards infinity max-min fairness.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks, *, alpha: PositiveFloat):
        super().__init__(tasks)
        self._weighting = _made("fairgrad", lambda: _torchjd().FairGradWeighting(alpha=alpha, max_iters=100))

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return combine(gradients, lambda gram_KK: _solved(gram_KK, lambda host_KK: _to_sum_1(self._weighting(host_KK)), no_zero_row=True))


class NashMTL(TaskWeights):
    """Nash-MTL (Navon et al. 2022, "Multi-Task Learning as a Bargaining Game", Algorithm 1), by TorchJD and ecos.

    The paper's weights are longer where the gradients are short; here they are divided by their sum, so that the result is a weighted
    mean. The solver takes tens of milliseconds, so the paper, too, solves only now and then and keeps the weights in between (table 5:
    every 50 or 100 updates in reinforcement learning). Uniform where a task has no gradient.

    Args:
        every: updates between solutions.
        max_iterations: of the paper's sequence of convex problems, each solution.
    """

    needs = "gram"
    capturable = False  # most updates are made without a solution

    def __init__(self, tasks: Tasks, *, every: PositiveInt, max_iterations: PositiveInt):
        super().__init__(tasks)
        self._every, self._updates, self._found = every, 0, False
        self._weighting = _made("nash_mtl", lambda: _torchjd().NashMTL(len(tasks), max_norm=0.0, optim_niter=max_iterations).weighting)
        self._weight_K = torch.full((len(tasks),), 1 / len(tasks), device=tasks.device)

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        if self._updates % self._every == 0:
            self._found = False
            self._weight_K = combine(gradients, lambda gram_KK: _solved(gram_KK, self._bargain, no_zero_row=True))
            found = gradients.agreed(torch.tensor(self._found, dtype=torch.uint8, device=self.tasks.device))
            self._updates += int(found)  # what failed is tried again with the next update's gradients
        else:
            gradients.combine(self._weight_K)
            self._updates += 1
        return self._weight_K

    def _bargain(self, host_KK: torch.Tensor) -> torch.Tensor:
        # TorchJD's asks for the rows, of which it takes their inner products: any root of the Gram matrix has the same.
        value_K, vector_KK = torch.linalg.eigh(host_KK)
        weight_K = _to_sum_1(self._weighting(vector_KK * value_K.clamp(min=0).sqrt()))
        self._found = bool(torch.isfinite(weight_K).all())
        return weight_K

    def state_dict(self) -> dict[str, Any]:
        # Each solution starts from the one before, which is all that the solver keeps.
        return {"updates": self._updates, "weight": self._weight_K, "start": np.asarray(self._weighting.prvs_alpha)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = int(state["updates"])
        self._weight_K.copy_(state["weight"])
        self._weighting.prvs_alpha = np.array(state["start"])


class UPGrad(TaskWeights):
    """UPGrad (Quinton and Rey 2024, "Jacobian Descent for Multi-Objective Optimization", equation 5), by TorchJD and quadprog.

    Each gradient is projected onto the cone of what conflicts with no task; the result is the mean of these.
    """

    needs = "gram"
    capturable = True

    def __init__(self, tasks: Tasks):
        super().__init__(tasks)
        self._weighting = _made("upgrad", lambda: _torchjd().UPGradWeighting())

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        return combine(gradients, lambda gram_KK: _solved(gram_KK, self._weighting))


def _torchjd() -> Any:
    """TorchJD's aggregators. Importing them imports the solvers, which takes seconds: only a run that needs them does."""
    import torchjd.aggregation

    return torchjd.aggregation


def _made(name: str, make: Callable[[], _Made]) -> _Made:
    """What `make` makes. Raises UserError where a solver for it is not installed."""
    try:
        return make()
    except ImportError as error:
        raise extras.missing(f"task_weights={name}", "a convex solver", "solvers") from error


@cache
def _failures() -> tuple[type[Exception], ...]:
    """What is raised where there is no solution: by TorchJD, numpy and torch, and by those solvers that are installed."""
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


def _solved(gram_KK: torch.Tensor, weights_of: Callable[[torch.Tensor], torch.Tensor], no_zero_row: bool = False) -> torch.Tensor:
    """The solver's weights of a Gram matrix `[K, K]`, not a number where it has none (with `no_zero_row`: where a row is zero)."""

    def attempt(host_KK: torch.Tensor) -> torch.Tensor:
        none_K = torch.full_like(host_KK[0], torch.nan)
        if no_zero_row and bool(host_KK.diagonal().min() < _SMALLEST_SQUARE):
            return none_K
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a problem that is compiled anew each time, or solved less exactly
            try:
                return weights_of(host_KK)
            except _failures():
                return none_K

    return on_host(gram_KK, attempt, torch.float64)
