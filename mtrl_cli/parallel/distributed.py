"""Data-parallel ranks: several processes that train one network, and the exchanges between them.

All ranks call each exchanging method in the same order. Sums of floating-point numbers are bit-identical on all ranks, so networks with
equal parameters stay equal.

Objects and signals go over gloo on the CPU, where an exchange fails at once if a rank is lost. Tensors on a GPU go over NCCL, where
an exchange waits for a lost rank forever. Therefore the processes of one machine also watch each other.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mtrl_cli.errors import RanksLost, RunError, UserError, first_line, print_error
from mtrl_cli.parallel.torchrun import Place

NO_TIMEOUT = timedelta(days=365)  # the other ranks wait during an evaluation, which may take hours
START_TIMEOUT = timedelta(minutes=10)
GRACE_SECONDS = 15.0
"""Time in which an exchange with a lost rank may fail, before the watching thread ends the process."""
DIAGNOSIS_SECONDS = 3.0
"""Time to find out which rank was lost, and why."""
_FAILURE = "mtrl/failure"


class Ranks:
    """The ranks of a run, seen from this process. This class is a single rank, for which every exchange is the identity.

    Attributes:
        place: rank and world size of this process.
        rank, size: rank and world size, as in `place`.
        is_first: whether this rank prints output and writes files.
        at_loss: called with the error line before the process is ended because of a lost rank; returns whether this rank prints the line.
    """

    def __init__(self, place: Place | None = None):
        self.place = place or Place()
        self.rank = self.place.rank
        self.size = self.place.size
        self.is_first = self.place.is_first
        self.at_loss: Callable[[str], bool] = lambda line: self.is_first

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the process group."""

    def share(self, key: str, number: int) -> int:
        """Return the value of a configuration key, divided by the number of ranks.

        Raises:
            UserError: the number of ranks does not divide the value.
        """
        if number % self.size:
            raise UserError(f"{key} must be a multiple of the number of ranks ({self.size}), got {number}")
        return number // self.size

    def label(self, purpose: str) -> str:
        """Return the label of a random stream, different on each rank. The first rank's label is that of a single process."""
        return purpose if self.is_first else f"{purpose}, rank {self.rank}"

    # -- tensors --------------------------------------------------------------------------------------------------------------

    def use(self, device: torch.device) -> None:
        """Set the device of exchanged tensors. Called once, before the first exchange of tensors."""

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors of one dtype and device by their means over ranks, in one all-reduce."""

    def joined(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate equally shaped tensors of all ranks along a dimension, in rank order."""
        return tensor

    def agreed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Broadcast the first rank's tensor. Values may differ between ranks; shape and dtype must be equal."""
        return tensor

    # -- objects --------------------------------------------------------------------------------------------------------------

    def total(self, array: Any) -> Any:
        """Sum a numpy array over ranks."""
        return array

    def largest(self, number: int) -> int:
        """Return the maximum over ranks."""
        return number

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value; the values of other ranks are ignored."""
        return value

    def gather(self, data: bytes) -> list[bytes]:
        """Return the data of ranks 1, 2, … on the first rank, and an empty list on the others."""
        return []

    def together(self) -> AbstractContextManager[None]:
        """Return a context for work without exchanges, in which one rank's UserError or RunError is raised on all ranks.

        Raises:
            UserError, RunError: the error of the first rank that failed.
        """
        return nullcontext()

    def wait(self) -> None:
        """Wait for all ranks (a barrier)."""


ALONE = Ranks()


def meet(place: Place) -> Ranks:
    """Connect to the other ranks that torchrun started.

    Raises:
        RunError: the ranks cannot connect.
    """
    return ALONE if place.size == 1 else TorchRanks(place)


class TorchRanks(Ranks):
    """Several ranks, connected by torch.distributed. Addresses are read from torchrun's environment variables.

    Raises:
        RunError: the ranks cannot connect.
    """

    def __init__(self, place: Place):
        super().__init__(place)
        try:
            self._store = next(iter(dist.rendezvous("env://", place.rank, place.size, timeout=START_TIMEOUT)))[0]
            store = dist.PrefixStore("mtrl/groups", self._store)
            dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=NO_TIMEOUT)
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"rank {place.rank} cannot connect to the other ranks: {first_line(error)}") from None
        self._tensors: dist.ProcessGroup | None = None  # None: the default group, gloo
        self._left = threading.Event()
        self._peers = self._open_peers()
        self._watching = threading.Thread(target=self._watch, name="rank watchdog", daemon=True)
        self._watching.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._watching.join()
        if isinstance(error, Exception) and not isinstance(error, RanksLost):
            with suppress(RuntimeError):  # the other ranks read the reason here as soon as this rank is gone
                self._store.compare_set(_FAILURE, "", f"rank {self.rank} has failed: {first_line(error)}")
        for fd in self._peers.values():
            os.close(fd)
        with suppress(RuntimeError):
            dist.destroy_process_group()

    # -- tensors --------------------------------------------------------------------------------------------------------------

    def use(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with self._exchange():
                self._tensors = dist.new_group(backend="nccl", timeout=NO_TIMEOUT)

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with self._exchange():
            dist.all_reduce(flat, group=self._tensors)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))

    def joined(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(parts, tensor.contiguous(), group=self._tensors)
        return torch.cat(parts, dim)

    def agreed(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._exchange():
            dist.broadcast(tensor, 0, group=self._tensors)
        return tensor

    # -- objects --------------------------------------------------------------------------------------------------------------

    def total(self, array: Any) -> Any:
        summed = torch.as_tensor(array).clone()
        with self._exchange():
            dist.all_reduce(summed)
        return summed.numpy()

    def largest(self, number: int) -> int:
        tensor = torch.tensor(int(number))  # gloo has no bool
        with self._exchange():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def from_first(self, value: Any) -> Any:
        values = [value if self.is_first else None]
        with self._exchange():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def gather(self, data: bytes) -> list[bytes]:
        received: list[Any] | None = [None] * self.size if self.is_first else None
        with self._exchange():
            dist.gather_object(data, received)
        return received[1:] if received else []

    @contextmanager
    def together(self) -> Iterator[None]:
        mine: UserError | RunError | None = None
        try:
            yield
        except (UserError, RunError) as error:
            mine = error
        errors = self._of_all(mine and (isinstance(mine, UserError), str(mine)))
        first = next((rank for rank, error in enumerate(errors) if error), None)
        if first is None:
            return
        if mine is not None and first == self.rank:
            raise mine
        is_users, line = errors[first]
        raise (UserError if is_users else RunError)(line if first == 0 else f"rank {first}: {line}")

    def wait(self) -> None:
        with self._exchange():
            dist.barrier()

    def _of_all(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        values: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value)
        return values

    # -- lost ranks -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Raise RanksLost where an exchange fails because a rank is gone."""
        try:
            yield
        except RuntimeError:
            raise RanksLost(self._describe_loss()) from None

    def _describe_loss(self) -> str:
        until = time.monotonic() + DIAGNOSIS_SECONDS
        while time.monotonic() < until:
            with suppress(RuntimeError):
                if self._store.check([_FAILURE]):
                    return self._store.get(_FAILURE).decode(errors="replace")
            if gone := self._gone(wait=0.1):  # a process closes its connections before it ends
                return f"rank {gone[0]} of {self.size} is gone (killed, perhaps because memory ran out)"
        return f"a rank of {self.size} does not respond"

    def _open_peers(self) -> dict[int, int]:
        """Open a pidfd for each other rank on this machine; returns an empty dict where the system has no pidfds."""
        host = socket.gethostname()
        peers: dict[int, int] = {}
        for rank, (its_host, pid) in enumerate(self._of_all((host, os.getpid()))):
            if rank != self.rank and its_host == host and hasattr(os, "pidfd_open"):
                with suppress(OSError):
                    peers[rank] = os.pidfd_open(pid)
        return peers

    def _gone(self, wait: float = 0.0) -> list[int]:
        """Return the ranks of this machine that have ended, or end within `wait` seconds."""
        watch = select.poll()
        for fd in self._peers.values():
            watch.register(fd, select.POLLIN)
        ended = {fd for fd, _ in watch.poll(wait * 1000)}
        return [rank for rank, fd in self._peers.items() if fd in ended]

    def _watch(self) -> None:
        """End this process if a peer is gone and no exchange fails, as on a GPU, where an exchange waits for the peer."""
        while not self._left.wait(1.0):
            if self._gone():
                if self._left.wait(GRACE_SECONDS):
                    return
                line = self._describe_loss()
                if self.at_loss(line):
                    print_error(line)
                os._exit(RunError.exit_code)
