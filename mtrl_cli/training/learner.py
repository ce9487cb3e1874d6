"""The learner: updates that are due, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.errors import RunError
from mtrl_cli.machine import cuda_graphs, rng
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.replay.buffers import Batch, Replay
from mtrl_cli.task_weights.base import TaskGradients, TaskWeights
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.task_weights.tape import Tape, TapedGradients
from mtrl_cli.training.freezing import Freezing, Rows
from mtrl_cli.training.optimizers import Optimizer
from mtrl_cli.training.rank_gradients import RankGradients
from mtrl_cli.training.resets import Resets

_NEVER = torch.iinfo(torch.int64).max


class Learner:
    """Trains the agent's network from the replay.

    Args:
        agent, replay, augmentation, task_weights, optimizer: the parts of an update.
        task_names: for messages and metrics.
        tape: where gradients of tasks are asked for and can be told apart in one backward pass (`tape_for`).
        recorder: makes the record of an update that is then replayed (`capture.py`); None: updates are made one operation at a time.
        ranks: that train together: each draws its share of a batch, and losses and gradients are averaged over all.
        freezing: which parameters stand still; None: none.
        make_tape: makes the tape anew when other parameters are trained than before, and whatever else depends on these.
        resets: of the network, between updates.
        dropout: what the network's dropout draws from, which is torch's own generator of the device; None: it has no dropout.
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
        recorder: Callable[[], cuda_graphs.Recorder] | None = None,
        ranks: Ranks = ALONE,
        resets: Resets | None = None,
        dropout: torch.Generator | None = None,
        freezing: Freezing | None = None,
        make_tape: Callable[[], Tape | None] = lambda: None,
    ):
        self.agent, self.replay, self.optimizer, self.task_weights = agent, replay, optimizer, task_weights
        self._augmentation = augmentation
        self._tape, self._ranks, self._make_tape = tape, ranks, make_tape
        self._resets, self._dropout = resets, dropout
        self._spectral_layers = spectral_layers(agent.network)
        self.freezing = freezing or Freezing(agent.network)
        self._batch_size = ranks.share(agent.batch_key, agent.batch_size)
        self._checked = False
        self._taps: list[torch.Tensor] | None = None
        self._shared, self._own = agent.network.shared_parameters(), agent.network.own_parameters()
        self._task_names = task_names
        self.updates = 0
        self._learns_from, self._updates_before = agent.learning_starts, 0
        self._trained_rows: dict[int, torch.Tensor] = {}  # of shared parameters that are frozen in part
        self._learning_starts = agent.learning_starts  # the first time
        K, device = len(task_names), replay.spec.device
        self._metrics = {name: torch.zeros(K, device=device) for name in ("loss", "q", "weight")} | {"norm": torch.zeros((), device=device)}
        self._updates_in_row = 0
        self._bad_step_K = torch.full((K,), _NEVER, dtype=torch.int64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        recorded = all(part.capturable for part in (agent, replay, augmentation, task_weights, optimizer))
        self._recorder = recorder if recorded else None
        self._make_update = self._ready_to_update()

    def _ready_to_update(self) -> Callable[[], None]:
        return cuda_graphs.Captured(self.train_step, self._recorder) if self._recorder else self.train_step

    def freeze(self, loaded: Rows) -> None:
        """Freeze what was loaded from a source, as far as the run freezes any of it."""
        self.freezing.begin(loaded)
        if self.freezing.is_any:
            self._train_others()

    def _train_others(self) -> None:
        """Other parameters are trained from now on: make anew what was made for those before."""
        if self._tape is not None:
            self._tape.close()
        self._tape, self._taps = self._make_tape(), None
        network = self.agent.network
        self._shared, self._own = network.shared_parameters(), network.own_parameters()
        self._trained_rows = self.freezing.trained_rows(self._shared)
        self._make_update = self._ready_to_update()

    @property
    def _weighting(self) -> TaskWeights:
        """What weighs the tasks: where all that they share is frozen, gradients have nothing to say."""
        alone = self.freezing.is_any and self.task_weights.needs != "losses" and not self._shared
        return Uniform(self.task_weights.tasks) if alone else self.task_weights

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

    def run_due_updates(self, step: int) -> None:
        """Make the updates that are due at a step (per task)."""
        due = self.updates_due(step)
        while self.updates < due:
            self.update(step)

    def update(self, step: int) -> None:
        """One update of the network."""
        if (stage := self.freezing.stage_at(step)) != self.freezing.stage:
            self.optimizer.forget(self.freezing.move_to(stage))
            self._train_others()
        if self._resets is not None:
            self._resets.make_what_is_due(step, self.agent, self.optimizer, self.freezing.put_back)
        self.agent.prepare(self.replay, step, self._batch_size)
        self.optimizer.at(step / self.replay.spec.total_steps, step - self._learning_starts)
        self._step.fill_(step)
        self._make_update()
        self.updates += 1
        self._updates_in_row += 1
        self.agent.after_update(self.updates)

    def train_step(self) -> None:
        """All that an update does to tensors. What changes from one to the next is in tensors that stay where they are."""
        batch = self._augmentation(self.replay.draw(self._batch_size))
        for layer in self._spectral_layers:
            layer.power_step()
        if self._spectral_layers:
            self.freezing.put_back()
        if self.updates == 0:
            self.agent.begin(batch)
        losses, gradients = self._differentiate(batch)
        if self._ranks.size > 1:
            gradients = RankGradients(gradients, self._shared, self._own, self._ranks)
        loss_K = gradients.loss_K
        weight_K = self._weighting.backward(gradients)
        if not self._checked:
            self._check_weights(weight_K)
        self.freezing.drop_gradients()
        norm = self.optimizer.step()
        self.freezing.put_back()
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
            return losses, AutogradGradients(losses.loss_KB.mean(1), self._shared, self._own, self._trained_rows)
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
        augmented = self._augmentation.state_dict()
        batch = self._augmentation(self.replay.gather(zeros, zeros, torch.ones(shape, device=zeros.device)))
        drawn = None if self._dropout is None else self._dropout.get_state()
        _, gradients = self._differentiate(batch)
        gradients.weigh(torch.full_like(gradients.loss_K, 1 / len(gradients.loss_K)))
        if self.task_weights.looks_back:
            with torch.no_grad():
                self.agent.losses(batch)
        for parameter in self.optimizer.parameters:
            parameter.grad = None
        if self._dropout is not None and drawn is not None:
            self._dropout.set_state(drawn)
        self._augmentation.load_state_dict(augmented)

    def _record(self, loss_K: torch.Tensor, q_K: torch.Tensor, weight_K: torch.Tensor, norm: torch.Tensor) -> None:
        # Metrics gather on the device: nothing here waits for it.
        # One task's bad loss ruins the shared parameters, and with them every task's next loss: only the first is to blame.
        # A finite loss may have a gradient that is not: then the largest is.
        bad_K = ~torch.isfinite(loss_K)
        bad_K = torch.where(bad_K.any() | torch.isfinite(norm), bad_K, loss_K == loss_K.max())
        first = bad_K & (self._bad_step_K == _NEVER).all()
        self._bad_step_K.copy_(torch.where(first, self._step, self._bad_step_K))
        for name, value in (("loss", loss_K), ("q", q_K), ("weight", weight_K), ("norm", norm)):
            self._metrics[name].add_(value)

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
        """Means of the metrics since the last row (waits for the device), and start anew."""
        count, self._updates_in_row = self._updates_in_row, 0
        self._ranks.mean_([*self._metrics.values()])  # only the values of actions differ
        metrics: dict[str, float] = {}
        if count:
            means: dict[str, Any] = {name: (total / count).tolist() for name, total in self._metrics.items()}
            for k, name in enumerate(self._task_names):
                metrics |= {f"loss/{name}": means["loss"][k], f"q/mean/{name}": means["q"][k], f"weight/{name}": means["weight"][k]}
            metrics["grad/norm"] = means["norm"]
            for metric, value_K in self.agent.metrics().items():
                metrics |= {f"{metric}/{name}": value for name, value in zip(self._task_names, value_K.tolist(), strict=True)}
        if self._resets is not None:
            metrics["resets"] = float(self._resets.made)
        for total in self._metrics.values():
            total.zero_()
        if self.freezing.is_any:
            metrics["transfer/frozen"] = float(self.freezing.number)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {} if self._resets is None else {"resets": self._resets.state_dict()}
        if self._dropout is not None:
            state["dropout"] = self._dropout.get_state()
        return state | {
            "updates": self.updates,
            "learns_from": self._learns_from,
            "updates_before": self._updates_before,
            "learning_starts": self._learning_starts,
            "updates_in_row": self._updates_in_row,
            "metrics": dict(self._metrics),
            "task_weights": self.task_weights.state_dict(),
            "freezing": self.freezing.state_dict(),
            "augmentation": self._augmentation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self._learns_from, self._updates_before = int(state["learns_from"]), int(state["updates_before"])
        self._learning_starts = int(state.get("learning_starts", self._learning_starts))  # older checkpoints have none
        self._updates_in_row = int(state["updates_in_row"])
        for name, total in self._metrics.items():
            total.copy_(state["metrics"][name])
        self.task_weights.load_state_dict(state["task_weights"])
        if self._resets is not None and "resets" in state:
            self._resets.load_state_dict(state["resets"])
        if self._dropout is not None and "dropout" in state:
            rng.restore(self._dropout, state["dropout"])
        self._augmentation.load_state_dict(state.get("augmentation", {}))  # older checkpoints: of runs without one
        self.freezing.load_state_dict(state.get("freezing", {}))
        if self.freezing.is_any:
            self._train_others()

    def start_at(self, step: int) -> None:
        """Learn from a step on, as there is something to learn from already."""
        self._learns_from = self._learning_starts = step

    def refill_from(self, step: int) -> None:
        """Start over with an empty replay at a step: gather as much as at the start, and make up for no update."""
        self._learns_from, self._updates_before = step + self.agent.learning_starts, self.updates
        if not self.updates:
            self._learning_starts = self._learns_from
