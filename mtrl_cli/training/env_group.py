"""A group of environments: what is seen of them, and what is chosen to be done in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from mtrl_cli.training.frame_stack import FrameStack
from mtrl_cli.training.host_transfer import Arrived, Pinned, SharedMemory


def make_group(
    pack: Pack, actor: EpsilonGreedy, agent: Agent, first_env: int, num_envs: int, seed: int, num_threads: int, device: torch.device
) -> Group:
    """`num_envs` environments of each task, from that of number `first_env`, which are played in training and seen on a device."""
    K, on_gpu = len(pack.tasks), device.type == "cuda"
    transfer = Pinned(K, num_envs, pack.observation_shape, pack.observation_dtype, device) if on_gpu else SharedMemory()
    played = VectorTasks(
        pack,
        num_envs=num_envs,
        seed=seed,
        num_threads=num_threads,
        training=True,
        stream="train",
        first_env=first_env,
        buffers=transfer.buffers,
    )
    dtype = torch.from_numpy(np.empty(0, pack.observation_dtype)).dtype
    frames = FrameStack(K, num_envs, pack.stack, pack.observation_shape, dtype, device)
    recorder = (lambda: cuda_graphs.CudaGraphs(device, cuda_graphs.generators_of(actor))) if on_gpu else None
    return Group(played, actor, frames, agent.kept_value, transfer, recorder)


@dataclass
class Row:
    """What n environments of each of K tasks saw, did and got in one step: arguments of `Replay.add`, tensors `[K, n, ...]`, and `done`."""

    frame: torch.Tensor
    start: torch.Tensor
    action: torch.Tensor
    value: torch.Tensor
    reward: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    done: torch.Tensor


def joined(rows: list[Row]) -> Row:
    """The rows of several groups as one."""
    if len(rows) == 1:
        return rows[0]
    return Row(**{name: torch.cat([getattr(row, name) for row in rows], 1) for name in Row.__dataclass_fields__})


class Group:
    """n environments of each task that step together.

    Args:
        pack: plays them.
        actor: chooses for them.
        frames: what is seen of them.
        keep: what the replay is to keep of the best values (`Agent.kept_value`).
        transfer: between the two.
        recorder: makes the record of a choice that is then replayed (`capture.py`); None: choices are made one operation at a time.
    """

    def __init__(
        self,
        pack: VectorTasks,
        actor: EpsilonGreedy,
        frames: FrameStack,
        keep: Callable[[torch.Tensor], torch.Tensor | None],
        transfer: Pinned | SharedMemory,
        recorder: Callable[[], cuda_graphs.Recorder] | None = None,
    ):
        self.pack, self.frames = pack, frames
        self._actor, self._keep, self._transfer = actor, keep, transfer
        device = frames.observation.device
        shape = (len(pack.tasks), pack.num_envs)
        self._epsilon_K = torch.zeros(shape[0], device=device)
        self._action = torch.zeros(shape, dtype=torch.int64, device=device)
        self._value = torch.zeros(shape, device=device)
        self._choose = cuda_graphs.Captured(self._act, recorder) if recorder else self._act

    def begin(self, epsilon_K: NDArray[np.float32]) -> None:
        """Start every environment's first episode."""
        self._show(self.pack.reset(), epsilon_K)

    def _show(self, observation: NDArray[np.generic], epsilon_K: NDArray[np.float32]) -> None:
        """An observation of which nothing is older."""
        shape = (len(self.pack.tasks), self.pack.num_envs)
        arrived = self._transfer.bring(observation, np.zeros(shape, np.float32), np.ones((3, *shape), bool), epsilon_K)
        self._see(arrived)

    def _see(self, arrived: Arrived) -> None:
        self._epsilon_K.copy_(arrived.epsilon_K)
        self.frames.push(arrived.observation, arrived.done)

    def choose(self) -> None:
        """Choose actions for what is seen now, and begin to fetch them from the device."""
        self._choose()
        self._transfer.fetch(self._action)

    def _act(self) -> None:
        action, value = self._actor.choose(self.frames.observation, self._epsilon_K)
        self._action.copy_(action)
        kept = self._keep(value)  # now: the value scale may move with every update
        if kept is not None:
            self._value.copy_(kept)

    def chosen(self) -> NDArray[np.int64]:
        """The chosen actions `[K, n]`, once they are on the host."""
        return self._transfer.fetched()

    def send(self) -> None:
        """Set the environments going with the chosen actions."""
        self.pack.send(self.chosen())

    def take(self, step: Step, epsilon_K: NDArray[np.float32]) -> Row:
        """What came of it. From now on what is seen is what follows.

        Args:
            step: what `pack.recv` gave.
            epsilon_K: for the next choice.
        """
        flags = np.stack([step.terminated, step.truncated, step.done])
        arrived = self._transfer.bring(step.observation, step.reward, flags, epsilon_K)
        row = Row(
            frame=self.frames.newest.clone(),
            start=self.frames.start.clone(),
            action=self._action.clone(),
            value=self._value.clone(),
            reward=arrived.reward.clone(),
            terminated=arrived.terminated.clone(),
            truncated=arrived.truncated.clone(),
            done=arrived.done.clone(),
        )
        self._see(arrived)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Between two steps, with the next actions chosen."""
        frames = self.frames.state_dict()
        return {"pack": self.pack.state_dict(), "frames": frames, "action": self._action.clone(), "value": self._value.clone()}

    def load_state_dict(self, state: dict[str, Any], epsilon_K: NDArray[np.float32]) -> bool:
        """Go on from a state; emulators are brought back by playing their episodes again.

        Args:
            epsilon_K: for the next choice.

        Returns:
            whether that had been made.

        Raises:
            RunError: they did not show the frames that they showed before.
        """
        observation = self.pack.load_state_dict(state["pack"])
        self._show(observation, epsilon_K)
        self.frames.load_state_dict(state["frames"])
        if not np.array_equal(observation, self.frames.newest.cpu().numpy()):
            raise RunError("the environments did not repeat themselves: resume with the versions of the packages that run.json names")
        if "action" not in state:  # of a version that chose at the beginning of a step
            return False
        self._action.copy_(state["action"])
        self._value.copy_(state["value"])
        self._transfer.fetch(self._action)
        return True
