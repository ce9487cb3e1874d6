"""CPU stand-in for CUDA graphs: record the operations of a function with their tensors once, then replay them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from mtrl_cli.machine.cuda_graphs import HostFunction

Result = TypeVar("Result")


class RecordedOperations:
    """A `mtrl_cli.machine.cuda_graphs.Recorder`.

    As with a graph, Python numbers keep their recorded values, and synchronizing with the device is refused.
    Unlike a graph, recording already executes the first replay.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[dict[int, Any]], None]] = []
        self._kept: list[Any] = []  # keeps tensors alive, so that ids stay unique
        self._result: Any = None
        self._fresh = True

    def warm_up(self, function: Callable[[], Result]) -> Result:
        return function()

    def record(self, function: Callable[[], Result]) -> Result:
        with _RecordingMode(self):
            self._result = function()
        return self._result  # type: ignore[no-any-return]

    def replay(self) -> None:
        if self._fresh:
            self._fresh = False
            return
        made: dict[int, Any] = {}
        with torch.no_grad():
            for step in self._steps:
                step(made)
            for result in tree_flatten(self._result)[0]:
                if id(result) in made:
                    result.copy_(made[id(result)])

    def note(self, operation: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record an executed operation."""
        if operation is torch.ops.aten._local_scalar_dense.default or operation is torch.ops.aten.nonzero.default:
            raise AssertionError(f"{operation} would synchronize with the device")
        self._kept.append((args, kwargs, out))

        def replay_operation(made: dict[int, Any]) -> None:
            given = tree_map(lambda each: made.get(id(each), each), (args, kwargs))
            results = operation(*given[0], **given[1])
            for then, now in zip(tree_flatten(out)[0], tree_flatten(results)[0], strict=True):
                if isinstance(then, torch.Tensor):
                    made[id(then)] = now

        self._steps.append(replay_operation)

    def host(self, tensor: torch.Tensor, function: HostFunction, like: torch.Tensor) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            result = torch.empty_like(like)
        self._kept.append((tensor, result))

        def call_host(made: dict[int, Any]) -> None:
            result.copy_(function(made.get(id(tensor), tensor)))

        with torch.utils._python_dispatch._disable_current_modes():
            call_host({})
        self._steps.append(call_host)
        return result


class _RecordingMode(TorchDispatchMode):
    def __init__(self, record: RecordedOperations):
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._record.note(func, args, kwargs or {}, out)
        return out
