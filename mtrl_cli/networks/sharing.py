"""Sharing structures: which parts of a torso tasks have in common. Here are what they have in common, and the two simplest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from mtrl_cli.networks.per_task import PerTask, parameter_counts
from mtrl_cli.networks.torsos import Torso


class Sharing(nn.Module, ABC):
    """Observations of all tasks to features of all tasks, in one forward.

    A parameter whose rows belong to one task each lies in a `TaskOwned` module; every other one is shared.

    Args:
        torso: the recipe of the parts.
        shapes: each task's own observation shape (frames stacked), before padding.

    Attributes:
        num_features: length of a feature vector, which a structure may choose otherwise than the torso.
        scaled_keys: the constructor's keys that make what a structure adds to the torso wider or narrower, as `Torso.scaled_keys`.
        of_all_tasks: what begins the names of parameters that mean something for this list of tasks alone, such as a weight for each.
    """

    scaled_keys: ClassVar[tuple[str, ...]] = ()
    of_all_tasks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.num_features = torso.num_features
        self.num_tasks = len(shapes)

    @abstractmethod
    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, *padded shape]` (float) to features `[K, B, num_features]`."""

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """How a structure with gates routes observations `[K, B, *padded shape]` (float), for metrics.

        Returns:
            Distributions by name, each float `[K, choices]`: means over the batch, which sum to one over the choices.
        """
        return {}

    def names_in_torso(self) -> dict[str, str]:
        """What begins the names of this structure's layers of the torso, and what they begin with under hard sharing (`stem`, `body.0`),
        where the two differ: so that networks of different structures know each other's layers."""
        return {}

    def parameter_counts(self) -> tuple[int, list[int]]:
        """Numbers of parameters, without padding: those that tasks share, and those of each task alone."""
        return parameter_counts(self, self.num_tasks)


def stem_of(torso: Torso, shapes: Sequence[tuple[int, ...]], *, own: bool = False) -> nn.Module:
    """A stem for all tasks; one for each (`PerTask`) where they differ in shape, or are to have their `own`."""
    return PerTask([torso.stem(shape) for shape in shapes]) if own or len(set(shapes)) > 1 else torso.stem(shapes[0])


def through_stem(stem: nn.Module, observation: torch.Tensor) -> torch.Tensor:
    """Observations `[K, B, ...]` through what `stem_of` gave: `[K * B, ...]`, task after task."""
    return stem(observation).flatten(0, 1) if isinstance(stem, PerTask) else stem(observation.flatten(0, 1))


def blocks_of(body: nn.Sequential) -> list[nn.Sequential]:
    """A body's blocks that have parameters. A child without any (an activation by itself) belongs to the block before it,
    one in front of all to the first; a body without parameters is one block, an empty one none."""
    blocks: list[nn.Sequential] = []
    for child in body:
        begun = bool(blocks) and any(True for _ in blocks[-1].parameters())
        if not blocks or (begun and any(True for _ in child.parameters())):
            blocks.append(nn.Sequential())
        blocks[-1].append(child)
    return blocks


def names_in_body(blocks: Sequence[nn.Sequential], name: str) -> dict[str, str]:
    """For `names_in_torso`: the children of a body's blocks, which a structure holds as `name`, as the body's own children."""
    children = [f"{name}.{block}.{child}" for block, layers in enumerate(blocks) for child in range(len(layers))]
    return {child: f"body.{index}" for index, child in enumerate(children)}


def output_shapes(layers: Sequence[nn.Module], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes (without the batch) that observations of `shape` have after each of the layers."""
    shapes = []
    with torch.no_grad():
        x = torch.zeros(1, *shape)
        for layer in layers:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
    return shapes


class HardSharing(Sharing):
    """One torso for all tasks (Caruana 1997). Where tasks differ in observation shape, each has a stem of its own."""

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.stem = stem_of(torso, shapes)
        self.body = torso.body(shapes[0])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.body(through_stem(self.stem, observation)).unflatten(0, (self.num_tasks, -1))


class IndependentSharing(Sharing):
    """Nothing is shared: a torso per task. The baseline that sharing is judged against."""

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.torsos = PerTask([nn.Sequential(torso.stem(shape), torso.body(shape)) for shape in shapes])

    def names_in_torso(self) -> dict[str, str]:
        return {"torsos.0": "stem", "torsos.1": "body"}

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.torsos(observation)
