"""A training loop of PQN on three fake tasks."""

from __future__ import annotations

from typing import Any

import torch

from mtrl_cli.agents.pqn import PQN
from mtrl_cli.agents.value_scale import NoValueScale, ValueScale
from mtrl_cli.networks.heads import Head, PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.replay.buffers import ReplaySpec
from mtrl_cli.replay.rollout_buffer import Rollouts
from mtrl_cli.training.loop import Loop
from mtrl_cli.training.optimizers import RAdam
from tests.helpers.fake_pack import FakePack
from tests.helpers.fake_tasks import stream_of
from tests.helpers.loops import CPU, NAMES, assemble

SETTINGS: dict[str, Any] = {
    "rollout_length": 4,
    "epochs": 2,
    "minibatches": 2,
    "gamma": 0.9,
    "trace_decay": 0.65,
    "huber": 0.0,
    "overlap": False,
    "epsilon_start": 1.0,
    "epsilon_end": 0.1,
    "epsilon_steps": 100,
    "epsilon_tasks": {},
    "reward_factors": {},
}


def loop_of(
    head: type[Head] = PlainHead, scale: type[ValueScale] = NoValueScale, num_envs: int = 2, lr: float = 0.01, **settings: Any
) -> Loop:
    """A loop over three fake tasks with one small network."""
    pack = FakePack(num_envs=num_envs)
    torch.manual_seed(0)
    sharing = HardSharing(MLP(hidden=[8, 6], layer_norm=True), [task.observation_shape for task in pack.tasks])
    network = MultiTaskNetwork(sharing, head(6, [task.num_actions for task in pack.tasks]), observation_scale=1.0)
    chosen = SETTINGS | settings
    made = PQN(network, scale(stream_of(NAMES, num_envs=num_envs)), NAMES, lambda function: function, **chosen)
    spec = ReplaySpec(3, num_envs, pack.observation_shape, torch.float32, 1, 1, CPU, 1, 10_000, rollout_length=chosen["rollout_length"])
    optimizer = RAdam(list(network.parameters()), lr=lr, lr_final=1.0, eps=1e-5, weight_decay=0.0, max_grad_norm=10.0)
    loop = assemble(pack, made, Rollouts(spec), optimizer)
    loop.reset()
    return loop
