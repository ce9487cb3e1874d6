"""Rollouts: the newest steps of all environments, learned from a few times and then forgotten."""

from __future__ import annotations

from typing import Any

import torch

from mtrl_cli.replay.buffers import TERMINATED, TRUNCATED, Batch, Replay, ReplaySpec

# A loop that plays ahead of its learner may have added this many rows more.
_SPARE_ROWS = 2


class Rollouts(Replay):
    """Stretches of T steps of every environment, one after the other, each with a return per step (Gallici et al. 2024, "PQN").

    A rollout of rows r to r + T - 1 is complete when row r + T is stored: its value is what the last step bootstraps from. While the next
    one is played, the last complete one is *open*: it has been given its returns, and `draw` goes through its steps, epoch by epoch,
    each task in an order of its own.

    A sample is a step and its return, in the place of a reward after which nothing is bootstrapped. Truncated steps have no return, and
    the first steps after a start without rows have no whole stack of frames: these are samples of weight 0.

    Raises:
        ValueError: the agent does not learn from rollouts.
    """

    from_rollouts = True
    capturable = True

    @classmethod
    def fixed_capacity(cls, spec: ReplaySpec) -> int | None:
        """Room for the rollout that is learned from, with the stacks of its first steps, and for the one that is played meanwhile."""
        return (2 * spec.rollout_length + spec.stack + _SPARE_ROWS) * spec.num_envs

    @classmethod
    def bytes_per_transition(cls, spec: ReplaySpec) -> int:
        """As every replay's, and a value; of a rollout's steps also returns and places in the order."""
        return super().bytes_per_transition(spec) + 16

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._returns.nbytes + self._order.nbytes

    def __init__(self, spec: ReplaySpec):
        if not spec.rollout_length:
            raise ValueError("replay=rollouts keeps no more than an agent learns from at once: choose an agent that does, agent=pqn")
        super().__init__(spec, self.fixed_capacity(spec) or 0)
        K, T, N = spec.num_tasks, spec.rollout_length, spec.num_envs
        self._values = torch.zeros((K, self.capacity_rows, N), device=spec.device)
        self._returns = torch.zeros((K, T, N), device=spec.device)
        self._order = torch.zeros((K, T * N), dtype=torch.int64, device=spec.device)
        self._origin = 0
        self._opened = 0
        self.drawn = 0  # samples of each task that were drawn of the open rollout
        # What drawing must know, on the device: the open rollout's first row, the first with a whole stack, and the place in the order.
        self._begin_row, self._first_whole, self._place = torch.zeros((3,), dtype=torch.int64, device=spec.device).unbind()

    # -- writing ------------------------------------------------------------------------------------------------------------

    def add(
        self,
        frame: torch.Tensor,
        start: torch.Tensor,
        action: torch.Tensor,
        reward: torch.Tensor,
        terminated: torch.Tensor,
        truncated: torch.Tensor,
        value: torch.Tensor | None = None,
    ) -> None:
        """Append a row, as to every replay. The value is the greedy one of the observation, on the scale of returns, and must be given."""
        assert value is not None, "rollouts need the values of their steps"
        self._values[:, self.rows % self.capacity_rows] = value
        super().add(frame, start, action, reward, terminated, truncated)

    def _stored(self) -> dict[str, torch.Tensor]:
        return super()._stored() | {"values": self._values}

    # -- reading ------------------------------------------------------------------------------------------------------------

    @property
    def _begin(self) -> int:
        """The first row of the open rollout."""
        return self._origin + (self._opened - 1) * self.spec.rollout_length

    @property
    def is_open(self) -> bool:
        """Whether a rollout is open."""
        return self._opened > 0

    @property
    def eligible_rows(self) -> tuple[int, int]:
        """First and one past the last row of the open rollout."""
        return (self._begin, self._begin + self.spec.rollout_length) if self.is_open else (self.rows, self.rows)

    @property
    def ready(self) -> bool:
        """Whether a rollout is complete."""
        return self.rows > self._origin + self.spec.rollout_length

    def next_rollout(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the rollout after the open one: rewards `[K, T, N]` (the game's own) and values `[K, T + 1, N]`, float32;
        terminated and truncated, bool `[K, T, N]`.
        """
        first, T = self._origin + self._opened * self.spec.rollout_length, self.spec.rollout_length
        assert first + T < self.rows, "the rollout is not complete"
        slots = torch.arange(first, first + T + 1, device=self.spec.device) % self.capacity_rows
        flags = self._flags[:, slots[:-1]]
        return self._rewards[:, slots[:-1]], self._values[:, slots], (flags & TERMINATED) != 0, (flags & TRUNCATED) != 0

    def open_next(self, returns_KTN: torch.Tensor) -> None:
        """Open the next rollout, whose steps have these returns (float32 `[K, T, N]`)."""
        self._returns.copy_(returns_KTN)
        self._opened += 1
        self.drawn = 0
        self._mark()

    def _mark(self) -> None:
        self._begin_row.fill_(self._begin)
        self._first_whole.fill_(self._origin + (self.spec.stack - 1 if self._origin else 0))

    def prepare(self, step: int, batch_size: int) -> None:
        """Make ready for the next steps of the open rollout: all are drawn once before any is drawn again, if `batch_size` divides their
        number.
        """
        spec = self.spec
        assert self.is_open, "no rollout is open"
        assert self.rows - self.capacity_rows <= self._begin - spec.stack + 1, "the open rollout is overwritten"
        place = self.drawn % self._order.shape[1]
        if place == 0:
            noise = torch.rand(self._order.shape, generator=self._generator, device=spec.device)
            self._order.copy_(noise.argsort(1))
        self._place.fill_(place)
        self.drawn += batch_size

    def draw(self, batch_size: int) -> Batch:
        spec = self.spec
        index_KB = self._order.index_select(1, self._place + torch.arange(batch_size, device=spec.device))
        row_KB, env_KB = self._begin_row + index_KB // spec.num_envs, index_KB % spec.num_envs
        return self.gather(row_KB, env_KB, torch.ones(row_KB.shape, device=spec.device))

    def gather(self, row_KB: torch.Tensor, env_KB: torch.Tensor, weight_KB: torch.Tensor) -> Batch:
        """The steps at given rows of the open rollout and environments (int64 `[K, B]`)."""
        spec = self.spec
        task_K1 = torch.arange(spec.num_tasks, device=spec.device)[:, None]
        slot_KB = row_KB % self.capacity_rows
        return_KB = self._returns[task_K1, (row_KB - self._begin_row) % spec.rollout_length, env_KB]
        useless_KB = ((self._flags[task_K1, slot_KB, env_KB] & TRUNCATED) != 0) | (row_KB < self._first_whole)
        observation = self._stacks(task_K1, row_KB, env_KB)
        return Batch(
            observation=observation,
            action=self._actions[task_K1, slot_KB, env_KB].long(),
            rewards=return_KB[..., None],
            steps=torch.ones_like(row_KB),
            terminated=torch.ones_like(row_KB, dtype=torch.bool),
            next_observation=observation,
            weight=weight_KB.masked_fill(useless_KB, 0.0),
            index=slot_KB * spec.num_envs + env_KB,
        )

    def again(self) -> None:
        self._origin, self._opened, self.drawn = self.rows - self.spec.rollout_length - 1, 0, 0
        self._mark()

    def restart(self) -> None:
        self._origin, self._opened, self.drawn = self.rows, 0, 0
        self._mark()

    # -- state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "origin": self._origin,
            "opened": self._opened,
            "drawn": self.drawn,
            "returns": self._returns.clone(),
            "order": self._order.clone(),
        }

    def load_state_dict(self, state: dict[str, Any], rows_restored: bool) -> None:
        """Take a state; without its rows a new rollout begins.

        Raises:
            ValueError: the state is of another capacity.
        """
        super().load_state_dict(state, rows_restored)
        self.restart()
        if rows_restored:
            self._origin, self._opened, self.drawn = int(state["origin"]), int(state["opened"]), int(state["drawn"])
            self._returns.copy_(state["returns"])
            self._order.copy_(state["order"])
        self._mark()
