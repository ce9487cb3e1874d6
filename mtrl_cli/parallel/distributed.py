"""Several processes (ranks) that train one network together: what they tell each other. Torch and the standard library only.

Ranks go in step: every method here that exchanges something is called by all of them, in the same order. Sums of floating-point numbers
come out the same, bit by bit, on all ranks, so that networks which began the same stay the same.

Small things and signals go by gloo, on the CPU, where a rank that ends is noticed at once. What is on a GPU goes by nccl, which would wait
for a lost rank for ever: so the processes of one machine also watch each other.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mtrl_cli.errors import RanksLost, RunError, UserError
from mtrl_cli.parallel.torchrun import Place

FOR_EVER = timedelta(days=365)  # an evaluation, for which the others wait, may take hours
MEETING = timedelta(minutes=10)
GRACE_SECONDS = 15.0
"""So long a rank whose peer is gone may take to notice it by itself, before it is ended from beside."""
NAMING_SECONDS = 3.0
"""So long is looked for which rank was lost, and why."""
_FAILURE = "mtrl/failure"


class Ranks:
    """The processes that train together, and this one's place among them: it is alone.

    Attributes:
        place: which it is, and of how many.
        at_loss: called with a line before the process is ended because a rank was lost and it could not notice by itself; whether this
            rank is the one to tell.
    """

    def __init__(self, place: Place | None = None):
        self.place = place or Place()
        self.at_loss: Callable[[str], bool] = lambda line: self.is_first

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks and writes."""
        return self.place.is_first

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Part."""

    def share(self, key: str, number: int) -> int:
        """Each rank's part of a number that a configuration's key holds.

        Raises:
            UserError: it cannot be divided evenly.
        """
        if number % self.size:
            raise UserError(f"{key}={number} cannot be shared evenly by {self.size} ranks: expected a multiple of {self.size}")
        return number // self.size

    def label(self, purpose: str) -> str:
        """A purpose of random numbers, of which each rank has its own; the first rank's are those of a process alone."""
        return purpose if self.is_first else f"{purpose}, rank {self.rank}"

    # -- tensors --------------------------------------------------------------------------------------------------------------

    def use(self, device: torch.device) -> None:
        """Tell, before any tensor is exchanged, which device they are on."""

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor (of one dtype and device) by its mean over ranks, all in one exchange."""

    def joined(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensors of all ranks (of equal shapes) side by side along a dimension, in the order of ranks."""
        return tensor

    def agreed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor (of the same shape and dtype), for what may come out differently."""
        return tensor

    # -- anything else --------------------------------------------------------------------------------------------------------

    def total(self, array: Any) -> Any:
        """The sum over ranks of a numpy array, as a numpy array."""
        return array

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number

    def from_first(self, value: Any) -> Any:
        """The first rank's value, of what JSON knows; the others' is not looked at."""
        return value

    def gather(self, data: bytes) -> list[bytes]:
        """At the first rank, what the ranks after it hand over, in order; at those, nothing."""
        return []

    def together(self) -> AbstractContextManager[None]:
        """A context in which nothing is exchanged, and which all ranks leave in the same way: one rank's error is raised on all.

        Raises:
            UserError, RunError: what the first of those raised that failed.
        """
        return nullcontext()

    def wait(self) -> None:
        """Wait until every rank has come here."""


ALONE = Ranks()


def meet(place: Place) -> Ranks:
    """The ranks that torchrun started, once all are there.

    Raises:
        RunError: they do not find each other.
    """
    return ALONE if place.size == 1 else TorchRanks(place)


class TorchRanks(Ranks):
    """Several processes, by torch.distributed.

    Args:
        place: of this process. Where its peers are found is in the environment that torchrun set.

    Raises:
        RunError: they do not find each other.
    """

    def __init__(self, place: Place):
        super().__init__(place)
        try:
            self._store = next(iter(dist.rendezvous("env://", place.rank, place.size, timeout=MEETING)))[0]
            store = dist.PrefixStore("mtrl/groups", self._store)
            dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=FOR_EVER)
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"rank {place.rank} does not find the other ranks: {_first_line(error)}") from None
        self._tensors: dist.ProcessGroup | None = None  # None: the group of all, by gloo
        self._parted = threading.Event()
        self._peers = self._open_peers()
        self._watching = threading.Thread(target=self._watch, name="watch over ranks", daemon=True)
        self._watching.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._parted.set()
        self._watching.join()
        if isinstance(error, Exception) and not isinstance(error, RanksLost):
            with suppress(RuntimeError):  # for the first rank to tell, which will miss us in a moment
                self._store.compare_set(_FAILURE, "", f"rank {self.rank} has failed: {_first_line(error)}")
        for fd in self._peers.values():
            os.close(fd)
        with suppress(RuntimeError):
            dist.destroy_process_group()

    # -- tensors --------------------------------------------------------------------------------------------------------------

    def use(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with self._noticing():
                self._tensors = dist.new_group(backend="nccl", timeout=FOR_EVER)

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with self._noticing():
            dist.all_reduce(flat, group=self._tensors)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))

    def joined(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._noticing():
            dist.all_gather(parts, tensor.contiguous(), group=self._tensors)
        return torch.cat(parts, dim)

    def agreed(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._noticing():
            dist.broadcast(tensor, 0, group=self._tensors)
        return tensor

    # -- anything else --------------------------------------------------------------------------------------------------------

    def total(self, array: Any) -> Any:
        summed = torch.as_tensor(array).clone()
        with self._noticing():
            dist.all_reduce(summed)
        return summed.numpy()

    def largest(self, number: int) -> int:
        tensor = torch.tensor(int(number))  # gloo knows no bool
        with self._noticing():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def from_first(self, value: Any) -> Any:
        data = json.dumps(value).encode() if self.is_first else b""
        tensor = torch.empty(self.largest(len(data)), dtype=torch.uint8)
        if self.is_first:
            tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        with self._noticing():
            dist.broadcast(tensor, 0)
        return json.loads(tensor.numpy().tobytes())

    def gather(self, data: bytes) -> list[bytes]:
        lengths = self._of_all(len(data))
        if not self.is_first:
            with self._noticing():
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)
            return []
        received = [torch.empty(length, dtype=torch.uint8) for length in lengths[1:]]
        with self._noticing():
            for rank, tensor in enumerate(received, 1):
                dist.recv(tensor, rank)
        return [tensor.numpy().tobytes() for tensor in received]

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        mine: UserError | RunError | None = None
        try:
            yield
        except (UserError, RunError) as error:
            mine = error
        first = next((rank for rank, has in enumerate(self._of_all(mine is not None)) if has), None)
        if first is None:
            return
        line, is_users = self._from(first, [str(mine), isinstance(mine, UserError)])
        if mine is not None and first == self.rank:
            raise mine
        raise (UserError if is_users else RunError)(line if first == 0 else f"rank {first}: {line}")

    def together(self) -> AbstractContextManager[None]:
        return self._failing_together()

    def wait(self) -> None:
        with self._noticing():
            dist.barrier()

    def _of_all(self, number: int) -> list[int]:
        """Every rank's number."""
        numbers = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        with self._noticing():
            dist.all_gather(numbers, torch.tensor(int(number)))
        return [int(each) for each in numbers]

    def _from(self, rank: int, value: Any) -> Any:
        """A rank's value, of what JSON knows."""
        data = json.dumps(value).encode()
        tensor = torch.empty(self._of_all(len(data))[rank], dtype=torch.uint8)
        if self.rank == rank:
            tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        with self._noticing():
            dist.broadcast(tensor, rank)
        return json.loads(tensor.numpy().tobytes())

    # -- ranks that end -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Exchange something: the other side may be gone."""
        try:
            yield
        except RuntimeError:
            raise RanksLost(self._what_was_lost()) from None

    def _what_was_lost(self) -> str:
        until = time.monotonic() + NAMING_SECONDS
        while time.monotonic() < until:
            with suppress(RuntimeError):
                if self._store.check([_FAILURE]):
                    return self._store.get(_FAILURE).decode(errors="replace")
            if gone := self._gone(wait=0.1):  # its connections may be closed before it is gone
                return f"rank {gone[0]} of {self.size} is gone: killed, perhaps for want of memory"
        return f"a rank of {self.size} does not answer any more"

    def _open_peers(self) -> dict[int, int]:
        """A descriptor of the process of each other rank on this machine; none where the system has no such thing."""
        here = [self._from(rank, [socket.gethostname(), os.getpid()]) for rank in range(self.size)]
        peers: dict[int, int] = {}
        if hasattr(os, "pidfd_open"):
            for rank, (host, pid) in enumerate(here):
                if rank != self.rank and host == socket.gethostname():
                    with suppress(OSError):
                        peers[rank] = os.pidfd_open(pid)
        return peers

    def _gone(self, wait: float = 0.0) -> list[int]:
        """The ranks on this machine that have ended, or end in so many seconds."""
        watch = select.poll()
        for fd in self._peers.values():
            watch.register(fd, select.POLLIN)
        ended = {fd for fd, _ in watch.poll(wait * 1000)}
        return [rank for rank, fd in self._peers.items() if fd in ended]

    def _watch(self) -> None:
        """End this process where a peer is gone and nobody here can notice, as all wait for a device or for that peer."""
        while not self._parted.wait(1.0):
            if self._gone():
                if self._parted.wait(GRACE_SECONDS):
                    return
                line = self._what_was_lost()
                if self.at_loss(line):
                    print(f"mtrl: error: {line}", file=sys.stderr, flush=True)
                os._exit(RunError.exit_code)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
