"""Which part of a network a parameter belongs to: a layer of the torso, what the sharing structure adds to it, or the heads.

A structure makes new modules of the torso's: it divides, stacks and copies them. So it is not the names that tell, but the modules, each
of which a torso's tagged twin marks as it makes it; copies keep the mark, and `Stacked` keeps it for each of its parameters.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.per_task import TORSO_LAYER, Stacked
from mtrl_cli.networks.sharing import blocks_of
from mtrl_cli.networks.torsos import Torso

Kind = Literal["torso", "sharing", "heads"]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """Where a parameter is used.

    Attributes:
        kind: "torso", "sharing" (what the structure adds to the torso) or "heads".
        layer: of the torso, counted from the input: 0 is the stem, then come the body's blocks (`blocks_of`). None elsewhere.
    """

    kind: Kind
    layer: int | None = None


def tagged(torso: Torso) -> Torso:
    """A torso that gives the same modules as this one, each marked with its layer, for a sharing structure to be made of."""

    def stem(shape: tuple[int, ...]) -> nn.Module:
        return mark(torso.stem(shape), 0)

    def body(shape: tuple[int, ...]) -> nn.Sequential:
        made = torso.body(shape)
        for layer, block in enumerate(blocks_of(made), 1):
            mark(block, layer)
        return made

    twin = copy.copy(torso)
    vars(twin).update(stem=stem, body=body)
    return twin


def mark(module: Module, layer: int | None) -> Module:
    """Say of a module and all in it that they are a layer of the torso, or (None) that they are none. Returns the module."""
    for each in module.modules():
        setattr(each, TORSO_LAYER, layer)
    return module


def parts_of(network: MultiTaskNetwork) -> dict[str, Part]:
    """The part of each parameter of a network, by its name, in the order of `network.named_parameters()`."""
    layers: dict[str, int | None] = {}
    for path, module in network.sharing.named_modules(prefix="sharing"):
        if isinstance(module, Stacked):
            layers |= {f"{path}.stacked.{name}": layer for name, layer in module.torso_layers.items()}
        for name, _ in module.named_parameters(recurse=False):
            layers.setdefault(f"{path}.{name}", getattr(module, TORSO_LAYER, None))

    def part(name: str) -> Part:
        if name not in layers:
            return Part("heads")
        layer = layers[name]
        return Part("sharing") if layer is None else Part("torso", layer)

    return {name: part(name) for name, _ in network.named_parameters()}
