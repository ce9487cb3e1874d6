"""Replay buffers that store each frame once and sample frame stacks and n-step windows by index arithmetic.

Time is counted in *rows*: row r holds step r of all N environments of all K tasks. A ring holds the newest `T` rows; row r is in
slot r % T. The frame of a row is the newest frame of the observation in which the action was chosen: an observation of S frames
is gathered from S rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from mtrl_cli.machine import rng
from mtrl_cli.replay.sum_tree import SumTree
from mtrl_cli.replay.types import Batch as Batch
from mtrl_cli.replay.types import ReplaySpec as ReplaySpec
from mtrl_cli.replay.types import Samples as Samples
from mtrl_cli.replay.types import Transition as Transition
from mtrl_cli.types import Auto, Fraction, PositiveInt

TERMINATED, TRUNCATED, START = 1, 2, 4
# Draws per sample, of which the first valid one is used. Starts without a successor are rare: one per truncated episode.
_DRAWS = 4


class Replay(ABC):
    """The newest `capacity` transitions of each task.

    Args:
        spec: sizes.
        capacity: transitions per task, rounded down to whole rows.

    Raises:
        ValueError: the capacity is too small for one window and one frame stack.

    Attributes:
        from_rollouts: whether the replay serves agents that learn from rollouts, and no others.
        capturable: whether a CUDA graph can record `draw` and `update_priorities` (`machine/cuda_graphs.py`).
    """

    from_rollouts: ClassVar[bool] = False
    capturable: ClassVar[bool] = False

    @classmethod
    def fixed_capacity(cls, spec: ReplaySpec) -> int:
        """Transitions per task of a replay without a `capacity` key."""
        raise NotImplementedError(f"{cls.__name__} has no `capacity` key and defines no fixed capacity")

    @classmethod
    def bytes_per_transition(cls, spec: ReplaySpec) -> int:
        """Upper bound on the memory of a transition: frame, action, reward and flags."""
        return int(np.prod(spec.frame_shape)) * spec.dtype.itemsize + 1 + 4 + 1

    def __init__(self, spec: ReplaySpec, capacity: int):
        self.spec = spec
        self.capacity_rows = capacity // spec.num_envs
        needed = spec.n_step + spec.stack + 1
        if self.capacity_rows < needed:
            raise ValueError(
                f"replay.capacity must be at least {needed * spec.num_envs} ({needed} rows of env.num_envs={spec.num_envs}) "
                f"for n-step windows and frame stacks, got {capacity}"
            )
        K, T, N = spec.num_tasks, self.capacity_rows, spec.num_envs
        # The last frame stays zero: stacks use it before the start of an episode.
        self._frames = _zeros((K * T * N + 1, *spec.frame_shape), spec.dtype, spec.device)
        self._actions = torch.zeros((K, T, N), dtype=torch.uint8, device=spec.device)
        self._rewards = torch.zeros((K, T, N), dtype=torch.float32, device=spec.device)
        self._flags = torch.zeros((K, T, N), dtype=torch.uint8, device=spec.device)
        self._generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.rows = 0
        self._first_kept = 0
        # Inputs of `draw` on the device: the first eligible row, and the number of eligible rows times environments.
        self._first_row = torch.zeros((), dtype=torch.int64, device=spec.device)
        self._starts = torch.zeros((), dtype=torch.int64, device=spec.device)

    def add(self, transition: Transition) -> None:
        """Append a row."""
        slot = self.rows % self.capacity_rows
        self._frames_KTN[:, slot] = transition.frame
        self._actions[:, slot] = transition.action.to(torch.uint8)
        self._rewards[:, slot] = transition.reward
        terminated, truncated = transition.terminated, transition.truncated & ~transition.terminated
        self._flags[:, slot] = (
            terminated.to(torch.uint8) * TERMINATED + truncated.to(torch.uint8) * TRUNCATED + transition.start.to(torch.uint8) * START
        )
        self.rows += 1
        self._first_kept = max(self._first_kept, self.rows - self.capacity_rows)

    def _stored(self) -> dict[str, torch.Tensor]:
        """Views of all stored tensors by name, each `[K, T, N, ...]`."""
        return {"frames": self._frames_KTN, "actions": self._actions, "rewards": self._rewards, "flags": self._flags}

    @property
    def _frames_KTN(self) -> torch.Tensor:
        spec = self.spec
        return self._frames[:-1].view(spec.num_tasks, self.capacity_rows, spec.num_envs, *spec.frame_shape)

    # -- reading ------------------------------------------------------------------------------------------------------------

    @property
    def eligible_rows(self) -> tuple[int, int]:
        """First row at which a sample may start, and the row after the last.

        The frame stack of the sample must be stored completely (before the first row of a run there is nothing to store), and the row n
        steps later must be written.
        """
        first = self._first_kept + (self.spec.stack - 1 if self._first_kept else 0)
        return first, self.rows - self.spec.n_step

    @property
    def ready(self) -> bool:
        """Whether the replay can be sampled."""
        first, stop = self.eligible_rows
        return stop > first

    @property
    def transitions(self) -> int:
        """Stored transitions per task."""
        return (self.rows - self._first_kept) * self.spec.num_envs

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self._stored().values())

    def sample(self, batch_size: int, step: int) -> Samples:
        """Draw `batch_size` samples of each task at a step (per task)."""
        self.prepare(step, batch_size)
        return self.draw(batch_size)

    def prepare(self, step: int, batch_size: int) -> None:
        """Write the inputs of one `draw` into fixed tensors; `step` (per task) sets annealed quantities."""
        first, stop = self.eligible_rows
        self._first_row.fill_(first)
        self._starts.fill_((stop - first) * self.spec.num_envs)

    @abstractmethod
    def draw(self, batch_size: int) -> Samples:
        """Draw `batch_size` samples of each task after `prepare`, without waiting for the device."""

    def gather(self, row_KB: torch.Tensor, env_KB: torch.Tensor, weight_KB: torch.Tensor) -> Samples:
        """Samples that start at given rows and environments (int64 `[K, B]`)."""
        spec = self.spec
        task_K1 = torch.arange(spec.num_tasks, device=spec.device)[:, None]
        rewards, steps = [], torch.zeros_like(row_KB)
        alive = torch.ones_like(row_KB, dtype=torch.bool)
        terminated, ended_by_truncation = ~alive, ~alive
        for offset in range(spec.n_step):
            slot = (row_KB + offset) % self.capacity_rows
            flags = self._flags[task_K1, slot, env_KB]
            # The successor of a truncated step is not stored: the window ends before the step and bootstraps from its observation.
            ended_by_truncation = ended_by_truncation | (alive & ((flags & TRUNCATED) != 0))
            alive = alive & ~ended_by_truncation
            rewards.append(torch.where(alive, self._rewards[task_K1, slot, env_KB], 0.0))
            steps = steps + alive.long()
            terminated = terminated | (alive & ((flags & TERMINATED) != 0))
            alive = alive & ~terminated
        return Batch(
            observation=self._stacks(task_K1, row_KB, env_KB),
            action=self._actions[task_K1, row_KB % self.capacity_rows, env_KB].long(),
            rewards=torch.stack(rewards, 2),
            steps=steps,
            terminated=terminated,
            next_observation=self._stacks(task_K1, row_KB + torch.where(terminated, 0, steps), env_KB),
            weight=torch.where(steps > 0, weight_KB, 0.0),
            index=row_KB % self.capacity_rows * spec.num_envs + env_KB,
        )

    def _stacks(self, task_K1: torch.Tensor, row_KB: torch.Tensor, env_KB: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, S, *frame]` whose newest frames are in given rows."""
        spec = self.spec
        indices, valid = [], torch.ones_like(row_KB, dtype=torch.bool)
        for age in range(spec.stack):
            slot = (row_KB - age) % self.capacity_rows
            index = (task_K1 * self.capacity_rows + slot) * spec.num_envs + env_KB
            valid = valid & (row_KB >= age)
            indices.append(torch.where(valid, index, self._frames.shape[0] - 1))
            valid = valid & ((self._flags[task_K1, slot, env_KB] & START) == 0)
        index_KBS = torch.stack(indices[::-1], 2)
        return self._frames.index_select(0, index_KBS.flatten()).view(*index_KBS.shape, *spec.frame_shape)

    def state_dict(self) -> dict[str, Any]:
        """State without the rows (see `export_rows`)."""
        return {
            "rows": self.rows,
            "first_row": self._first_kept,
            "capacity_rows": self.capacity_rows,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], rows_restored: bool) -> None:
        """Restore a state. The replay starts empty unless its rows were restored before.

        Raises:
            ValueError: the state has another capacity.
        """
        if state["capacity_rows"] != self.capacity_rows:
            raise ValueError(f"the saved replay has a capacity of {state['capacity_rows']} rows, this replay {self.capacity_rows}")
        self.rows = int(state["rows"])
        self._first_kept = int(state["first_row"]) if rows_restored else self.rows
        rng.restore(self._generator, state["generator"])

    def export_rows(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Return the rows [start, stop) as tensors `[K, stop - start, N, ...]` on the host."""
        slots = torch.arange(start, stop, device=self.spec.device) % self.capacity_rows
        return {name: tensor[:, slots].cpu() for name, tensor in self._stored().items()}

    def import_rows(self, start: int, tensors: dict[str, torch.Tensor]) -> None:
        """Restore rows of `export_rows(start, ...)`; of more rows than the capacity, only the newest."""
        rows = tensors["flags"].shape[1]
        newest = slice(max(0, rows - self.capacity_rows), rows)
        slots = torch.arange(start + newest.start, start + rows, device=self.spec.device) % self.capacity_rows
        for name, tensor in self._stored().items():
            tensor[:, slots] = tensors[name][:, newest].to(self.spec.device)

    def continue_from(self, state: dict[str, Any]) -> None:
        """Continue an empty replay after imported rows of another run's replay.

        The steps of the last imported row count as truncated because their successors are not stored: no window crosses into this run. No
        frame stack does either, because the next row starts episodes.

        Args:
            state: `state_dict` of the other replay, whose capacity may differ.
        """
        self.rows = int(state["rows"])
        self._first_kept = max(int(state["first_row"]), self.rows - self.capacity_rows)
        if self.rows == 0:
            return
        last = self._flags[:, (self.rows - 1) % self.capacity_rows]
        last |= torch.where((last & TERMINATED) != 0, 0, TRUNCATED).to(torch.uint8)

    def update_priorities(self, batch: Samples, error_KB: torch.Tensor) -> None:
        """Set the priorities of a batch from its absolute temporal-difference errors `[K, B]`."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros whose memory is allocated on the first write: torch would write all of them, at a second per GiB."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))


