"""The learner: updates that are due, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtrl_cli import capture
from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.distributed import ALONE, Ranks
from mtrl_cli.errors import RunError
from mtrl_cli.optimizers import Optimizer
from mtrl_cli.rank_gradients import RankGradients
from mtrl_cli.replay import Batch, Replay
from mtrl_cli.task_weights.base import TaskGradients, TaskWeights
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.tape import Tape, TapedGradients

_NEVER = torch.iinfo(torch.int64).max


class Learner:
    """Trains the agent's network from the replay.

    Args:
        agent, replay, augmentation, task_weights, optimizer: the parts of an update.
        task_names: for messages and figures.
        tape: where gradients of tasks are asked for and can be told apart in one backward pass (`tape_for`).
        recorder: makes the record of an update that is then replayed (`capture.py`); None: updates are made one operation at a time.
        ranks: that train together: each draws its share of a batch, and losses and gradients are averaged over all.
    """

    def __init__(
        self,
        agent: Agent,
        replay: Replay,
        augmentation: Pipeline,
        task_weights: TaskWeights,
        optimizer: Optimizer,
        task_names: list[str],
        *,
        tape: Tape | None = None,
        recorder: Callable[[], capture.Recorder] | None = None,
        ranks: Ranks = ALONE,
    ):
        self.agent, self.replay, self.optimizer, self.task_weights = agent, replay, optimizer, task_weights
        self._augmentation = augmentation
        self._tape, self._ranks = tape, ranks
        self._batch_size = ranks.share(agent.batch_key, agent.batch_size)
        self._checked = False
        self._taps: list[torch.Tensor] | None = None
        self._shared, self._own = agent.network.shared_parameters(), agent.network.own_parameters()
        self._task_names = task_names
        self.updates = 0
        self._learns_from, self._updates_before = agent.learning_starts, 0
        K, device = len(task_names), replay.spec.device
        self._figures = {name: torch.zeros(K, device=device) for name in ("loss", "q", "weight")} | {"norm": torch.zeros((), device=device)}
        self._updates_in_row = 0
        self._bad_step_K = torch.full((K,), _NEVER, dtype=torch.int64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        recorded = all(part.capturable for part in (agent, replay, augmentation, task_weights))
        self._make_update = capture.Captured(self._arithmetic, recorder) if recorder and recorded else self._arithmetic

    def updates_due(self, step: int) -> int:
        """How many updates a run should have made by a step (per task)."""
        since = step - self._learns_from
        if since < 0 or not self.replay.ready:
            return self.updates
        since -= since % self.agent.period
        return self._updates_before + int(since * self.agent.samples_per_step / self.agent.batch_size)

    @property
    def steps_per_update(self) -> float:
        """Steps per task for which one update is due."""
        return self.agent.batch_size / self.agent.samples_per_step

    def learn_what_is_due(self, step: int) -> None:
        """Make the updates that are due at a step (per task)."""
        due = self.updates_due(step)
        while self.updates < due:
            self.update(step)

    def update(self, step: int) -> None:
        """One update of the network."""
        self.agent.prepare(self.replay, step, self._batch_size)
        self.optimizer.at(step / self.replay.spec.total_steps)
        self._step.fill_(step)
        self._make_update()
        self.updates += 1
        self._updates_in_row += 1
        self.agent.after_update(self.updates)

    def _arithmetic(self) -> None:
        """All that an update does to tensors. What changes from one to the next is in tensors that stay where they are."""
        batch = self._augmentation(self.replay.draw(self._batch_size))
        if self.updates == 0:
            self.agent.begin(batch)
        losses, gradients = self._differentiate(batch)
        if self._ranks.size > 1:
            gradients = RankGradients(gradients, self._shared, self._own, self._ranks)
        loss_K = gradients.loss_K
        weight_K = self.task_weights.backward(gradients)
        if not self._checked:
            self._check_weights(weight_K)
        norm = self.optimizer.step()
        if self.task_weights.looks_back:
            with torch.no_grad():
                after_K = self.agent.losses(batch).loss_KB.mean(1)
                self._ranks.mean_([after_K])
                self.task_weights.after_step(after_K)
        self.agent.follow()
        self.replay.update_priorities(batch, losses.error_KB)
        self._record(loss_K, losses.q_K, weight_K, norm)

    def _check_weights(self, weight_K: Any) -> None:
        """Refuse a weighting of a user's own that leaves out a part of its work: without it the run would learn nothing, or stop later.

        Raises:
            RunError: it gave no weights, or no gradient.
        """
        name, K = type(self.task_weights).__name__, len(self._task_names)
        if not isinstance(weight_K, torch.Tensor) or weight_K.shape != (K,):
            raise RunError(f"task_weights: {name}.backward returned no weights: expected those that it used, a tensor of shape [{K}]")
        if all(parameter.grad is None for parameter in self.optimizer.parameters):
            raise RunError(
                f"task_weights: {name}.backward gave no gradient: expected it to call weigh, combine or replace of its gradients"
            )
        self._checked = True

    def _differentiate(self, batch: Batch) -> tuple[Losses, TaskGradients]:
        """A batch's losses, and the way to their gradients."""
        network = self.agent.network
        if self._tape is None:
            losses = self.agent.losses(batch)
            return losses, AutogradGradients(losses.loss_KB.mean(1), self._shared, self._own)
        if self._taps is None:
            self._taps = self._tape.make_taps(network, batch.observation.flatten(2, 3))
        with self._tape.recording(self._taps):
            losses = self.agent.losses(batch)
        samples = batch.observation.shape[1]
        return losses, TapedGradients(losses.loss_KB, self._tape, self._taps, self._shared, self._own, samples=samples)

    def warm_up(self) -> None:
        """Compile what is compiled, on samples of no meaning. Leaves no trace in what is learned."""
        shape = (len(self._task_names), self._batch_size)
        zeros = torch.zeros(shape, dtype=torch.int64, device=self.replay.spec.device)
        drawn = self._augmentation.state_dict()
        batch = self._augmentation(self.replay.gather(zeros, zeros, torch.ones(shape, device=zeros.device)))
        _, gradients = self._differentiate(batch)
        gradients.weigh(torch.full_like(gradients.loss_K, 1 / len(gradients.loss_K)))
        if self.task_weights.looks_back:
            with torch.no_grad():
                self.agent.losses(batch)
        for parameter in self.optimizer.parameters:
            parameter.grad = None
        self._augmentation.load_state_dict(drawn)

    def _record(self, loss_K: torch.Tensor, q_K: torch.Tensor, weight_K: torch.Tensor, norm: torch.Tensor) -> None:
        # Figures gather on the device: nothing here waits for it.
        # One task's bad loss ruins the shared parameters, and with them every task's next loss: only the first is to blame.
        # A finite loss may have a gradient that is not: then the largest is.
        bad_K = ~torch.isfinite(loss_K)
        bad_K = torch.where(bad_K.any() | torch.isfinite(norm), bad_K, loss_K == loss_K.max())
        first = bad_K & (self._bad_step_K == _NEVER).all()
        self._bad_step_K.copy_(torch.where(first, self._step, self._bad_step_K))
        for name, value in (("loss", loss_K), ("q", q_K), ("weight", weight_K), ("norm", norm)):
            self._figures[name].add_(value)

    def check_finite(self) -> None:
        """Look whether all losses since the start and their gradients were finite (waits for the device).

        Raises:
            RunError: one was not; names the task and the step.
        """
        first, task = self._bad_step_K.min(0)
        if first.item() != _NEVER:
            raise RunError(
                f"the loss of task {self._task_names[int(task)]} or its gradient is not finite at step {int(first)}; "
                "a lower optimizer.lr or optimizer.max_grad_norm may help"
            )

    def row(self) -> dict[str, float]:
        """Means of the figures since the last row (waits for the device), and start anew."""
        count, self._updates_in_row = self._updates_in_row, 0
        self._ranks.mean_([*self._figures.values()])  # only the values of actions differ
        figures: dict[str, float] = {}
        if count:
            means: dict[str, Any] = {name: (total / count).tolist() for name, total in self._figures.items()}
            for k, name in enumerate(self._task_names):
                figures |= {f"loss/{name}": means["loss"][k], f"q/mean/{name}": means["q"][k], f"weight/{name}": means["weight"][k]}
            figures["grad/norm"] = means["norm"]
            for figure, value_K in self.agent.figures().items():
                figures |= {f"{figure}/{name}": value for name, value in zip(self._task_names, value_K.tolist(), strict=True)}
        for total in self._figures.values():
            total.zero_()
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "learns_from": self._learns_from,
            "updates_before": self._updates_before,
            "updates_in_row": self._updates_in_row,
            "figures": dict(self._figures),
            "task_weights": self.task_weights.state_dict(),
            "augmentation": self._augmentation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self._learns_from, self._updates_before = int(state["learns_from"]), int(state["updates_before"])
        self._updates_in_row = int(state["updates_in_row"])
        for name, total in self._figures.items():
            total.copy_(state["figures"][name])
        self.task_weights.load_state_dict(state["task_weights"])
        self._augmentation.load_state_dict(state.get("augmentation", {}))  # older checkpoints: of runs without one

    def refill_from(self, step: int) -> None:
        """Start over with an empty replay at a step: gather as much as at the start, and make up for no update."""
        self._learns_from, self._updates_before = step + self.agent.learning_starts, self.updates
