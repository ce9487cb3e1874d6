"""Other implementations of per-task gradients, each as a complete update of the same learner: a loop over tasks, and TorchJD's engines.

They require the learner of `bench_task_weights.py`: hard sharing with one input shape, and a plain head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torchjd.aggregation import PCGrad, PCGradWeighting
from torchjd.autogram import Engine
from torchjd.autojac import jac_to_grad, mtl_backward

from mtrl_cli.agents import targets
from mtrl_cli.agents.dqn import DQN
from mtrl_cli.networks import value_losses
from mtrl_cli.replay.buffers import Batch
from mtrl_cli.training.learner import Learner

Update = Callable[[], None]
GAMMA = 0.99


class _Parts:
    """The parts of a learner that the implementations use."""

    def __init__(self, learner: Learner):
        self.learner = learner
        self.agent = cast(DQN, learner.agent)
        self.network, self.target_network = self.agent.network, self.agent.target_network
        sharing = cast(Any, learner.agent.network.sharing)
        self.torso = nn.Sequential(sharing.stem, sharing.body)
        self.scale = 1 / 255
        self.num_tasks = learner.replay.spec.num_tasks
        self.targets = torch.compile(self._targets, dynamic=False)

    def batch(self) -> tuple[torch.Tensor, Batch, torch.Tensor]:
        """Return observations `[K, B, ...]`, the batch, and its targets `[K, B]`."""
        batch = cast(Batch, self.learner.replay.sample(self.agent.batch_size, 0))
        observation, following = batch.observation.flatten(2, 3), batch.next_observation.flatten(2, 3)
        with torch.no_grad():
            target_KB = self.targets(following, batch.rewards, batch.steps, batch.terminated)
        return observation, batch, target_KB

    def _targets(self, following: torch.Tensor, rewards: torch.Tensor, steps: torch.Tensor, terminated: torch.Tensor) -> torch.Tensor:
        value_KB = targets.bootstrap_value(self.target_network(following), self.network(following))
        discount_KB = targets.discount(steps, terminated, GAMMA)
        return value_losses.td_target(targets.n_step_return(rewards, GAMMA), discount_KB, value_KB)

    def features(self, observation: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` bytes to features `[B, F]` in the precision of the run."""
        dtype = self.network._autocast or torch.float32
        with torch.autocast(observation.device.type, dtype=dtype, enabled=self.network._autocast is not None):
            return self.torso(observation.to(dtype) * self.scale).float()

    def loss(self, q_BA: torch.Tensor, action_B: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
        """Return the loss per sample, `[B]`."""
        return value_losses.huber(target_B - q_BA.gather(-1, action_B[:, None])[:, 0], 1.0)

    def step(self) -> None:
        """Take an optimizer step."""
        self.learner.optimizer.clip_gradients()
        self.learner.optimizer.step()


def loop(learner: Learner) -> Update:
    """Compiled forward and backward pass per task, with TorchJD's PCGrad on the stacked gradients."""
    parts, aggregator = _Parts(learner), PCGrad()
    shared, own = parts.network.shared_parameters(), parts.network.own_parameters()
    linear = cast(Any, parts.network.head).linear

    def task_loss(
        observation: torch.Tensor, action: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return parts.loss(torch.addmm(bias, parts.features(observation), weight), action, target).mean()

    compiled = torch.compile(task_loss, dynamic=False)

    def update() -> None:
        observation, batch, target_KB = parts.batch()
        rows, heads = [], []
        for k in range(parts.num_tasks):
            weight, bias = (each[k].detach().requires_grad_() for each in (linear.weight, linear.bias))
            loss = compiled(observation[k], batch.action[k], target_KB[k], weight, bias)
            gradients = torch.autograd.grad(loss, [*shared, weight, bias])
            rows.append(torch.cat([gradient.flatten() for gradient in gradients[:-2]]))
            heads.append(gradients[-2:])
        combined = aggregator(torch.stack(rows)).split([parameter.numel() for parameter in shared])
        for parameter, part in zip(shared, combined, strict=True):
            parameter.grad = part.view_as(parameter)
        for parameter, each in zip(own, zip(*heads, strict=True), strict=True):
            parameter.grad = torch.stack(each)
        parts.step()

    return update


def jacobian(learner: Learner) -> Update:
    """TorchJD's `mtl_backward` over the joint features with PCGrad; eager, as it cannot differentiate compiled code in parallel."""
    parts, aggregator = _Parts(learner), PCGrad()
    shared, own = parts.network.shared_parameters(), parts.network.own_parameters()

    def update() -> None:
        observation, batch, target_KB = parts.batch()
        features = parts.features(observation.flatten(0, 1)).unflatten(0, (parts.num_tasks, -1))
        q_KBA = torch.baddbmm(own[1], features, own[0])
        losses = [parts.loss(q_KBA[k], batch.action[k], target_KB[k]).mean() for k in range(parts.num_tasks)]
        mtl_backward(losses, features=features, tasks_params=[own for _ in losses], shared_params=shared, retain_graph=True)
        jac_to_grad(shared, aggregator)
        parts.step()

    return update


def gramian(learner: Learner) -> Update:
    """TorchJD's `autogram` engine over samples, summed over tasks, and a second backward pass with PCGrad's weights; eager."""
    parts, weighting = _Parts(learner), PCGradWeighting()
    own = parts.network.own_parameters()
    engine = Engine(parts.torso, batch_dim=0)

    def update() -> None:
        observation, batch, target_KB = parts.batch()
        K, B = batch.action.shape
        features = parts.features(observation.flatten(0, 1)).unflatten(0, (K, B))
        q_KBA = torch.baddbmm(own[1], features, own[0])
        loss_S = parts.loss(q_KBA.flatten(0, 1), batch.action.flatten(), target_KB.flatten())
        gram_KK = engine.compute_gramian(loss_S).view(K, B, K, B).sum((1, 3)) / B**2
        weight_K = weighting(gram_KK)
        loss_S.backward(weight_K.repeat_interleave(B) / B)
        parts.step()

    return update


PEERS: dict[str, Callable[[Learner], Update]] = {
    "plain loop over tasks, compiled": loop,
    "torchjd mtl_backward, eager": jacobian,
    "torchjd autogram, eager": gramian,
}
