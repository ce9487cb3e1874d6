"""Several modules of one structure, such as one per task, evaluated in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call, vmap

from mtrl_cli.networks.regularised import SpectralLinear, power_step

TORSO_LAYER = "torso_layer"
"""Attribute of a module that holds its layer number in the torso (see `parts.py`)."""

_MAX_LOOP = 8
"""Largest number of modules to call in a loop: longer loops take too long to compile."""


@dataclass(frozen=True)
class Slice:
    """Part of a stacked parameter that belongs to one task.

    Attributes:
        owner: index of the task; None if all tasks share the part.
        name: name that the parameter would have in an unstacked module.
        parameter: name of the stacked parameter in its module.
        index: position of the part in the stacked parameter, without padding; the first element is the row.
    """

    owner: int | None
    name: str
    parameter: str
    index: tuple[int | slice, ...]


class TaskOwned(nn.Module):
    """Module whose parameters are stacked by task: only the loss of task k has a gradient in row k.

    Attributes:
        sizes: number of parameters of each task, without padding.
    """

    sizes: list[int]

    def slices(self) -> Iterator[Slice]:
        """The part of each task in each parameter."""
        names = [name for name, _ in self.named_parameters(recurse=False)]
        return (Slice(task, name, name, (task,)) for task in range(len(self.sizes)) for name in names)


class Stacked(nn.Module):
    """M modules of one structure with different parameters, as one module over stacked parameters.

    The modules may have inputs of different sizes. Their parameters are then padded with zeros to the largest size. As padded inputs are
    zero, padding does not change an output, has no gradient, and stays zero.

    Args:
        modules: modules of the same class with the same layers.

    Attributes:
        sizes: number of parameters of each module, without padding.
        owners: task of each module (None: shared by all tasks); None if no module belongs to a task.
        torso_layers: layer of the torso for each stacked tensor, None for tensors outside the torso (see `parts.py`).
        spectral: names of the layers of `structure` with spectral normalisation.
        structure: module whose layers are called with the parameters of each module.
        one_by_one: whether to call the modules in a loop instead of all at once. A loop is slower, but hooks on the layers of `structure`
            receive plain tensors.
        loops_over_images: whether to call up to 8 modules for images in a loop on a CPU.
    """

    loops_over_images: ClassVar[bool] = False

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.one_by_one = False
        self.owners: list[int | None] | None = None
        # A list hides the module from torch: only its structure is used, never its parameters.
        self._structure = [modules[0]]
        self.spectral = [name for name, module in modules[0].named_modules() if isinstance(module, SpectralLinear)]
        parameters = [dict(module.named_parameters()) for module in modules]
        vectors = [{name: module.get_buffer(name) for name in self._vectors()} for module in modules]
        self.sizes = [sum(parameter.numel() for parameter in each.values()) for each in parameters]
        self._shapes = [
            {name: tensor.shape for name, tensor in (own | extra).items()} for own, extra in zip(parameters, vectors, strict=True)
        ]
        self.stacked = nn.ParameterDict(
            {_key(name): nn.Parameter(_stack_padded([each[name].detach() for each in parameters])) for name in parameters[0]}
        )
        for name in vectors[0]:
            self.register_buffer(_key(name), _stack_padded([each[name] for each in vectors]))
        self.torso_layers: dict[str, int | None] = {
            _key(name): getattr(modules[0].get_submodule(name.rpartition(".")[0]), TORSO_LAYER, None) for name in parameters[0]
        }

    def slices(self) -> Iterator[Slice]:
        """The part of each module in each parameter and in each buffer of spectral normalisation.

        If one owner has several modules, names start with the module's number among them.
        """
        owners: Sequence[int | None] = list(range(len(self._shapes))) if self.owners is None else self.owners
        for m, (owner, shapes) in enumerate(zip(owners, self._shapes, strict=True)):
            prefix = f"{owners[:m].count(owner)}." if owners.count(owner) > 1 else ""
            for name, shape in shapes.items():
                key = _key(name)
                yield Slice(owner, prefix + name, f"stacked.{key}" if key in self.stacked else key, (m, *map(slice, shape)))

    def forward(self, x_MB: torch.Tensor) -> torch.Tensor:
        """Inputs `[M, B, ...]` to outputs `[M, B, ...]`, input m through module m, in the dtype of the inputs."""
        return self._call_each(self._parameters_in(x_MB.dtype), x_MB, len(self.sizes))

    def broadcast(self, x_B: torch.Tensor) -> torch.Tensor:
        """One input `[B, ...]` through all modules, without M copies of it: `[M, B, ...]`."""
        return self._call_each(self._parameters_in(x_B.dtype), x_B, len(self.sizes), in_dim=None)

    def mixed(self, x_KB: torch.Tensor, weight_KM: torch.Tensor) -> torch.Tensor:
        """Inputs `[K, B, ...]` through K modules whose parameters are mixtures of the M stacked sets, in the dtype of the inputs.

        Args:
            x_KB: inputs of each module.
            weight_KM: float32 `[K, M]`, weights of the mixtures.
        """
        # In float32, the dtype of the parameters: under autocast the mixture would be computed from rounded parameters.
        with torch.autocast(x_KB.device.type, enabled=False):
            parameters = {
                name: (weight_KM @ parameter.flatten(1)).unflatten(1, parameter.shape[1:]).to(x_KB.dtype)
                for name, parameter in self._parameters_in(torch.float32).items()
            }
        return self._call_each(parameters, x_KB, len(weight_KM))

    def _parameters_in(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # vmap ignores autocast: results have the dtype of the arguments.
        parameters = {name.replace(":", "."): parameter.to(dtype) for name, parameter in self.stacked.items()}
        return parameters | {name: self.get_buffer(_key(name)) for name in self._vectors()}

    def _vectors(self) -> list[str]:
        """Names in `structure` of the buffers of spectral normalisation."""
        return [f"{name}.{side}" for name in self.spectral for side in ("left", "right")]

    def power_step(self, *, times: int = 1, frozen: bool = False) -> None:
        """Run `regularised.power_step` on all layers with spectral normalisation; skip frozen layers unless `frozen`."""
        for name in map(_key, self.spectral):
            weight = self.stacked[f"{name}:weight"]
            if frozen or weight.requires_grad:
                power_step(weight, self.get_buffer(f"{name}:left"), self.get_buffer(f"{name}:right"), times=times)

    @property
    def structure(self) -> nn.Module:
        return self._structure[0]

    def _call_each(self, parameters: dict[str, torch.Tensor], x: torch.Tensor, number: int, in_dim: int | None = 0) -> torch.Tensor:
        """Call `structure` with each set of parameters `[number, ...]` on its input, or on one common input (`in_dim` None)."""
        is_faster_looped = self.loops_over_images and x.device.type == "cpu" and x.dim() == 5 and number <= _MAX_LOOP
        if number > 1 and not self.one_by_one and not is_faster_looped:
            return vmap(self._call, in_dims=(0, in_dim), randomness="different")(parameters, x)
        inputs = [x] * number if in_dim is None else list(x)
        return torch.stack([self._call({name: each[m] for name, each in parameters.items()}, inputs[m]) for m in range(number)])

    def _call(self, parameters: dict[str, torch.Tensor], x_B: torch.Tensor) -> torch.Tensor:
        return functional_call(self._structure[0], parameters, (x_B,))


def _key(name: str) -> str:
    """Name of a stacked tensor: '.' separates modules in a name, so ':' keeps the tensor in the module itself."""
    return name.replace(".", ":")


def weight_of(buffer: str) -> str:
    """Name of the stacked weight for a stacked buffer of spectral normalisation: `torsos.1:0:left` → `torsos.stacked.1:0:weight`."""
    module, _, name = buffer.rpartition(".")
    return f"{module}.stacked.{name.rpartition(':')[0]}:weight"


class PerTask(Stacked, TaskOwned):
    """One stacked module per task: `[K, B, ...]` to `[K, B, ...]`."""

    # The images of one task keep a CPU busy, and grouped convolutions and normalisations are slower there than plain ones.
    loops_over_images = True


class TaskVectors(TaskOwned):
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


def append_per_task(x_KBF: torch.Tensor, vector_KV: torch.Tensor) -> torch.Tensor:
    """Append the vector of each task to its samples, in the dtype of the samples: `[K, B, F + V]`."""
    return torch.cat([x_KBF, vector_KV.to(x_KBF.dtype)[:, None].expand(-1, x_KBF.shape[1], -1)], -1)


def spectral_layers(network: nn.Module) -> list[SpectralLinear | Stacked]:
    """Modules of a network with spectral normalisation. Call `power_step` on each before the forward pass of an update."""
    found = [module for module in network.modules() if isinstance(module, SpectralLinear | Stacked)]
    return [module for module in found if isinstance(module, SpectralLinear) or module.spectral]


def parameter_counts(module: nn.Module, num_tasks: int) -> tuple[int, list[int]]:
    """Number of parameters that tasks share, and number of each task's own parameters. Padding is not counted."""
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


