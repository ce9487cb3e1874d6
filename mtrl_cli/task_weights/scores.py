"""Task weights from scores, for reinforcement learning, where a small loss does not imply a high score."""

from __future__ import annotations

import torch

from mtrl_cli.task_weights.base import TaskGradients, Tasks, TaskWeights
from mtrl_cli.task_weights.common import weigh_by_softmax
from mtrl_cli.types import PositiveFloat, PositiveInt


class ScoreGap(TaskWeights):
    """Larger weights for tasks further from their reference score.

    The gap of a task is 1 - s, with its normalised training score s = (return - random) / (reference - random) clipped to [0, 1]. It is 1
    until the first episode of the task ends. An exponential moving average over updates smooths the gaps. The average starts at 1 and does
    not depend on how often scores arrive. Weights are softmax(gap / temperature). They are uniform at the start and when all tasks have
    reached their references. No weight is more than exp(1 / temperature) times another.

    Args:
        temperature: softmax temperature; larger values give more uniform weights.
        half_life: updates after which the average has moved half of the way to a new gap.

    Raises:
        ValueError: a task without a random or reference score.
    """

    uses_scores = True
    capturable = True
    saved = ("_newest_K", "_gap_K")

    def __init__(self, tasks: Tasks, *, temperature: PositiveFloat, half_life: PositiveInt):
        super().__init__(tasks)
        self._temperature = temperature
        self._keep = 0.5 ** (1 / half_life)
        self._scores: dict[str, tuple[float, float]] = {}
        for name, random, reference in zip(tasks.names, tasks.random_scores, tasks.reference_scores, strict=True):
            if random is None or reference is None or reference <= random:
                raise ValueError(
                    f"task_weights=score_gap needs a reference score for every task, got none for {name}: "
                    "choose other task weights (mtrl ls task_weights) or remove the task"
                )
            self._scores[name] = random, reference
        self._newest_K = torch.ones(len(tasks), device=tasks.device)
        self._gap_K = torch.ones_like(self._newest_K)

    def update_scores(self, recent: dict[str, float]) -> None:
        self._newest_K.copy_(torch.tensor([self._gap(name, recent.get(name)) for name in self.tasks.names]), non_blocking=True)

    def _gap(self, name: str, score: float | None) -> float:
        if score is None:
            return 1.0
        random, reference = self._scores[name]
        return 1.0 - min(1.0, max(0.0, (score - random) / (reference - random)))

    def backward(self, gradients: TaskGradients) -> torch.Tensor:
        self._gap_K.mul_(self._keep).add_((1 - self._keep) * self._newest_K)
        return weigh_by_softmax(gradients, self._gap_K / self._temperature)
