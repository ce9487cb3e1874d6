"""Sharing structures: which parts of a torso the tasks share. This module has the interface and the two simplest structures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from mtrl_cli.networks.per_task import PerTask
from mtrl_cli.networks.torsos import Torso


class Sharing(nn.Module, ABC):
    """Observations of all tasks to features of all tasks, in one forward pass.

    A parameter whose rows belong to one task each must lie in a `TaskOwned` module. Every other parameter counts as shared.

    Args:
        torso: factory of the stems and bodies.
        shapes: observation shape of each task (frames stacked), before padding.

    Attributes:
        num_features: length of a feature vector; a structure may choose another length than the torso.
        num_tasks: K.
        names_in_torso: prefixes of parameter names of this structure, and the prefixes that the same layers have under hard sharing
            (`stem`, `body.0`), if different. Warm starts use them to find a layer in a network of another structure.
        scaled_keys: constructor keys that set the width of what a structure adds to the torso, as `Torso.scaled_keys`.
        of_all_tasks: prefixes of parameters that depend on the list of tasks, such as a matrix with a row and a column per task.
    """

    scaled_keys: ClassVar[tuple[str, ...]] = ()
    of_all_tasks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.num_features = torso.num_features
        self.num_tasks = len(shapes)
        self.names_in_torso: dict[str, str] = {}

    @abstractmethod
    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, *padded shape]` (float) to features `[K, B, num_features]`."""

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Routing weights of a structure with gates for observations `[K, B, *padded shape]` (float), for metrics.

        Returns:
            Distributions by name, each float `[K, choices]`: means over the batch, which sum to one over the choices.
        """
        return {}

    def by_task(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape task-major samples `[K * B, ...]` to `[K, B, ...]`."""
        return x.unflatten(0, (self.num_tasks, -1))


def make_stem(torso: Torso, shapes: Sequence[tuple[int, ...]], *, own: bool = False) -> nn.Module:
    """Make one stem for all tasks, or a stem per task (`PerTask`) if the shapes differ or `own` is true."""
    return PerTask([torso.stem(shape) for shape in shapes]) if own or len(set(shapes)) > 1 else torso.stem(shapes[0])


def apply_stem(stem: nn.Module, observation: torch.Tensor) -> torch.Tensor:
    """Apply a stem made by `make_stem` to observations `[K, B, ...]`: `[K * B, ...]`, task after task."""
    return stem(observation).flatten(0, 1) if isinstance(stem, PerTask) else stem(observation.flatten(0, 1))


def blocks_of(body: nn.Sequential) -> list[nn.Sequential]:
    """Divide a body into blocks that have parameters.

    A child without parameters (an activation) joins the block before it, or the first block if it comes first. A body without parameters
    is one block; an empty body has none.
    """
    blocks: list[nn.Sequential] = []
    for child in body:
        begun = bool(blocks) and has_parameters(blocks[-1])
        if not blocks or (begun and has_parameters(child)):
            blocks.append(nn.Sequential())
        blocks[-1].append(child)
    return blocks


def has_parameters(module: nn.Module) -> bool:
    """Whether a module or one of its children has a parameter."""
    return any(True for _ in module.parameters())


def names_in_body(blocks: Sequence[nn.Sequential], name: str) -> dict[str, str]:
    """Entries of `names_in_torso` for the blocks of a body that a structure stores as `name`."""
    children = [f"{name}.{block}.{child}" for block, layers in enumerate(blocks) for child in range(len(layers))]
    return {child: f"body.{index}" for index, child in enumerate(children)}


def output_shapes(layers: Sequence[nn.Module], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Output shape of each layer in a chain (without the batch), for observations of `shape`."""
    shapes = []
    with torch.no_grad():
        x = torch.zeros(1, *shape)
        for layer in layers:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
    return shapes


class HardSharing(Sharing):
    """One torso for all tasks (Caruana 1997). Tasks of different observation shapes have a stem each.

    Attributes:
        own_stems: whether every task has a stem even if all tasks have one observation shape.
    """

    own_stems: ClassVar[bool] = False

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.stem = make_stem(torso, shapes, own=self.own_stems)
        self.body = torso.body(shapes[0])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.by_task(self.body(apply_stem(self.stem, observation)))


class IndependentSharing(Sharing):
    """A torso per task, without sharing: the baseline for all other structures."""

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.names_in_torso = {"torsos.0": "stem", "torsos.1": "body"}
        self.torsos = PerTask([nn.Sequential(torso.stem(shape), torso.body(shape)) for shape in shapes])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.torsos(observation)
