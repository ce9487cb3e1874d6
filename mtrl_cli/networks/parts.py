"""Parts of a network: the part of each parameter is a layer of the torso, the sharing structure or the heads.

A sharing structure divides, stacks and copies the modules of a torso, so parameter names do not identify the layer. Instead, a torso
returned by `tagged` tags each module that it makes with its layer number. Copies keep the tag, and `Stacked` keeps it for each parameter.
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
    """Part of a network to which a parameter belongs.

    Attributes:
        kind: "torso", "sharing" (modules that the structure adds to the torso) or "heads".
        layer: layer of the torso, counted from the input: 0 is the stem, then the blocks of the body (`blocks_of`). None outside the
            torso.
    """

    kind: Kind
    layer: int | None = None


def tagged(torso: Torso) -> Torso:
    """Copy of a torso whose `stem` and `body` tag every module with the layer number."""

    def stem(shape: tuple[int, ...]) -> nn.Module:
        return tag(torso.stem(shape), 0)

    def body(shape: tuple[int, ...]) -> nn.Sequential:
        made = torso.body(shape)
        for layer, block in enumerate(blocks_of(made), 1):
            tag(block, layer)
        return made

    twin = copy.copy(torso)
    vars(twin).update(stem=stem, body=body)
    return twin


def tag(module: Module, layer: int | None) -> Module:
    """Tag a module and its children with a layer number, or with None for modules outside the torso. Return the module."""
    for each in module.modules():
        setattr(each, TORSO_LAYER, layer)
    return module


def parts_of(network: MultiTaskNetwork) -> dict[str, Part]:
    """The part of each parameter of a network by name, in the order of `network.named_parameters()`."""
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
