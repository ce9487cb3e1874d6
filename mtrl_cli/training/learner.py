"""The learner: updates of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.errors import RunError
from mtrl_cli.machine import cuda_graphs, rng
from mtrl_cli.machine.saved import Saved
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.replay.buffers import Replay, Samples
from mtrl_cli.task_weights.base import TaskGradients, TaskWeights
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.task_weights.tape import Tape, TapedGradients
from mtrl_cli.training.callbacks import Callback
from mtrl_cli.training.optimizers import Optimizer
from mtrl_cli.training.rank_gradients import RankGradients
from mtrl_cli.training.update_metrics import UpdateMetrics


@dataclass(eq=False)
class Learner(Saved):
    """Trains the network of an agent.

    Args:
        agent, replay, augmentation, task_weights, optimizer: parts of an update.
        task_names: names of the tasks, for messages and metrics.
        callbacks: callbacks, in the order of calls (see `Callback`).
        make_tape: function that makes the tape, which computes all task gradients in one backward pass (`tape_for`); called again when the
            set of trained parameters changes.
        recorder: function that makes a recorder of CUDA graphs; None: updates are not recorded.
        ranks: processes that train together. Each rank draws its part of a batch; losses and gradients are averaged.

    Attributes:
        updates: number of updates so far.
        metrics: metrics of the updates.
    """

    saved = ("updates", "_learns_from", "_updates_before", "_learning_starts", "metrics", "task_weights", "augmentation")

    agent: Agent
    replay: Replay
    augmentation: Pipeline
    task_weights: TaskWeights
    optimizer: Optimizer
    task_names: list[str]
    callbacks: Sequence[Callback] = ()
    make_tape: Callable[[], Tape | None] = lambda: None
    recorder: Callable[[], cuda_graphs.Recorder] | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            callback.learner = self
        self.updates = 0
        self.metrics = UpdateMetrics(self.task_names, self.replay.spec.device, self.ranks)
        self._batch_size = self.ranks.share(self.agent.batch_key, self.agent.batch_size)
        self._are_weights_checked = False
        # Updates are due from `_learns_from` on, in addition to `_updates_before`. `_learning_starts` is the step of the first update.
        self._learns_from = self._learning_starts = self.agent.learning_starts
        self._updates_before = 0
        parts = (self.agent, self.replay, self.augmentation, self.task_weights, self.optimizer)
        self._is_capturable = all(part.capturable for part in parts)
        self._tape: Tape | None = None
        self.rebuild()

    def rebuild(self) -> None:
        """Recompute everything that depends on which parameters are trained. Call this method after parameters were frozen or unfrozen."""
        if self._tape is not None:
            self._tape.close()
        self._tape = self.make_tape()
        self._taps: list[torch.Tensor] | None = None
        self._shared = self.agent.network.shared_parameters()
        self._own = self.agent.network.own_parameters()
        self._row_masks: dict[int, torch.Tensor] = {}
        for callback in self.callbacks:
            self._row_masks |= callback.row_masks(self._shared)
        recorder = self.recorder if self._is_capturable else None
        self._run_train_step = cuda_graphs.Captured(self.train_step, recorder) if recorder else self.train_step

    # -- updates ------------------------------------------------------------------------------------------------------------

    def update(self, step: int) -> None:
        """Update the network once, at a step (per task)."""
        for callback in self.callbacks:
            callback.before_update(step)
        self.agent.before_update(self.replay)
        self.replay.prepare(step, self._batch_size)
        self.optimizer.set_lr(step / self.replay.spec.total_steps, step - self._learning_starts)
        self.metrics.start_update(step)
        self._run_train_step()
        self.updates += 1
        if self.agent.target_period and self.updates % self.agent.target_period == 0:
            self.agent.sync_target()

    def train_step(self) -> None:
        """Run all tensor operations of an update.

        A CUDA graph records this method: values that change between updates are in tensors with a fixed address.
        """
        batch = self.augmentation(self.replay.draw(self._batch_size))
        for callback in self.callbacks:
            callback.before_losses()
        if self.updates == 0:
            self.agent.initialise_value_scale(batch)

        losses, gradients = self._losses_and_gradients(batch)
        if self.ranks.size > 1:
            gradients = RankGradients(gradients, self._shared, self._own, self.ranks)
        weight_K = self._active_task_weights.backward(gradients)
        self._check_weights(weight_K)
        for callback in self.callbacks:
            callback.before_step()
        norm = self.optimizer.clip_gradients()
        self.optimizer.step()
        self.after_parameter_change()

        if self.task_weights.uses_losses_after_step:
            self._update_task_weights(batch)
        self.agent.after_step(batch, losses)
        self.replay.update_priorities(batch, losses.error_KB)
        self.metrics.add(gradients.loss_K, losses.q_K, weight_K, norm)

    def after_parameter_change(self) -> None:
        """Notify the callbacks that parameters changed."""
        for callback in self.callbacks:
            callback.after_step()

    def _losses_and_gradients(self, batch: Samples) -> tuple[Losses, TaskGradients]:
        """Compute the losses of a batch, and prepare the gradients of the task losses."""
        gradients: TaskGradients
        if self._tape is None:
            losses = self.agent.losses(batch)
            gradients = AutogradGradients(losses.loss_KB.mean(1), self._shared, self._own, self._row_masks)
        else:
            if self._taps is None:
                self._taps = self._tape.make_taps(self.agent.network, batch.observation.flatten(2, 3))
            with self._tape.recording(self._taps):
                losses = self.agent.losses(batch)
            samples = batch.observation.shape[1]
            gradients = TapedGradients(losses.loss_KB, self._tape, self._taps, self._shared, self._own, samples=samples)
        return losses, gradients

    @property
    def _active_task_weights(self) -> TaskWeights:
        """Task weights of the next update: uniform if they require gradients and all shared parameters are frozen."""
        is_uniform = self.task_weights.needs != "losses" and not self._shared
        return Uniform(self.task_weights.tasks) if is_uniform else self.task_weights

    def _check_weights(self, weight_K: Any) -> None:
        """Refuse a user's task weights that compute no weights or no gradients.

        Raises:
            RunError: the weights or the gradients are missing.
        """
        if self._are_weights_checked:
            return
        name, K = type(self.task_weights).__name__, len(self.task_names)
        if not isinstance(weight_K, torch.Tensor) or weight_K.shape != (K,):
            raise RunError(f"task_weights: {name}.backward returned no weights. Return a tensor of shape [{K}]")
        if all(parameter.grad is None for parameter in self.optimizer.parameters):
            raise RunError(f"task_weights: {name}.backward computed no gradient. Call weigh, combine or replace")
        self._are_weights_checked = True

    @torch.no_grad()
    def _update_task_weights(self, batch: Samples) -> None:
        """Update the task weights with the losses of the same batch after the step."""
        loss_K = self.agent.losses(batch).loss_KB.mean(1)
        self.ranks.mean_([loss_K])
        self.task_weights.after_step(loss_K)

    def warm_up(self) -> None:
        """Compile the update on meaningless samples, without any effect on training."""
        device = self.replay.spec.device
        shape = (len(self.task_names), self._batch_size)
        zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        augmentation_state = self.augmentation.state_dict()
        with rng.kept(device):
            batch = self.augmentation(self.replay.gather(zeros, zeros, torch.ones(shape, device=device)))
            _, gradients = self._losses_and_gradients(batch)
            gradients.weigh(torch.full_like(gradients.loss_K, 1 / len(gradients.loss_K)))
            if self.task_weights.uses_losses_after_step:
                with torch.no_grad():
                    self.agent.losses(batch)
        for parameter in self.optimizer.parameters:
            parameter.grad = None
        self.augmentation.load_state_dict(augmentation_state)

    # -- when updates are due -----------------------------------------------------------------------------------------------

    def run_due_updates(self, step: int) -> None:
        """Run all updates that are due at a step (per task)."""
        due = self.updates_due(step)
        while self.updates < due:
            self.update(step)

    def updates_due(self, step: int) -> int:
        """Return the number of updates that a run should have made by a step (per task)."""
        since = step - self._learns_from
        if since < 0 or not self.replay.ready:
            return self.updates
        since -= since % self.agent.period
        return self._updates_before + int(since * self.agent.samples_per_step / self.agent.batch_size)

    @property
    def steps_per_update(self) -> float:
        """Steps per task between updates."""
        return self.agent.batch_size / self.agent.samples_per_step

    def start_at(self, step: int) -> None:
        """Start learning at a step, with a replay that is already filled."""
        self._learns_from = self._learning_starts = step

    def refill_from(self, step: int) -> None:
        """Continue at a step with an empty replay: collect as much as at the start, without making up for missed updates."""
        self._learns_from = step + self.agent.learning_starts
        self._updates_before = self.updates
        if not self.updates:
            self._learning_starts = self._learns_from

    # -- metrics and state --------------------------------------------------------------------------------------------------

    def read_metrics(self) -> dict[str, float]:
        """Return the metrics of the updates since the last call, and current statistics (waits for the device)."""
        metrics = self.metrics.read()
        if metrics:
            for metric, value_K in self.agent.metrics().items():
                metrics |= {f"{metric}/{name}": value for name, value in zip(self.task_names, value_K.tolist(), strict=True)}
        for callback in self.callbacks:
            metrics |= callback.metrics()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"callbacks": {callback.name: callback.state_dict() for callback in self.callbacks}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"][callback.name])
