"""Rollouts: the newest steps of all environments, learned from for a few epochs."""

from __future__ import annotations

from typing import Any

import torch

from mtrl_cli.replay.buffers import TERMINATED, TRUNCATED, Replay, ReplaySpec
from mtrl_cli.replay.types import Rollout, RolloutBatch, Transition

# A loop that acts ahead of its learner may have added this many further rows.
_SPARE_ROWS = 2


class Rollouts(Replay):
    """Consecutive rollouts of T steps of every environment, with a return per step (Gallici et al. 2024, "PQN").

    The rollout of rows r to r + T - 1 is complete when row r + T is stored, whose value bootstraps the last step. The agent then opens the
    rollout by setting its returns, and `draw` returns its steps in minibatches while the next rollout is collected. Each task has its own
    random order in each epoch.

    Truncated steps have no return, and the first steps after a start without rows have no complete frame stack: both are samples of
    weight 0.
    """

    from_rollouts = True
    capturable = True

    @classmethod
    def fixed_capacity(cls, spec: ReplaySpec) -> int:
        """Capacity for the open rollout, the frame stacks of its first steps, and the rollout that is being collected."""
        return (2 * spec.rollout_length + spec.stack + _SPARE_ROWS) * spec.num_envs

    @classmethod
    def bytes_per_transition(cls, spec: ReplaySpec) -> int:
        """Add a value, and a return and a position for the steps of the open rollout."""
        return super().bytes_per_transition(spec) + 16

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._returns.nbytes + self._order.nbytes

    def __init__(self, spec: ReplaySpec):
        super().__init__(spec, self.fixed_capacity(spec))
        K, T, N = spec.num_tasks, spec.rollout_length, spec.num_envs
        self._values = torch.zeros((K, self.capacity_rows, N), device=spec.device)
        self._returns = torch.zeros((K, T, N), device=spec.device)
        self._order = torch.zeros((K, T * N), dtype=torch.int64, device=spec.device)
        self._origin = 0
        self._opened = 0
        self._drawn = 0  # samples per task drawn from the open rollout
        # Inputs of `draw` on the device: first row of the open rollout, first row with a complete stack, position in the order.
        self._begin_row, self._first_whole, self._place = torch.zeros((3,), dtype=torch.int64, device=spec.device).unbind()

    # -- writing ------------------------------------------------------------------------------------------------------------

    def add(self, transition: Transition) -> None:
        """Append a row. The value is the greedy value of the observation, in units of unnormalised returns."""
        self._values[:, self.rows % self.capacity_rows] = transition.value
        super().add(transition)

    def _stored(self) -> dict[str, torch.Tensor]:
        return super()._stored() | {"values": self._values}

    # -- reading ------------------------------------------------------------------------------------------------------------

    @property
    def _begin(self) -> int:
        """First row of the open rollout."""
        return self._origin + (self._opened - 1) * self.spec.rollout_length

    @property
    def is_open(self) -> bool:
        """Whether a rollout is open."""
        return self._opened > 0

    @property
    def epochs_drawn(self) -> int:
        """Completed epochs over the open rollout."""
        return self._drawn // self._order.shape[1]

    @property
    def eligible_rows(self) -> tuple[int, int]:
        """First row of the open rollout, and the row after its last."""
        return (self._begin, self._begin + self.spec.rollout_length) if self.is_open else (self.rows, self.rows)

    @property
    def ready(self) -> bool:
        """Whether a rollout is complete."""
        return self.rows > self._origin + self.spec.rollout_length

    def next_rollout(self) -> Rollout:
        """Return the rollout after the open one."""
        first, T = self._origin + self._opened * self.spec.rollout_length, self.spec.rollout_length
        assert first + T < self.rows, "the rollout is not complete"
        slots = torch.arange(first, first + T + 1, device=self.spec.device) % self.capacity_rows
        flags = self._flags[:, slots[:-1]]
        return Rollout(self._rewards[:, slots[:-1]], self._values[:, slots], (flags & TERMINATED) != 0, (flags & TRUNCATED) != 0)

    def open_next(self, returns_KTN: torch.Tensor) -> None:
        """Open the next rollout with the returns of its steps (float32 `[K, T, N]`)."""
        self._returns.copy_(returns_KTN)
        self._opened += 1
        self._drawn = 0
        self._mark()

    def _mark(self) -> None:
        self._begin_row.fill_(self._begin)
        self._first_whole.fill_(self._origin + (self.spec.stack - 1 if self._origin else 0))

    def prepare(self, step: int, batch_size: int) -> None:
        """Advance to the next minibatch of the open rollout, with a new order at the start of each epoch."""
        spec = self.spec
        assert self.is_open, "no rollout is open"
        assert self.rows - self.capacity_rows <= self._begin - spec.stack + 1, "the open rollout is overwritten"
        place = self._drawn % self._order.shape[1]
        if place == 0:
            noise = torch.rand(self._order.shape, generator=self._generator, device=spec.device)
            self._order.copy_(noise.argsort(1))
        self._place.fill_(place)
        self._drawn += batch_size

    def draw(self, batch_size: int) -> RolloutBatch:
        spec = self.spec
        index_KB = self._order.index_select(1, self._place + torch.arange(batch_size, device=spec.device))
        row_KB, env_KB = self._begin_row + index_KB // spec.num_envs, index_KB % spec.num_envs
        return self.gather(row_KB, env_KB, torch.ones(row_KB.shape, device=spec.device))

    def gather(self, row_KB: torch.Tensor, env_KB: torch.Tensor, weight_KB: torch.Tensor) -> RolloutBatch:
        """Steps at given rows of the open rollout and environments (int64 `[K, B]`)."""
        spec = self.spec
        task_K1 = torch.arange(spec.num_tasks, device=spec.device)[:, None]
        slot_KB = row_KB % self.capacity_rows
        return_KB = self._returns[task_K1, (row_KB - self._begin_row) % spec.rollout_length, env_KB]
        is_invalid_KB = ((self._flags[task_K1, slot_KB, env_KB] & TRUNCATED) != 0) | (row_KB < self._first_whole)
        return RolloutBatch(
            observation=self._stacks(task_K1, row_KB, env_KB),
            action=self._actions[task_K1, slot_KB, env_KB].long(),
            returns=return_KB,
            weight=weight_KB.masked_fill(is_invalid_KB, 0.0),
            index=slot_KB * spec.num_envs + env_KB,
        )

    def restart(self, *, at_last_rollout: bool = False) -> None:
        """Start the next rollout at the next row, or open the newest complete rollout again (to measure the speed of learning)."""
        self._origin = self.rows - (self.spec.rollout_length + 1 if at_last_rollout else 0)
        self._opened = self._drawn = 0
        self._mark()

    # -- state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "origin": self._origin,
            "opened": self._opened,
            "drawn": self._drawn,
            "returns": self._returns.clone(),
            "order": self._order.clone(),
        }

    def load_state_dict(self, state: dict[str, Any], rows_restored: bool) -> None:
        """Restore a state. Without its rows a new rollout begins.

        Raises:
            ValueError: the state has another capacity.
        """
        super().load_state_dict(state, rows_restored)
        self.restart()
        if rows_restored:
            self._origin, self._opened, self._drawn = int(state["origin"]), int(state["opened"]), int(state["drawn"])
            self._returns.copy_(state["returns"])
            self._order.copy_(state["order"])
        self._mark()
