"""The rank of this process and the number of ranks, as torchrun sets them in the environment. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mtrl_cli.errors import UserError

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Rank and world size of a process.

    Attributes:
        rank, size: rank, counted from 0, and world size.
        local_rank, local_size: rank among, and number of, the ranks on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank prints output and writes files."""
        return self.rank == 0


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return the rank and world size of this process: rank 0 of 1 without torchrun.

    Raises:
        UserError: a variable has an impossible value.
    """
    if any(name not in environment for name in REQUIRED):
        return Place()
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank, local_size = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        rank, size, local_rank, local_size = -1, 0, 0, 0
    if not (0 <= local_rank < local_size <= size and 0 <= rank < size):
        given = ", ".join(f"{name}={environment.get(name)}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        raise UserError(f"{given} is not a valid rank. Start the ranks with torchrun --nproc-per-node=2 -m mtrl_cli train …")
    return Place(rank, size, local_rank, local_size)


def command(ranks: int, arguments: str) -> str:
    """Return the shell command that runs mtrl on this number of ranks of one machine."""
    return f"mtrl {arguments}" if ranks == 1 else f"torchrun --nproc-per-node={ranks} -m mtrl_cli {arguments}"
