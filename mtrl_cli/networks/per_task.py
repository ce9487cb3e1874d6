"""Several modules of one structure, or one per task, evaluated at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, vmap

from mtrl_cli.networks.regularised import SpectralLinear, power_step

TORSO_LAYER = "torso_layer"
"""The attribute by which a module tells which layer of the torso it is (`parts.py`)."""

_FEW_TASKS = 8
"""More modules than these are never called one after the other: it would take long to compile."""


@dataclass(frozen=True)
class Slice:
    """One owner's part of a parameter whose rows have owners.

    Attributes:
        owner: the number of a task; None: what tasks share.
        name: of the parameter, as it would be called in a module that the owner had for itself.
        parameter: its name in the module that holds it.
        index: where in it, without padding; the row comes first.
    """

    owner: int | None
    name: str
    parameter: str
    index: tuple[int | slice, ...]


class TaskOwned:
    """Marks a module whose own parameters are stacked by task: row k of each is reached by task k's loss alone, by no other task's.

    Attributes:
        sizes: each task's number of parameters, without padding.
    """

    sizes: list[int]

    def slices(self) -> Iterator[Slice]:
        """Each task's own part of each parameter."""
        raise NotImplementedError


class Stacked(nn.Module):
    """M modules of one structure with parameters of their own, as one module over stacked parameters.

    The modules may differ in the sizes of their inputs: their parameters are then padded with zeros to the widest. Padded
    inputs are zero, so the padding neither adds to an output nor receives a gradient, and stays zero.

    Args:
        modules: of the same class and layers.

    Attributes:
        sizes: each module's number of parameters, without padding.
        owners: the task that each module was made for, where it is known to be for one; None: for all.
        torso_layers: which layer of the torso each stacked tensor is of, None: of none (`parts.py`).
        spectral: names of those layers of `structure` that are of spectral norm one.
        structure: whose layers are called with each module's parameters.
        one_by_one: call it for a module after the other rather than for all at once: slower, and open to hooks on the layers of
            `structure`, which see no plain tensors otherwise.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.one_by_one = False
        self.sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
        self.owners: list[int | None] | None = None
        each = [dict(module.named_parameters()) for module in modules]
        # '.' separates modules in a name; ':' keeps each stacked tensor a plain parameter of this one.
        self.stacked = nn.ParameterDict(
            {name.replace(".", ":"): nn.Parameter(_stack_padded([parameters[name].detach() for parameters in each])) for name in each[0]}
        )
        self.torso_layers: dict[str, int | None] = {
            name.replace(".", ":"): getattr(modules[0].get_submodule(name.rpartition(".")[0]), TORSO_LAYER, None) for name in each[0]
        }
        self.spectral = [name for name, module in modules[0].named_modules() if isinstance(module, SpectralLinear)]
        for name in self._vectors():
            vectors = [module.get_buffer(name) for module in modules]
            self.register_buffer(name.replace(".", ":"), _stack_padded(vectors))
        self._shapes = [
            {
                name: tensor.shape
                for name, tensor in [*module.named_parameters(), *((name, module.get_buffer(name)) for name in self._vectors())]
            }
            for module in modules
        ]
        # In a list, so that it is no submodule: only its structure is used, never its parameters.
        self._structure = [modules[0]]

    def slices(self) -> Iterator[Slice]:
        """Each module's part of each parameter, and of what layers of spectral norm one know of it. Where one owner has several modules,
        their names begin with their number."""
        owners: Sequence[int | None] = list(range(len(self._shapes))) if self.owners is None else self.owners
        for m, (owner, shapes) in enumerate(zip(owners, self._shapes, strict=True)):
            which = f"{owners[:m].count(owner)}." if owners.count(owner) > 1 else ""
            for name, shape in shapes.items():
                here = name.replace(".", ":")
                yield Slice(owner, which + name, f"stacked.{here}" if here in self.stacked else here, (m, *map(slice, shape)))

    def forward(self, x_MB: torch.Tensor) -> torch.Tensor:
        """Inputs `[M, B, ...]` to outputs `[M, B, ...]`, each through its own module, in the dtype of the inputs."""
        return self._call_each(self._parameters_in(x_MB.dtype), x_MB, len(self.sizes))

    def of_one(self, x_B: torch.Tensor) -> torch.Tensor:
        """One input `[B, ...]` through all modules: `[M, B, ...]`, without M copies of it."""
        return self._call_each(self._parameters_in(x_B.dtype), x_B, len(self.sizes), in_dim=None)

    def _parameters_in(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # vmap does not see autocast: what it computes has the dtype of what it is given.
        parameters = {name.replace(":", "."): parameter.to(dtype) for name, parameter in self.stacked.items()}
        return parameters | {name: self.get_buffer(name.replace(".", ":")) for name in self._vectors()}

    def _vectors(self) -> list[str]:
        """The buffers of the layers of spectral norm one, by their names in `structure`."""
        return [f"{name}.{side}" for name in self.spectral for side in ("left", "right")]

    def power_step(self, *, times: int = 1, frozen: bool = False) -> None:
        """As `regularised.power_step`, of all layers of spectral norm one; where `frozen`, of those that are not trained, too."""
        for name in self.spectral:
            weight = self.stacked[f"{name}.weight".replace(".", ":")]
            if frozen or weight.requires_grad:
                power_step(weight, *(self.get_buffer(f"{name}.{side}".replace(".", ":")) for side in ("left", "right")), times=times)

    @property
    def structure(self) -> nn.Module:
        return self._structure[0]

    def _call_each(self, parameters: dict[str, torch.Tensor], x: torch.Tensor, number: int, in_dim: int | None = 0) -> torch.Tensor:
        """A number of sets of parameters (`[number, ...]`), each with its own of the inputs, or all with one (`in_dim` None)."""
        if number > 1 and not self.one_by_one and not self._is_quicker_apart(x, number):
            return vmap(self._call, in_dims=(0, in_dim), randomness="different")(parameters, x)
        inputs = [x] * number if in_dim is None else list(x)
        return torch.stack([self._call({name: each[m] for name, each in parameters.items()}, inputs[m]) for m in range(number)])

    def _is_quicker_apart(self, x: torch.Tensor, number: int) -> bool:
        """Whether calling one module after the other takes less time than all at once."""
        return False

    def _call(self, parameters: dict[str, torch.Tensor], x_B: torch.Tensor) -> torch.Tensor:
        return functional_call(self._structure[0], parameters, (x_B,))


def weight_of(buffer: str) -> str:
    """The name of the stacked weight that a stacked layer's buffer (of spectral normalisation) is of: `torsos.1:0:left` is of
    `torsos.stacked.1:0:weight`."""
    module, _, name = buffer.rpartition(".")
    return f"{module}.stacked.{name.rpartition(':')[0]}:weight"


class PerTask(Stacked, TaskOwned):
    """Stacked modules of which each is one task's own: `[K, B, ...]` to `[K, B, ...]`."""

    def _is_quicker_apart(self, x: torch.Tensor, number: int) -> bool:
        # A CPU has enough to do with one task's images, and its grouped convolutions and normalisations are slower than plain ones.
        return x.device.type == "cpu" and x.dim() == 5 and number <= _FEW_TASKS


