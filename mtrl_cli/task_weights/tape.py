"""Tape of one forward and one backward pass for all tasks, from which the gradient of each task is computed layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mtrl_cli.machine import rng
from mtrl_cli.task_weights import layers
from mtrl_cli.task_weights.base import TaskGradients
from mtrl_cli.task_weights.gradients import AutogradGradients, add_gradients, split_like

# Largest relative difference per parameter between a tape and plain autograd on random samples. Rounding errors are smaller. A layer that
# is used in a way that the tape does not support differs by much more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


class Tape:
    """Inputs of shared layers in a forward pass of all tasks, and gradients of the losses in the outputs of the layers.

    Zeros that require gradients ("taps") are added to the output of each layer. Their gradients are the gradients in the output. During
    the recording, the parameters of the layers require no gradients, so the backward pass skips work that is done per task afterwards.

    Args:
        shared: shared layers. A forward pass calls each once, with the samples of all tasks in order.
        num_tasks: K.

    Attributes:
        inputs: input of each layer in the last recorded pass.
        taps: taps of the pass that is recorded now; None outside `recording`.
    """

    def __init__(self, shared: Sequence[nn.Module], num_tasks: int):
        self.shared, self.num_tasks = list(shared), num_tasks
        self.inputs: list[torch.Tensor] = [torch.empty(0) for _ in shared]
        self.taps: list[torch.Tensor] | None = None
        self._parameters = [parameter for layer in shared for parameter in layer.parameters()]
        self._hooks = [
            layer.register_forward_hook(lambda _, x, output, index=index: self._pass(index, x[0], output))
            for index, layer in enumerate(self.shared)
        ]

    def close(self) -> None:
        """Remove the hooks from the layers."""
        for hook in self._hooks:
            hook.remove()

    def _pass(self, index: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.taps is None or not torch.is_grad_enabled():
            return output
        self.inputs[index] = x.detach()  # detached, so that the graph does not outlive its update
        return output + self.taps[index]

    @contextmanager
    def recording(self, taps: list[torch.Tensor]) -> Iterator[None]:
        """Record the forward pass inside the context, with `taps` from `make_taps` for the same number of samples."""
        self.taps = taps
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self.taps = None
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    def make_taps(self, network: nn.Module, observation: torch.Tensor) -> list[torch.Tensor]:
        """Make zeros in the shape of each layer's output for `observation` (`[K, B, ...]`). The zeros need no memory."""
        outputs = [output for _, output in _calls(network, self.shared, observation)]
        return [output.new_zeros(()).expand(output.shape).requires_grad_() for output in outputs]

    def by_task(self, index: int, tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Input or output of a layer, `[K * B, ...]` or `[K, B, ...]`, as `[K, B, ...]`."""
        is_image = isinstance(self.shared[index], nn.Conv2d | nn.GroupNorm)
        split = tensor.dim() > 2 and not is_image and tensor.shape[:2] == (self.num_tasks, batch_size)
        return tensor if split else tensor.unflatten(0, (self.num_tasks, batch_size))


class TapedGradients(TaskGradients):
    """Gradients of tasks from the tape of their common forward pass, with one backward pass for all.

    Args:
        loss_KB: float32 `[K, B]`, of the recorded forward pass.
        tape: tape of that pass.
        taps: taps of that pass.
        shared: all parameters of the tape's layers, in the order of the rows' columns.
        own: parameters whose rows belong to one task each.
        samples: samples of each task in the forward pass, if more than losses.
    """

    def __init__(
        self,
        loss_KB: torch.Tensor,
        tape: Tape,
        taps: Sequence[torch.Tensor],
        shared: Sequence[nn.Parameter],
        own: Sequence[nn.Parameter],
        *,
        samples: int | None = None,
    ):
        loss_K, batch_size = loss_KB.mean(1), samples or loss_KB.shape[1]
        self.loss_K = loss_K.detach()
        self._tape, self._shared, self._own = tape, list(shared), list(own)
        gradients = torch.autograd.grad(loss_K.sum(), [*taps, *own], materialize_grads=True)
        self._outputs = [tape.by_task(index, gradient, batch_size) for index, gradient in enumerate(gradients[: len(taps)])]
        self._inputs = [tape.by_task(index, x, batch_size) for index, x in enumerate(tape.inputs)]
        self._of_own = gradients[len(taps) :]
        self._rows: dict[int, layers.Rows] = {}

    def gram(self) -> torch.Tensor:
        gram_KK = torch.zeros((len(self.loss_K), len(self.loss_K)), device=self.loss_K.device)
        for index, layer in enumerate(self._tape.shared):
            quick = layers.linear_gram(layer, self._inputs[index], self._outputs[index]) if isinstance(layer, nn.Linear) else None
            if quick is not None:
                gram_KK = gram_KK + quick
            else:
                for row in self._rows_of(index).values():
                    gram_KK = gram_KK + row.flatten(1) @ row.flatten(1).T
        return gram_KK

    def rows(self) -> torch.Tensor:
        of_parameter = {
            id(getattr(layer, name)): row.flatten(1)
            for index, layer in enumerate(self._tape.shared)
            for name, row in self._rows_of(index).items()
        }
        return torch.cat([of_parameter[id(parameter)] for parameter in self._shared], 1)

    def _rows_of(self, index: int) -> layers.Rows:
        if index not in self._rows:
            self._rows[index] = layers.rows(self._tape.shared[index], self._inputs[index], self._outputs[index])
        return self._rows[index]

    def weigh(self, weight_K: torch.Tensor) -> None:
        self._combine_shared(weight_K)
        add_gradients(self._own, [gradient * weight_K.view(-1, *(1,) * (gradient.dim() - 1)) for gradient in self._of_own])

    def combine(self, weight_K: torch.Tensor) -> None:
        self._combine_shared(weight_K)
        self._add_own()

    def replace(self, gradient_P: torch.Tensor) -> None:
        add_gradients(self._shared, split_like(gradient_P, self._shared))
        self._add_own()

    def _combine_shared(self, weight_K: torch.Tensor) -> None:
        for index, layer in enumerate(self._tape.shared):
            if isinstance(layer, nn.Linear) and index not in self._rows:
                sums = layers.linear_combination(layer, self._inputs[index], self._outputs[index], weight_K)
            else:
                sums = {name: (weight_K @ row.flatten(1)).view(row.shape[1:]) for name, row in self._rows_of(index).items()}
            add_gradients([getattr(layer, name) for name in sums], list(sums.values()))

    def _add_own(self) -> None:
        add_gradients(self._own, [gradient / len(self.loss_K) for gradient in self._of_own])


def tape_for(network: nn.Module, shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter], observation: torch.Tensor) -> Tape | None:
    """Make a tape of the network's shared layers, or return None if it would not give the gradients of the tasks.

    The tape is tested on random samples, so any torso and sharing structure may be used without declaring support.

    Args:
        network: observations `[K, B, ...]` to values `[K, B, A]`, minus infinity for invalid actions.
        shared, own: parameters of the network.
        observation: a few samples of each task, `[K, B, ...]`.
    """
    wanted = {id(parameter) for parameter in shared}
    holders = [module for module in network.modules() if any(id(each) in wanted for each in module.parameters(recurse=False))]
    if not shared or not all(isinstance(module, layers.KINDS) for module in holders):
        return None
    held = [id(parameter) for module in holders for parameter in module.parameters()]
    order = [module for module, _ in _calls(network, holders, observation)]
    if sorted(held) != sorted(wanted) or sorted(map(id, order)) != sorted(map(id, holders)):
        return None
    tape = Tape(order, observation.shape[0])
    if not _agrees(tape, network, shared, own, observation):
        tape.close()
        return None
    return tape


def _calls(network: nn.Module, watched: Sequence[nn.Module], observation: torch.Tensor) -> list[tuple[nn.Module, torch.Tensor]]:
    """Calls of the watched modules in a forward pass without gradients, in order, with their outputs."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    handles = [module.register_forward_hook(lambda module, x, output: calls.append((module, output))) for module in watched]
    with torch.no_grad():
        network(observation)
    for handle in handles:
        handle.remove()
    return calls


def _agrees(tape: Tape, network: nn.Module, shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter], observation: torch.Tensor) -> bool:
    """Whether the tape gives the same rows as plain autograd."""

    def losses_KB() -> torch.Tensor:
        q_KBA = network(observation)
        # Different factors, so that the gradients of a task's samples point in different directions.
        factor_B1 = torch.linspace(-1.0, 1.5, observation.shape[1], device=q_KBA.device)[:, None]
        return (q_KBA.masked_fill(~q_KBA.isfinite(), 0.0) * factor_B1).sum(2)

    # The same seed for both, in case the network has dropout.
    with rng.kept(observation.device):
        torch.manual_seed(0)
        expected = AutogradGradients(losses_KB().mean(1), shared, own).rows()
        taps = tape.make_taps(network, observation)
        torch.manual_seed(0)
        with tape.recording(taps):
            losses = losses_KB()
    try:
        found = TapedGradients(losses, tape, taps, shared, own).rows()
    except RuntimeError:  # shapes without a task dimension
        return False
    most = max(_TOLERANCE.get(tap.dtype, 0.0) for tap in taps)
    sizes = [parameter.numel() for parameter in shared]
    pairs = zip(found.split(sizes, 1), expected.split(sizes, 1), strict=True)
    return all(bool((mine - other).norm() <= most * other.norm()) for mine, other in pairs)
