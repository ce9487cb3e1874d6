"""Record functions as CUDA graphs once and then replay them.

A recorded function reads and writes tensors with fixed addresses. All values that change between calls are in such tensors, never in
Python numbers. Computations on the host (`on_host`) split a recording into several graphs, with one synchronization each.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import torch

Result = TypeVar("Result")
HostFunction = Callable[[torch.Tensor], torch.Tensor]

WARM_UP = 3
"""Eager calls before a function is recorded, because libraries are initialized in the first calls."""


class Recorder(Protocol):
    """Records operations on a device and replays them in order."""

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Call a function eagerly, on the stream of the recording."""

    def record(self, function: Callable[[], Result]) -> Result:
        """Record all operations of a function. Its results are valid after `replay`."""

    def replay(self) -> None:
        """Run the recorded operations on the same tensors."""

    def host(self, tensor: torch.Tensor, function: HostFunction, like: torch.Tensor) -> torch.Tensor:
        """See `on_host`. Called while recording."""


_recording: list[Recorder] = []


def on_host(tensor: torch.Tensor, function: HostFunction, like: torch.Tensor) -> torch.Tensor:
    """Compute a function of a tensor on the host, and copy the result to the device of the tensor.

    Args:
        tensor: tensor on any device; the function receives a copy on the CPU.
        function: function on the CPU, called again in every replay of a recording.
        like: tensor with the shape and dtype of the result.
    """
    if _recording:
        return _recording[-1].host(tensor, function, like)
    return function(tensor.cpu()).to(like)


class Captured(Generic[Result]):
    """A function without arguments that is recorded after some eager calls, and replayed in every later call.

    Args:
        function: function that reads and writes tensors with fixed addresses, and returns a tensor, a tuple of tensors, or None.
        recorder: function that makes the recorder, called once.
        warm_up: number of eager calls.
    """

    def __init__(self, function: Callable[[], Result], recorder: Callable[[], Recorder], warm_up: int = WARM_UP):
        self._function, self._make_recorder, self._left = function, recorder, warm_up
        self._recorder: Recorder | None = None
        self._recorded = False
        self._result: Result

    def __call__(self) -> Result:
        """Return the result of the function. After the recording, every call returns the same tensors."""
        if self._recorder is None:
            self._recorder = self._make_recorder()
        if self._left > 0:
            self._left -= 1
            return self._recorder.warm_up(self._function)
        if not self._recorded:
            _recording.append(self._recorder)
            try:
                self._result = self._recorder.record(self._function)
            finally:
                _recording.pop()
            self._recorded = True
        self._recorder.replay()
        return self._result


def generators_of(*parts: Any) -> list[torch.Generator]:
    """Return the random generators among the attributes of `parts`, which must be registered with a graph."""
    return [value for part in parts for value in vars(part).values() if isinstance(value, torch.Generator)]


class CudaGraphs:
    """A `Recorder` of one CUDA graph, or of several graphs with computations on the host between them. All graphs share one memory pool.

    Args:
        device: a GPU.
        generators: random generators that the function uses.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]):
        self._device, self._generators = device, [each for each in generators if each.device.type == "cuda"]
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps: list[Callable[[], None]] = []

    def warm_up(self, function: Callable[[], Result]) -> Result:
        # The stream must be that of the recording, because autograd keeps the stream on which a gradient is first computed.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Result]) -> Result:
        torch.cuda.synchronize(self._device)
        gc.collect()  # memory freed while recording would be freed in each replay
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            self._begin()
            try:
                result = function()
            except BaseException:
                with suppress(RuntimeError):  # ending a failed recording fails, too; raise the first error
                    self._end()
                raise
            self._end()
            return result

    def replay(self) -> None:
        for step in self._steps:
            step()

    def host(self, tensor: torch.Tensor, function: HostFunction, like: torch.Tensor) -> torch.Tensor:
        self._end()
        with torch.cuda.stream(torch.cuda.default_stream(self._device)):  # not in the graphs' memory pool, which would reuse the memory
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
        # Other threads (a display, a writer) may call CUDA meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        assert self._graph is not None, "nothing is being recorded"
        self._graph.capture_end()
        self._steps.append(self._graph.replay)
        self._graph = None