class TaskVectors(TaskOwned, nn.Module):
    """A learned vector per task.

    Args:
        initial_KV: float32 `[K, V]`.
    """

    def __init__(self, initial_KV: torch.Tensor):
        super().__init__()
        self.sizes = [initial_KV.shape[1]] * len(initial_KV)
        self.vectors = nn.Parameter(initial_KV)

    def slices(self) -> Iterator[Slice]:
        return (Slice(k, "vectors", "vectors", (k,)) for k in range(len(self.sizes)))

    def forward(self) -> torch.Tensor:
        """The vectors, float32 `[K, V]`."""
        return self.vectors


def spectral_layers(network: nn.Module) -> list[SpectralLinear | Stacked]:
    """The modules of a network in which there are layers of spectral norm one, to be called `power_step` before an update's forward."""
    found = [module for module in network.modules() if isinstance(module, SpectralLinear | Stacked)]
    return [module for module in found if isinstance(module, SpectralLinear) or module.spectral]


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
        self._outputs = list(outputs)
        bound = 1 / math.sqrt(inputs)
        used = torch.arange(max(outputs)) < torch.tensor(outputs)[:, None]  # [K, O]
        weight = torch.empty(len(outputs), inputs, max(outputs)).uniform_(-bound, bound)
        bias = torch.empty(len(outputs), 1, max(outputs)).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight * used[:, None])
        self.bias = nn.Parameter(bias * used[:, None])
        self.register_buffer("used_K1O", used[:, None], persistent=False)

    def slices(self) -> Iterator[Slice]:
        for k, own in enumerate(self._outputs):
            for name in ("weight", "bias"):
                yield Slice(k, name, name, (k, slice(None), slice(own)))

    def forward(self, x_KBI: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x_KBI, self.weight)

    @torch.no_grad()
    def rescale(self, factor_K: torch.Tensor, offset_K: torch.Tensor) -> None:
        """Change the parameters so that each task's outputs become factor times themselves plus offset, float32 `[K]` each."""
        factor_K11 = factor_K[:, None, None]
        self.weight.mul_(factor_K11)
        self.bias.mul_(factor_K11).add_(offset_K[:, None, None] * self.used_K1O)
