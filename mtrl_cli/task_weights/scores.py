"""Task weights from scores, for reinforcement learning: a small loss is not progress, a high score is."""

from __future__ import annotations

from typing import Any

import torch

from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.parts import finite_or_uniform
from mtrl_cli.types import PositiveFloat, PositiveInt


class ScoreGap(TaskWeights):
    """More weight to the tasks that are furthest from their reference score.

    A task's gap is 1 - s, its normalised training score s = (return - random) / (reference - random) cut to [0, 1]; 1 while none of its
    episodes has ended. The gaps are smoothed by an exponential moving average over updates, which starts at 1 and does not depend on how
    often scores are updated. A task weighs softmax(gap / temperature): all tasks the same at the start, and again when all have
    reached their references, and none ever more than exp(1 / temperature) times as much as another.

    Args:
        temperature: of the softmax; larger is closer to uniform.
        half_life: updates in which the average comes half the way to a new gap.

    Raises:
        ValueError: a task without a random or reference score.
    """

    uses_scores = True
    capturable = True

    def __init__(self, tasks: Tasks, *, temperature: PositiveFloat, half_life: PositiveInt):
        super().__init__(tasks)
        self._temperature = temperature
        self._keep = 0.5 ** (1 / half_life)
        self._scores: dict[str, tuple[float, float]] = {}
        for name, random, reference in zip(tasks.names, tasks.random_scores, tasks.reference_scores, strict=True):
            if random is None or reference is None or reference <= random:
                raise ValueError(
                    f"task_weights=score_gap compares scores with a reference, and there is none for {name}: "
                    "choose other task weights (mtrl ls task_weights) or leave the task out"
                )
            self._scores[name] = random, reference
        self._recent_gap_K = torch.ones(len(tasks), device=tasks.device)
        self._gap_K = torch.ones_like(self._recent_gap_K)

    def update_scores(self, recent: dict[str, float]) -> None:
        self._recent_gap_K.copy_(torch.tensor([self._gap(name, recent.get(name)) for name in self.tasks.names]), non_blocking=True)

    def _gap(self, name: str, score: float | None) -> float:
        if score is None:
            return 1.0
        random, reference = self._scores[name]
        return 1.0 - min(1.0, max(0.0, (score - random) / (reference - random)))

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        self._gap_K.mul_(self._keep).add_((1 - self._keep) * self._recent_gap_K)
        weight_K = finite_or_uniform((self._gap_K / self._temperature).softmax(0))
        gradients.weigh(weight_K)
        return weight_K

    def state_dict(self) -> dict[str, Any]:
        return {"recent_gap": self._recent_gap_K, "gap": self._gap_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent_gap_K.copy_(state["recent_gap"])
        self._gap_K.copy_(state["gap"])
