"""Functions over fixed tensors, recorded once as CUDA graphs and then launched as a whole.

What is recorded reads and writes tensors that stay where they are: whatever changes from call to call lies in such tensors, and nothing
of it in Python's own numbers. A few parts need the host in between (`on_host`): there the record is split, with one synchronisation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

import torch

Result = TypeVar("Result")
HostFunction = Callable[[torch.Tensor], torch.Tensor]

WARM_UP = 3
"""Calls that are made one operation at a time before a function is recorded: libraries set themselves up, and first calls may differ."""


class Recorder(Protocol):
    """Takes note of what is done on a device, in order, to do it again."""

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Call a function as it is, where it will be recorded."""

    def record(self, function: Callable[[], Result]) -> Result:
        """Take note of all that a function does. Its results, once `replay` has been called, hold what it would have returned."""

    def replay(self) -> None:
        """Do all of it again, on the same tensors."""

    def host(self, tensor: torch.Tensor, function: HostFunction, like: torch.Tensor) -> torch.Tensor:
        """While recording: see `on_host`."""


_recording: list[Recorder] = []


def on_host(tensor: torch.Tensor, function: HostFunction, like: torch.Tensor) -> torch.Tensor:
    """What a function on the host makes of a tensor, back on the tensor's device.

    Args:
        tensor: on any device; the function is given it on the CPU.
        function: is called anew each time that a record is replayed.
        like: of the result's shape and dtype.
    """
    if _recording:
        return _recording[-1].host(tensor, function, like)
    return function(tensor.cpu()).to(like)


class Captured(Generic[Result]):
    """A function without arguments, recorded at a later call and replayed from then on.

    Args:
        function: works on fixed tensors; what it returns is a tensor, a tuple of them, or nothing.
        recorder: makes what makes the record, at the first call.
        warm_up: how many calls are made as they are before.
    """

    def __init__(self, function: Callable[[], Result], recorder: Callable[[], Recorder], warm_up: int = WARM_UP):
        self._function, self._make_recorder, self._left = function, recorder, warm_up
        self._recorder: Recorder | None = None
        self._recorded = False
        self._result: Result

    def __call__(self) -> Result:
        """What the function returns; once it is recorded, in the same tensors each time."""
        if self._recorder is None:
            self._recorder = self._make_recorder()
        if self._left > 0:
            self._left -= 1
            return self._recorder.warm_up(self._function)
        if not self._recorded:
            with _as_recorder(self._recorder):
                self._result = self._recorder.record(self._function)
            self._recorded = True
        self._recorder.replay()
        return self._result


@contextmanager
def _as_recorder(recorder: Recorder) -> Iterator[None]:
    _recording.append(recorder)
    try:
        yield
    finally:
        _recording.pop()


def generators_of(*parts: Any) -> list[torch.Generator]:
    """The random generators among the parts' attributes, which a graph must know of."""
    return [value for part in parts for value in vars(part).values() if isinstance(value, torch.Generator)]


class CudaGraphs:
    """A `Recorder` of one CUDA graph, or of several with the host's work between them. All share one pool of memory.

    Args:
        device: a GPU.
        generators: all that the function draws from.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]):
        self._device, self._generators = device, [each for each in generators if each.device.type == "cuda"]
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps: list[Callable[[], None]] = []

    def warm_up(self, function: Callable[[], Result]) -> Result:
        # On the stream of the record: autograd remembers on which one a parameter's gradient was first made.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Result]) -> Result:
        torch.cuda.synchronize(self._device)
        gc.collect()  # what is freed while recording would be freed in each replay
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            self._begin()
            try:
                result = function()
            except BaseException:
                with suppress(RuntimeError):  # a record that failed cannot be ended well; what failed is what to tell
                    self._end()
                raise
            self._end()
            return result

    def replay(self) -> None:
        for step in self._steps:
            step()

    def host(self, tensor: torch.Tensor, function: HostFunction, like: torch.Tensor) -> torch.Tensor:
        self._end()
        with torch.cuda.stream(torch.cuda.default_stream(self._device)):  # outside of the graphs' pool: it stays
            result = torch.empty(like.shape, dtype=like.dtype, device=self._device)

        def step() -> None:
            result.copy_(function(tensor.cpu()), non_blocking=True)

        self._steps.append(step)
        self._begin()
        return result

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            self._graph.register_generator_state(generator)
        # Only this thread's doings count: others (a display, a writer) may go on.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        assert self._graph is not None, "nothing is being recorded"
        self._graph.capture_end()
        self._steps.append(self._graph.replay)
        self._graph = None