class TaskLinear(TaskOwned):
    """A linear layer per task: `[K, B, I]` to `[K, B, O]`, initialised as `nn.Linear`.

    Args:
        inputs: number of inputs.
        outputs: number of outputs of each task. Columns beyond it are zero and unused.
    """

    used_K1O: torch.Tensor

    def __init__(self, inputs: int, outputs: Sequence[int]):
        super().__init__()
        self.sizes = [(inputs + 1) * own for own in outputs]
        self._outputs = list(outputs)
        bound = 1 / math.sqrt(inputs)
        used = torch.arange(max(outputs)) < torch.tensor(outputs)[:, None]  # [K, O]
        weight = torch.empty(len(outputs), inputs, max(outputs)).uniform_(-bound, bound)
        bias = torch.empty(len(outputs), 1, max(outputs)).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight * used[:, None])
        self.bias = nn.Parameter(bias * used[:, None])
        self.register_buffer("used_K1O", used[:, None], persistent=False)

    def slices(self) -> Iterator[Slice]:
        for task, own in enumerate(self._outputs):
            for name in ("weight", "bias"):
                yield Slice(task, name, name, (task, slice(None), slice(own)))

    def forward(self, x_KBI: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x_KBI, self.weight)

    @torch.no_grad()
    def rescale(self, factor_K: torch.Tensor, offset_K: torch.Tensor) -> None:
        """Change the parameters so that each task's outputs become factor times output plus offset, float32 `[K]` each."""
        factor_K11 = factor_K[:, None, None]
        self.weight.mul_(factor_K11)
        self.bias.mul_(factor_K11).add_(offset_K[:, None, None] * self.used_K1O)
