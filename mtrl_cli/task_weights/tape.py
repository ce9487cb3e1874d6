"""One forward and one backward pass for all tasks, kept layer by layer, so that each task's gradient can be told apart afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mtrl_cli.task_weights import layers
from mtrl_cli.task_weights.base import TaskGradients
from mtrl_cli.task_weights.gradients import AutogradGradients, add_gradients

# How well a tape must agree with plain autograd on random samples, parameter by parameter, to be used: rounding is off by less, a layer
# that is used in another way than a tape can tell by much more.
_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.05}


class Tape:
    """What shared layers are given in a forward pass of all tasks, and the gradients that come back to their outputs.

    Zeros that require gradients are added to each layer's output: their gradients are the outputs'. The layers' own parameters
    require none meanwhile, so the backward pass leaves out what will be computed by task.

    Args:
        shared: the layers, each called once in a forward pass, with all tasks' samples in the order of tasks.
        num_tasks: K.
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
        """Leave the layers alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _pass(self, index: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.taps is None or not torch.is_grad_enabled():
            return output
        self.inputs[index] = x.detach()  # without the graph, which would outlive its update
        return output + self.taps[index]

    @contextmanager
    def recording(self, taps: list[torch.Tensor]) -> Iterator[None]:
        """Record the forward pass made inside; `taps`: what `make_taps` gave for as many samples."""
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
        """Zeros like each layer's output when the network is given `observation` (`[K, B, ...]`). They take no memory."""
        outputs: list[torch.Tensor] = []
        handles = [layer.register_forward_hook(lambda _, x, output: outputs.append(output)) for layer in self.shared]
        with torch.no_grad():
            network(observation)
        for handle in handles:
            handle.remove()
        return [output.new_zeros(()).expand(output.shape).requires_grad_() for output in outputs]

    def by_task(self, index: int, tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
        """A layer's input or output, `[K * B, ...]` or `[K, B, ...]`, as `[K, B, ...]`."""
        is_image = isinstance(self.shared[index], nn.Conv2d | nn.GroupNorm)
        split = tensor.dim() > 2 and not is_image and tensor.shape[:2] == (self.num_tasks, batch_size)
        return tensor if split else tensor.unflatten(0, (self.num_tasks, batch_size))


class TapedGradients(TaskGradients):
    """The gradients of tasks from a tape of their joint forward pass: one backward pass serves them all.

    Args:
        loss_KB: float32 `[K, B]`, of a forward pass that was recorded.
        tape: of it.
        taps: the tape's, then.
        shared: parameters that several tasks reach: all those of the tape's layers, in the order of the rows' columns.
        own: parameters whose rows belong to one task each.
        samples: of each task in that forward pass, where they are more than the losses.
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
        self._inputs = [tape.by_task(index, x.detach(), batch_size) for index, x in enumerate(tape.inputs)]
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
        parts = gradient_P.split([parameter.numel() for parameter in self._shared])
        add_gradients(self._shared, [part.view_as(parameter) for part, parameter in zip(parts, self._shared, strict=True)])
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
    """A tape of the network's shared layers, or None where it would not give the tasks' gradients: then they take plain autograd.

    It is tried on random samples rather than declared, so that any torso and sharing structure may come.

    Args:
        network: observations `[K, B, ...]` to values `[K, B, A]`, minus infinity where invalid.
        shared, own: its parameters.
        observation: a few samples of each task, `[K, B, ...]`.
    """
    wanted = {id(parameter) for parameter in shared}
    holders = [module for module in network.modules() if any(id(each) in wanted for each in module.parameters(recurse=False))]
    if not shared or not all(isinstance(module, layers.KINDS) for module in holders):
        return None
    held = [id(parameter) for module in holders for parameter in module.parameters()]
    if sorted(held) != sorted(wanted):
        return None
    num_tasks = observation.shape[0]
    order: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda module, x, output: order.append(module)) for module in holders]
    with torch.no_grad():
        network(observation)
    for handle in handles:
        handle.remove()
    if len(order) != len(holders) or set(map(id, order)) != set(map(id, holders)):
        return None
    tape = Tape(order, num_tasks)
    if not _agrees(tape, network, shared, own, observation):
        tape.close()
        return None
    return tape


def _agrees(tape: Tape, network: nn.Module, shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter], observation: torch.Tensor) -> bool:
    """Whether the tape gives the rows that plain autograd gives."""

    def losses_KB() -> torch.Tensor:
        q_KBA = network(observation)
        # Values differ from each other, so the samples of a task pull in different directions.
        pull_B1 = torch.linspace(-1.0, 1.5, observation.shape[1], device=q_KBA.device)[:, None]
        return (q_KBA.masked_fill(~q_KBA.isfinite(), 0.0) * pull_B1).sum(2)

    # Both draw the same, where the network draws at all (dropout).
    device = observation.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        expected = AutogradGradients(losses_KB().mean(1), shared, own).rows()
        taps = tape.make_taps(network, observation)
        torch.manual_seed(0)
        with tape.recording(taps):
            losses = losses_KB()
    try:
        found = TapedGradients(losses, tape, taps, shared, own).rows()
    except RuntimeError:  # shapes that do not go by task
        return False
    most = max(_AGREEMENT.get(tap.dtype, 0.0) for tap in taps)
    sizes = [parameter.numel() for parameter in shared]
    pairs = zip(found.split(sizes, 1), expected.split(sizes, 1), strict=True)
    return all(bool((mine - other).norm() <= most * other.norm()) for mine, other in pairs)
