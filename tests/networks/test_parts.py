"""Part of the network of each parameter, under every sharing structure."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from mtrl_cli.networks.heads import DuelingHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import Part, parts_of, tagged
from mtrl_cli.networks.sharing import HardSharing, blocks_of
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, NatureCNN, Torso
from tests.helpers.structures import STRUCTURES, Shapes, UngroupedTorso, structure

CASES: list[tuple[Torso, Shapes]] = [
    (MLP(hidden=[8, 7, 5], layer_norm=True), [(4,), (6,), (2,)]),
    (MLP(hidden=[8, 5]), [(4,)] * 3),
    (MinAtarCNN(channels=3, features=5, layer_norm=True), [(4, 10, 10), (7, 10, 10), (6, 10, 10)]),
    (NatureCNN(width=0.1, features=6), [(4, 84, 84)] * 2),
    (ImpalaCNN(width=0.2, features=6), [(4, 24, 24)] * 2),
    (UngroupedTorso(), [(4,), (6,)]),
]
OWN = {"mtan": ("sharing.bridges.",), "soft_moe": ("sharing.experts.",)}
"""Modules that copy a layer of the torso, or replace it and are newly initialised."""


class LabelledTorso(Torso):
    """Torso whose parameters all equal 1000 plus the number of their layer."""

    observation_kind = "vector"

    def __init__(self, torso: Torso):
        self._torso = torso
        self.num_features = torso.num_features

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return self._paint(self._torso.stem(shape), 0)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        body = self._torso.body(shape)
        for layer, block in enumerate(blocks_of(body), 1):
            self._paint(block, layer)
        return body

    @staticmethod
    def _paint(module: nn.Module, layer: int) -> nn.Module:
        for parameter in module.parameters():
            nn.init.constant_(parameter, 1000.0 + layer)
        return module


def labelled(name: str, torso: Torso, shapes: Sequence[tuple[int, ...]]) -> MultiTaskNetwork:
    sharing = structure(name, tagged(LabelledTorso(torso)), list(shapes))
    return MultiTaskNetwork(sharing, DuelingHead(sharing.num_features, [2] * len(shapes)), 1.0)


def layers_in_labels(parameter: torch.Tensor) -> set[int]:
    """Layer numbers found in the values of a parameter."""
    return {int(value) - 1000 for value in parameter.detach().flatten().unique().tolist() if value >= 1000}


@pytest.mark.parametrize(("torso", "shapes"), CASES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_parameter_is_assigned_to_its_layer(name: str, torso: Torso, shapes: Shapes) -> None:
    if name == "soft_moe" and len(shapes[0]) > 1 and isinstance(torso, UngroupedTorso):
        pytest.skip("refused")
    network = labelled(name, torso, shapes)
    parts = parts_of(network)
    assert list(parts) == [each for each, _ in network.named_parameters()]
    seen = set()
    for path, parameter in network.named_parameters():
        part, found = parts[path], layers_in_labels(parameter)
        assert (part.kind == "heads") == path.startswith("head.")
        assert (part.layer is None) == (part.kind != "torso")
        if path.startswith(OWN.get(name, ("nothing",))):
            continue
        assert found == ({part.layer} if part.kind == "torso" else set()), path
        seen |= found
    layers = {0, *range(1, 1 + len(blocks_of(torso.body(shapes[0]))))}
    assert layers - seen <= ({max(layers)} if name == "soft_moe" else set())


def test_mtan_bridges_are_sharing_and_token_experts_are_torso() -> None:
    torso, shapes = MinAtarCNN(channels=3, features=5), [(4, 10, 10)] * 2
    for path, part in parts_of(labelled("mtan", torso, shapes)).items():
        if path.startswith("sharing.bridges"):
            assert part == Part("sharing")
    found = {path: part for path, part in parts_of(labelled("soft_moe", torso, shapes)).items() if "experts" in path}
    assert set(found.values()) == {Part("torso", 1), Part("sharing")}
    assert found["sharing.experts.stacked.0:weight"] == Part("torso", 1)  # reads a token; the last brings it back to its channels


@pytest.mark.parametrize("name", ["hard", "independent", "paco", "cross_stitch"])
def test_parts_survive_copies_and_dtype_changes(name: str) -> None:
    network = labelled(name, MLP(hidden=[8, 5]), [(4,)] * 2)
    assert parts_of(copy.deepcopy(network)) == parts_of(network) == parts_of(network.to(torch.float64))
    with torch.device("meta"):
        assert parts_of(labelled(name, MLP(hidden=[8, 5]), [(4,)] * 2)) == parts_of(network)


def test_tagged_torso_makes_the_same_modules() -> None:
    torso = MLP(hidden=[8, 5])
    torch.manual_seed(0)
    plain = HardSharing(torso, [(4,), (3,)])
    torch.manual_seed(0)
    marked = HardSharing(tagged(torso), [(4,), (3,)])
    assert {name: each.tolist() for name, each in plain.state_dict().items()} == {
        name: each.tolist() for name, each in marked.state_dict().items()
    }
    assert isinstance(tagged(torso), MLP)
