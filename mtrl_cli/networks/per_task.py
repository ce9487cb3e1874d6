"""Several modules of one structure, or one per task, evaluated at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call, vmap


class TaskOwned:
    """Marks a module whose own parameters are stacked by task: row k of each is reached by task k's loss alone, by no other task's.

    Attributes:
        sizes: each task's number of parameters, without padding.
    """

    sizes: list[int]


class Stacked(nn.Module):
    """M modules of one structure with parameters of their own, as one module over stacked parameters.

    The modules may differ in the sizes of their inputs: their parameters are then padded with zeros to the widest. Padded
    inputs are zero, so the padding neither adds to an output nor receives a gradient, and stays zero.

    Args:
        modules: of the same class and layers.

    Attributes:
        sizes: each module's number of parameters, without padding.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
        each = [dict(module.named_parameters()) for module in modules]
        # '.' separates modules in a name; ':' keeps each stacked tensor a plain parameter of this one.
        self.stacked = nn.ParameterDict(
            {name.replace(".", ":"): nn.Parameter(_stack_padded([parameters[name].detach() for parameters in each])) for name in each[0]}
        )
        # In a list, so that it is no submodule: only its structure is used, never its parameters.
        self._structure = [modules[0]]

    def forward(self, x_MB: torch.Tensor) -> torch.Tensor:
        """Inputs `[M, B, ...]` to outputs `[M, B, ...]`, each through its own module, in the dtype of the inputs."""
        if len(self.sizes) == 1:
            return self._only(x_MB[0])
        return vmap(self._call)(self._parameters_in(x_MB.dtype), x_MB)

    def of_one(self, x_B: torch.Tensor) -> torch.Tensor:
        """One input `[B, ...]` through all modules: `[M, B, ...]`, without M copies of it."""
        if len(self.sizes) == 1:
            return self._only(x_B)
        return vmap(self._call, in_dims=(0, None))(self._parameters_in(x_B.dtype), x_B)

    def _parameters_in(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # vmap does not see autocast: what it computes has the dtype of what it is given.
        return {name.replace(":", "."): parameter.to(dtype) for name, parameter in self.stacked.items()}

    def _only(self, x_B: torch.Tensor) -> torch.Tensor:
        parameters = {name: parameter[0] for name, parameter in self._parameters_in(x_B.dtype).items()}
        return self._call(parameters, x_B).unsqueeze(0)

    @property
    def structure(self) -> nn.Module:
        """The module that is called with each task's parameters in turn; hooks on its layers see what `one_by_one` gives them."""
        return self._structure[0]

    def one_by_one(self, x_KB: torch.Tensor) -> torch.Tensor:
        """What `forward` gives, a task after the other: slower, and open to hooks, which see no plain tensors under vmap."""
        parameters = {name.replace(":", "."): parameter.to(x_KB.dtype) for name, parameter in self.stacked.items()}
        return torch.stack([self._call({name: each[k] for name, each in parameters.items()}, x_B) for k, x_B in enumerate(x_KB)])

    def _call(self, parameters: dict[str, torch.Tensor], x_B: torch.Tensor) -> torch.Tensor:
        return functional_call(self._structure[0], parameters, (x_B,))


class PerTask(TaskOwned, Stacked):
    """Stacked modules of which each is one task's own: `[K, B, ...]` to `[K, B, ...]`."""


class TaskVectors(TaskOwned, nn.Module):
    """A learned vector per task.

    Args:
        initial_KV: float32 `[K, V]`.
    """

    def __init__(self, initial_KV: torch.Tensor):
        super().__init__()
        self.sizes = [initial_KV.shape[1]] * len(initial_KV)
        self.vectors = nn.Parameter(initial_KV)

    def forward(self) -> torch.Tensor:
        """The vectors, float32 `[K, V]`."""
        return self.vectors


def parameter_counts(module: nn.Module, num_tasks: int) -> tuple[int, list[int]]:
    """Numbers of a module's parameters, without padding: those that tasks share, and those of each task alone."""
    if isinstance(module, TaskOwned):
        return 0, list(module.sizes)
    if isinstance(module, Stacked):
        return sum(module.sizes), [0] * num_tasks
    shared = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    below = [parameter_counts(child, num_tasks) for child in module.children()]
    own = [sum(sizes) for sizes in zip([0] * num_tasks, *(sizes for _, sizes in below), strict=True)]
    return shared + sum(number for number, _ in below), own


def _stack_padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    widest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = torch.zeros(len(tensors), *widest)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked


class TaskLinear(TaskOwned, nn.Module):
    """A linear layer per task: `[K, B, I]` to `[K, B, O]`, initialised as `nn.Linear` is.

    Args:
        outputs: how many outputs each task uses; rows beyond a task's own are zero and stay unused.
    """

    used_K1O: torch.Tensor

    def __init__(self, inputs: int, outputs: Sequence[int]):
        super().__init__()
        self.sizes = [(inputs + 1) * own for own in outputs]
        bound = 1 / math.sqrt(inputs)
        used = torch.arange(max(outputs)) < torch.tensor(outputs)[:, None]  # [K, O]
        weight = torch.empty(len(outputs), inputs, max(outputs)).uniform_(-bound, bound)
        bias = torch.empty(len(outputs), 1, max(outputs)).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight * used[:, None])
        self.bias = nn.Parameter(bias * used[:, None])
        self.register_buffer("used_K1O", used[:, None], persistent=False)

    def forward(self, x_KBI: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x_KBI, self.weight)

    @torch.no_grad()
    def rescale(self, factor_K: torch.Tensor, offset_K: torch.Tensor) -> None:
        """Change the parameters so that each task's outputs become factor times themselves plus offset, float32 `[K]` each."""
        factor_K11 = factor_K[:, None, None]
        self.weight.mul_(factor_K11)
        self.bias.mul_(factor_K11).add_(offset_K[:, None, None] * self.used_K1O)
