"""Tasks, gradients and reward streams for tests, and every weighting by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mtrl_cli.agents.value_scale import RewardStream
from mtrl_cli.config import introspection
from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights

_CONF = Path(__file__).resolve().parents[2] / "conf" / "task_weights"
ALL_WEIGHTS = sorted(path.stem for path in _CONF.glob("*.yaml"))
"""All options of `task_weights`."""


def tasks_of(names: Sequence[str], seed: int = 0) -> Tasks:
    """Tasks with random scores of 0 and reference scores of 10, 20, 30, ..."""
    references = tuple(10.0 * (index + 1) for index in range(len(names)))
    return Tasks(tuple(names), (0.0,) * len(names), references, seed, torch.device("cpu"))


def weights_of(name: str, num_tasks: int = 3, seed: int = 0, **changes: Any) -> TaskWeights:
    """Build a weighting from its YAML with `changes`, for tasks `t0`, `t1`, ..."""
    values = yaml.safe_load((_CONF / f"{name}.yaml").read_text())
    found = introspection.import_class(values.pop("_target_"))
    made = found(tasks_of([f"t{index}" for index in range(num_tasks)], seed), **(values | changes))
    assert isinstance(made, TaskWeights)
    return made


class GivenGradients(TaskGradients):
    """Gradients with given rows `[K, P]` of shared parameters and given losses.

    Attributes:
        result_P: gradient added to the parameters.
        calls: names of the methods called, in order.
    """

    def __init__(self, rows_KP: torch.Tensor, loss_K: torch.Tensor | None = None):
        self.rows_KP, self.loss_K = rows_KP, torch.ones(len(rows_KP)) if loss_K is None else loss_K
        self.result_P = torch.zeros_like(rows_KP[0])
        self.calls: list[str] = []

    def weigh(self, weight_K: torch.Tensor) -> None:
        self._give("weigh", weight_K @ self.rows_KP)

    def gram(self) -> torch.Tensor:
        self.calls.append("gram")
        return self.rows_KP @ self.rows_KP.T

    def rows(self) -> torch.Tensor:
        self.calls.append("rows")
        return self.rows_KP

    def combine(self, weight_K: torch.Tensor) -> None:
        self._give("combine", weight_K @ self.rows_KP)

    def replace(self, gradient_P: torch.Tensor) -> None:
        self._give("replace", gradient_P)

    def _give(self, how: str, gradient_P: torch.Tensor) -> None:
        assert not {"weigh", "combine", "replace"} & set(self.calls), "called once"
        self.calls.append(how)
        self.result_P = gradient_P


def stream_of(names: Sequence[str], num_envs: int = 2, gamma: float = 0.9) -> RewardStream:
    """Reward stream of tasks by name."""
    return RewardStream(len(names), num_envs, gamma, torch.device("cpu"))
