"""A training loop of DQN on three fake tasks."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.agents.agent import Agent
from mtrl_cli.agents.dqn import DQN
from mtrl_cli.agents.value_scale import NoValueScale
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.networks.heads import DuelingHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.replay.buffers import Replay, ReplaySpec, UniformReplay
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.training.env_group import EnvGroup
from mtrl_cli.training.episode_statistics import EpisodeStatistics
from mtrl_cli.training.frame_stack import FrameStack
from mtrl_cli.training.host_transfer import Pinned, SharedMemory
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.loop import Loop
from mtrl_cli.training.optimizers import Adam, Optimizer
from tests.helpers.fake_pack import TASKS, FakePack
from tests.helpers.fake_tasks import stream_of, tasks_of
from tests.helpers.learners import SETTINGS

CPU = torch.device("cpu")
NAMES = list(TASKS)


def loop_of(
    replay_kind: type[Replay] = UniformReplay,
    weights_seed: int = 0,
    capacity: int = 40,
    groups: int = 1,
    overlapped: bool = False,
    pinned: bool = False,
    **settings: Any,
) -> Loop:
    """A loop over three fake tasks with two environments each and one small network."""
    pack = FakePack()
    torch.manual_seed(weights_seed)
    torso = MLP(hidden=[8, 6])
    sharing = HardSharing(torso, [task.observation_shape for task in pack.tasks])
    network = MultiTaskNetwork(sharing, DuelingHead(6, [task.num_actions for task in pack.tasks]), observation_scale=1.0)
    options = {"samples_per_step": 1.0, "learning_starts": 8, "n_step": 2, "target_period": 5, "epsilon_steps": 50}
    agent = DQN(network, NoValueScale(stream_of(NAMES)), NAMES, lambda function: function, **(SETTINGS | options | settings))
    spec = ReplaySpec(3, 2, pack.observation_shape, torch.float32, stack=1, n_step=2, device=CPU, seed=1, total_steps=200)
    replay: Replay = replay_kind(spec, capacity=capacity)  # type: ignore[call-arg]
    optimizer = Adam(list(network.parameters()), lr=0.01, eps=1e-4, weight_decay=0.0, max_grad_norm=1.0)
    return assemble(pack, agent, replay, optimizer, groups, overlapped, pinned)


def assemble(
    pack: FakePack, agent: Agent, replay: Replay, optimizer: Optimizer, groups: int = 1, overlapped: bool = False, pinned: bool = False
) -> Loop:
    """Make a loop over all fake tasks."""
    learner = Learner(agent, replay, Pipeline(), Uniform(tasks_of(NAMES)), optimizer, NAMES)
    actor = EpsilonGreedy(agent.network, [task.num_actions for task in pack.tasks], CPU, seed=2)
    size, made = pack.num_envs // groups, []
    for first in range(0, pack.num_envs, size):
        transfer = Pinned(3, size, pack.observation_shape, pack.observation_dtype, CPU) if pinned else SharedMemory()
        envs = VectorTasks(pack, size, seed=3, num_threads=1, training=True, stream="train", first_env=first, buffers=transfer.buffers)
        frames = FrameStack(3, size, 1, pack.observation_shape, torch.float32, CPU)
        made.append(EnvGroup(envs, actor, frames, agent.value_to_store, transfer))
    return Loop(made, actor, replay, learner, EpisodeStatistics(NAMES, pack.num_envs), overlapped)


def run(loop: Loop, ticks: int) -> list[int]:
    return list(islice(loop.ticks(), ticks))
