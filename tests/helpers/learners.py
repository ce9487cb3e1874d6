"""A learner of two small tasks, its replay rows and its state."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import torch

from mtrl_cli.agents.dqn import DQN
from mtrl_cli.agents.value_scale import ClipRewards
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.checkpoints.state_tree import flatten, unflatten
from mtrl_cli.networks.heads import DuelingHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.networks.sharing import HardSharing, Sharing
from mtrl_cli.networks.torsos import MLP, Torso
from mtrl_cli.replay.buffers import Replay, ReplaySpec, UniformReplay
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.training.callbacks import SpectralNorm
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.optimizers import Adam
from tests.helpers.fake_tasks import stream_of, tasks_of
from tests.helpers.replay_reference import random_rows, spec, transition

NAMES = ["pong", "qbert"]
SPEC = spec(frame_shape=(5,), stack=1)
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "samples_per_step": 2.0,
    "learning_starts": 0,
    "gamma": 0.9,
    "n_step": 3,
    "double": True,
    "huber": 1.0,
    "target_period": 3,
    "target_tau": 0.0,
    "epsilon_start": 1.0,
    "epsilon_end": 0.1,
    "epsilon_steps": 100,
    "epsilon_tasks": {},
    "reward_factors": {},
}


def learner_of(
    replay_kind: type[Replay] = UniformReplay,
    sharing: type[Sharing] = HardSharing,
    weights_seed: int = 0,
    augmentation: Pipeline | None = None,
    replay_spec: ReplaySpec = SPEC,
    optimizer_lr: float = 0.01,
    torso: Torso = MLP(hidden=[8, 6]),  # noqa: B008 (it has no state)
    **settings: Any,
) -> Learner:
    """A learner of two tasks with observation sizes 5 and 3, and 4 and 2 actions."""
    torch.manual_seed(weights_seed)
    network = MultiTaskNetwork(sharing(torso, [(5,), (3,)]), DuelingHead(6, [4, 2]), observation_scale=1.0)
    agent = DQN(network, ClipRewards(stream_of(NAMES)), NAMES, lambda function: function, **(SETTINGS | settings))
    replay: Replay = replay_kind(replay_spec, capacity=36)  # type: ignore[call-arg]
    optimizer = Adam(list(network.parameters()), lr=optimizer_lr, eps=1e-4, weight_decay=0.01, max_grad_norm=1.0)
    callbacks = [SpectralNorm(layers)] if (layers := spectral_layers(network)) else []
    return Learner(agent, replay, augmentation or Pipeline(), Uniform(tasks_of(NAMES)), optimizer, NAMES, callbacks=callbacks)


def rows(count: int, start: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random rows that fit the two tasks' shapes and actions."""
    out = []
    for row in islice(random_rows(SPEC, 0), start, start + count):
        row["frame"] = row["frame"] % 17 / 17 - 0.5
        row["frame"][1, :, 3:] = 0
        row["action"] = row["action"] % torch.tensor([[4], [2]])
        out.append(row)
    return out


def fill(learner: Learner, count: int = 20) -> Learner:
    for row in rows(count):
        learner.replay.add(transition(row))
    return learner


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.agent.network.state_dict().items()}


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a state to the form of a checkpoint and back."""
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(flatten(state, tensors)))
    return unflatten(tree, {name: tensor.clone() for name, tensor in tensors.items()})


def saved(learner: Learner, /, **more: Any) -> dict[str, Any]:
    """Return the states of the network, the agent, the optimizer and `more` after a round trip through the saved form."""
    parts = {"model": learner.agent.network, "agent": learner.agent, "optimizer": learner.optimizer, **more}
    return round_trip({name: part.state_dict() for name, part in parts.items()})


def restore(learner: Learner, state: dict[str, Any], rows_of: Replay | None) -> None:
    """Restore the network, the agent and the optimizer from a state of `saved`, and the rows from another replay."""
    if rows_of is not None:
        oldest = max(0, rows_of.rows - rows_of.capacity_rows)
        learner.replay.import_rows(oldest, rows_of.export_rows(oldest, rows_of.rows))
    learner.agent.network.load_state_dict(state["model"])
    learner.agent.load_state_dict(state["agent"])
    learner.optimizer.load_state_dict(state["optimizer"])


def resumed_from(learner: Learner, fresh: Learner) -> Learner:
    """Restore a fresh learner and its replay from the state of another learner."""
    state = saved(learner, learner=learner, replay=learner.replay)
    restore(fresh, state, learner.replay)
    fresh.load_state_dict(state["learner"])
    fresh.replay.load_state_dict(state["replay"], rows_restored=True)
    return fresh