class UniformReplay(Replay):
    """Uniform sampling of transitions with a successor (Mnih et al. 2015).

    Args:
        capacity: transitions per task, or "auto": as many as fit into memory.
    """

    capturable = True

    def __init__(self, spec: ReplaySpec, *, capacity: PositiveInt | Auto):
        super().__init__(spec, int(capacity))

    def draw(self, batch_size: int) -> Samples:
        spec = self.spec
        shape = (_DRAWS, spec.num_tasks, batch_size)
        uniform = torch.rand(shape, generator=self._generator, device=spec.device, dtype=torch.float64)
        start = torch.minimum((uniform * self._starts).long(), self._starts - 1)
        row, env = self._first_row + start // spec.num_envs, start % spec.num_envs
        task_K1 = torch.arange(spec.num_tasks, device=spec.device)[:, None]
        is_invalid = (self._flags[task_K1, row % self.capacity_rows, env] & TRUNCATED) != 0
        chosen = is_invalid.to(torch.uint8).argmin(0, keepdim=True)  # the first valid draw
        row_KB, env_KB = row.gather(0, chosen)[0], env.gather(0, chosen)[0]
        return self.gather(row_KB, env_KB, torch.ones(row_KB.shape, device=spec.device))


class PrioritizedReplay(Replay):
    """Sampling in proportion to the last error (Schaul et al. 2016, proportional variant, section 3.3).

    Args:
        capacity: transitions per task, or "auto": as many as fit into memory.
        alpha: exponent of the priorities; 0 is uniform.
        beta: initial exponent of the importance weights, annealed linearly to 1 over the run.
    """

    capturable = True

    @classmethod
    def bytes_per_transition(cls, spec: ReplaySpec) -> int:
        """Add two float64 nodes of the sum tree, whose leaves are rounded up to a power of two."""
        return super().bytes_per_transition(spec) + 32

    def __init__(self, spec: ReplaySpec, *, capacity: PositiveInt | Auto, alpha: Fraction = 0.6, beta: Fraction = 0.4):
        super().__init__(spec, int(capacity))
        self._alpha, self._beta = alpha, beta
        self._tree = SumTree(spec.num_tasks, self.capacity_rows * spec.num_envs, spec.device)
        self._largest_K1 = torch.ones((spec.num_tasks, 1), dtype=torch.float64, device=spec.device)
        self._exponent, self._count = torch.zeros((2,), dtype=torch.float64, device=spec.device).unbind()

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._tree.nbytes

    def add(self, transition: Transition) -> None:
        first_before, _ = self.eligible_rows
        super().add(transition)
        first, stop = self.eligible_rows
        # Rows without a complete frame stack are no longer eligible, the overwritten row among them; one row has a new successor.
        for row in range(first_before, first):
            self._set_row(row, 0.0)
        if stop > first:
            flags = self._flags[:, (stop - 1) % self.capacity_rows]
            self._set_row(stop - 1, self._largest_K1 * ((flags & TRUNCATED) == 0))

    def _set_row(self, row: int, value: torch.Tensor | float) -> None:
        K, N = self.spec.num_tasks, self.spec.num_envs
        index = row % self.capacity_rows * N + torch.arange(N, device=self.spec.device)
        priorities = torch.as_tensor(value, dtype=torch.float64, device=self.spec.device).expand(K, N)
        self._tree.set(index.expand(K, N), priorities)

    def continue_from(self, state: dict[str, Any]) -> None:
        """Keep known priorities; transitions without one get the priority of new transitions."""
        super().continue_from(state)
        if "largest" in state:
            self._largest_K1.copy_(state["largest"])
        tree_KTN = state["tree"].unflatten(1, (-1, self.spec.num_envs)).to(self.spec.device) if "tree" in state else None
        for row in range(*self.eligible_rows):
            known = 0 * self._largest_K1 if tree_KTN is None else tree_KTN[:, row % tree_KTN.shape[1]]
            is_valid = (self._flags[:, row % self.capacity_rows] & TRUNCATED) == 0
            self._set_row(row, torch.where(known > 0, known, self._largest_K1) * is_valid)

    def prepare(self, step: int, batch_size: int) -> None:
        super().prepare(step, batch_size)
        self._exponent.fill_(-(self._beta + (1 - self._beta) * min(1.0, step / self.spec.total_steps)))
        self._count.fill_(self.transitions)

    def draw(self, batch_size: int) -> Samples:
        spec = self.spec
        uniform = torch.rand((spec.num_tasks, batch_size), generator=self._generator, device=spec.device, dtype=torch.float64)
        # Stratified sampling: one sample from each of B equal parts of the total priority (Schaul et al. 2016, appendix B.2.1).
        uniform = (uniform + torch.arange(batch_size, device=spec.device)) / batch_size
        index, probability = self._tree.draw(uniform)
        slot, env = index // spec.num_envs, index % spec.num_envs
        row = self._first_row + (slot - self._first_row) % self.capacity_rows
        weight = (probability * self._count).clamp_min(1e-12) ** self._exponent
        weight = torch.where(probability > 0, weight, 0.0)
        return self.gather(row, env, (weight / weight.amax(1, keepdim=True).clamp_min(1e-12)).float())

    def update_priorities(self, batch: Samples, error_KB: torch.Tensor) -> None:
        priority = (error_KB.double() + 1e-6) ** self._alpha
        torch.maximum(self._largest_K1, priority.amax(1, keepdim=True), out=self._largest_K1)
        # An invalid sample keeps priority 0.
        self._tree.set(batch.index, torch.where(batch.weight > 0, priority, 0.0))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tree": self._tree.leaves.clone(), "largest": self._largest_K1}

    def load_state_dict(self, state: dict[str, Any], rows_restored: bool) -> None:
        super().load_state_dict(state, rows_restored)
        self._largest_K1.copy_(state["largest"])
        if rows_restored:
            self._tree.load(state["tree"])
