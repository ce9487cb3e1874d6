"""What torchrun says of this process: which of how many ranks it is. Read from the environment, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mtrl_cli.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that train together.

    Attributes:
        rank, size: of all, counted from 0.
        local_rank, local_size: of those on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks, and writes what is written once."""
        return self.rank == 0


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place; a process that torchrun did not start is alone.

    Raises:
        UserError: the variables make no sense.
    """
    if any(name not in environment for name in NEEDED):
        return Place()
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank, local_size = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        rank, size, local_rank, local_size = -1, 0, 0, 0
    if not (0 <= local_rank < local_size <= size and 0 <= rank < size):
        given = ", ".join(f"{name}={environment.get(name)}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        raise UserError(f"{given}: expected what torchrun sets; start ranks with torchrun --nproc-per-node=2 -m mtrl_cli train …")
    return Place(rank, size, local_rank, local_size)


def command(ranks: int, words: str) -> str:
    """The command line of mtrl that starts so many ranks on one machine."""
    return f"mtrl {words}" if ranks == 1 else f"torchrun --nproc-per-node={ranks} -m mtrl_cli {words}"
