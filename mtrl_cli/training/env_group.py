"""A group of environments that step together, with their observations and actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.agents.agent import Agent
from mtrl_cli.envs.pack import Pack
from mtrl_cli.envs.vector_tasks import Step, VectorTasks
from mtrl_cli.errors import RunError
from mtrl_cli.machine import cuda_graphs
from mtrl_cli.replay.types import Transition
from mtrl_cli.training.frame_stack import FrameStack
from mtrl_cli.training.host_transfer import Pinned, SharedMemory


def make_group(
    pack: Pack, actor: EpsilonGreedy, agent: Agent, first_env: int, num_envs: int, seed: int, num_threads: int, device: torch.device
) -> EnvGroup:
    """Make a group of `num_envs` training environments of each task, numbered from `first_env`."""
    K, on_gpu = len(pack.tasks), device.type == "cuda"
    transfer = Pinned(K, num_envs, pack.observation_shape, pack.observation_dtype, device) if on_gpu else SharedMemory()
    envs = VectorTasks(pack, num_envs, seed, num_threads, training=True, stream="train", first_env=first_env, buffers=transfer.buffers)
    dtype = torch.from_numpy(np.empty(0, pack.observation_dtype)).dtype
    frames = FrameStack(K, num_envs, pack.stack, pack.observation_shape, dtype, device)
    recorder = (lambda: cuda_graphs.CudaGraphs(device, cuda_graphs.generators_of(actor))) if on_gpu else None
    return EnvGroup(envs, actor, frames, agent.value_to_store, transfer, recorder)


def concatenated(transitions: Sequence[Transition]) -> Transition:
    """Concatenate the transitions of several groups along the environments."""
    if len(transitions) == 1:
        return transitions[0]
    return Transition(*(torch.cat([getattr(each, field.name) for each in transitions], 1) for field in fields(Transition)))


@dataclass(eq=False)
class EnvGroup:
    """n environments of each task that step together.

    Args:
        envs: the environments.
        actor: policy that chooses actions.
        frames: newest frames of the environments.
        value_to_store: `Agent.value_to_store`.
        transfer: transfers between the environments and the device.
        recorder: function that makes a recorder of CUDA graphs; None: the choice of actions is not recorded.
    """

    envs: VectorTasks
    actor: EpsilonGreedy
    frames: FrameStack
    value_to_store: Callable[[torch.Tensor], torch.Tensor | None]
    transfer: Pinned | SharedMemory
    recorder: Callable[[], cuda_graphs.Recorder] | None = None

    def __post_init__(self) -> None:
        device = self.frames.observation.device
        shape = (len(self.envs.tasks), self.envs.num_envs)
        self._epsilon_K = torch.zeros(shape[0], device=device)
        self._action = torch.zeros(shape, dtype=torch.int64, device=device)
        self._value = torch.zeros(shape, device=device)
        self._run_act = cuda_graphs.Captured(self._act, self.recorder) if self.recorder else self._act

    def reset(self, epsilon_K: NDArray[np.float32]) -> None:
        """Start the first episode of every environment."""
        self._start_from(self.envs.reset(), epsilon_K)

    def _start_from(self, observation: NDArray[np.generic], epsilon_K: NDArray[np.float32]) -> None:
        """Set observations that have no earlier frames."""
        shape = (len(self.envs.tasks), self.envs.num_envs)
        ended = np.ones(shape, bool)
        self._push(*self.transfer.to_device(Step(observation, np.zeros(shape, np.float32), ended, ended, ended), epsilon_K))

    def _push(self, step: Step[torch.Tensor], epsilon_K: torch.Tensor) -> None:
        self._epsilon_K.copy_(epsilon_K)
        self.frames.push(step.observation, step.done)

    def choose(self) -> None:
        """Choose actions for the current observations, and start to copy them to the host."""
        self._run_act()
        self.transfer.start_fetch(self._action)

    def _act(self) -> None:
        action, value = self.actor.choose(self.frames.observation, self._epsilon_K)
        self._action.copy_(action)
        stored_value = self.value_to_store(value)  # now, because every update may change the value scale
        if stored_value is not None:
            self._value.copy_(stored_value)

    def send(self) -> None:
        """Send the chosen actions to the environments."""
        self.envs.send(self.transfer.fetch())

    def transition(self, step: Step[np.ndarray], epsilon_K: NDArray[np.float32]) -> Transition:
        """Return the transition that ended with a step, and set the next observation.

        Args:
            step: result of `VectorTasks.recv`.
            epsilon_K: epsilon of the next actions.
        """
        after, epsilon = self.transfer.to_device(step, epsilon_K)
        transition = Transition(
            frame=self.frames.newest.clone(),
            start=self.frames.start.clone(),
            action=self._action.clone(),
            reward=after.reward.clone(),
            terminated=after.terminated.clone(),
            truncated=after.truncated.clone(),
            done=after.done.clone(),
            value=self._value.clone(),
        )
        self._push(after, epsilon)
        return transition

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, with the next actions chosen."""
        return {
            "envs": self.envs.state_dict(),
            "frames": self.frames.state_dict(),
            "action": self._action.clone(),
            "value": self._value.clone(),
        }

    def load_state_dict(self, state: dict[str, Any], epsilon_K: NDArray[np.float32]) -> None:
        """Restore a state of `state_dict`, by replaying the actions of the current episodes.

        Args:
            epsilon_K: epsilon of the next actions.

        Raises:
            RunError: the replayed environments return other frames than before.
        """
        observation = self.envs.load_state_dict(state["envs"])
        self._start_from(observation, epsilon_K)
        self.frames.load_state_dict(state["frames"])
        if not np.array_equal(observation, self.frames.newest.cpu().numpy()):
            raise RunError("the environments are not reproducible. Resume with the package versions in run.json")
        self._action.copy_(state["action"])
        self._value.copy_(state["value"])
        self.transfer.start_fetch(self._action)
