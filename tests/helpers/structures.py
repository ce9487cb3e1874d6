"""Sharing structures, torsos and observations of small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mtrl_cli.config.introspection import import_class
from mtrl_cli.networks.heads import DuelingHead, PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import tagged
from mtrl_cli.networks.per_task import PerTask, Stacked, parameter_counts
from mtrl_cli.networks.sharing import Sharing
from mtrl_cli.networks.torsos import MLP, MinAtarCNN, Torso

Shapes = list[tuple[int, ...]]
VECTORS: Shapes = [(4,), (6,), (2,)]
IMAGES: Shapes = [(4, 10, 10), (7, 10, 10), (6, 10, 10)]


SMALL: dict[str, dict[str, Any]] = {
    "task_embedding": {"size": 3},
    "soft_modular": {"num_layers": 3, "num_modules": 2, "module_size": 12, "routing_size": 7},
    "mmoe": {"experts": 3},
    "ple": {"task_experts": 2},
    "moore": {"experts": 2},
    "care": {"experts": 3, "context": 16},
    "soft_moe": {"experts": 3},
    "paco": {"bases": 3},
}
"""Small options for fast tests."""

SHARES_BODIES = ["mmoe", "ple", "moore", "care", "soft_moe", "paco"]
"""Structures that refuse a torso of one layer for tasks of different shapes."""

YAMLS = sorted((Path(__file__).resolve().parents[2] / "conf/network/sharing").glob("*.yaml"))
STRUCTURES = [path.stem for path in YAMLS]


def observations(shapes: Shapes, batch: int = 4, seed: int = 0) -> torch.Tensor:
    """Return noise `[K, B, *padded]`, zero in the padding of each task."""
    padded = (max(shape[0] for shape in shapes), *shapes[0][1:])
    observation = torch.zeros(len(shapes), batch, *padded)
    random = torch.Generator().manual_seed(seed)
    for task, shape in enumerate(shapes):
        observation[task, :, : shape[0]] = torch.randn(batch, *shape, generator=random)
    return observation


def structure(name: str, torso: Torso, shapes: Shapes, seed: int = 0) -> Sharing:
    """Build the structure that `network/sharing=NAME` selects, with small sizes."""
    node = yaml.safe_load(YAMLS[STRUCTURES.index(name)].read_text())
    options = {key: value for key, value in node.items() if key != "_target_"}
    torch.manual_seed(seed)
    if name in SHARES_BODIES and len(set(shapes)) > 1 and not torso.body(shapes[0]):
        with pytest.raises(ValueError, match=r"network\.hidden"):
            import_class(node["_target_"])(torso, shapes, **options)
        pytest.skip("refused")
    made = import_class(node["_target_"])(torso, shapes, **options | SMALL.get(name, {}))
    assert isinstance(made, Sharing)
    return made


class UngroupedTorso(Torso):
    """Torso whose layers and activations are separate children of the body."""

    observation_kind = "vector"
    num_features = 6

    def stem(self, shape: tuple[int, ...]) -> nn.Module:
        return nn.Linear(shape[0], 8)

    def body(self, shape: tuple[int, ...]) -> nn.Sequential:
        return nn.Sequential(nn.ReLU(), nn.Linear(8, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 6))


def unstacked(module: nn.Module, stacked: Stacked, row: int) -> nn.Module:
    """Give `module` the parameters of one of the stacked modules."""
    for name, parameter in module.named_parameters():
        padded = stacked.stacked[name.replace(".", ":")][row]
        parameter.data = padded[tuple(slice(size) for size in parameter.shape)].detach().clone()
    return module


def counts(sharing: Sharing) -> tuple[int, list[int]]:
    """Return the numbers of shared parameters and of task-specific parameters of each task."""
    return parameter_counts(sharing, sharing.num_tasks)


def stem_of_task(sharing: Sharing, torso: Torso, shapes: Shapes, task: int) -> nn.Module:
    """Return the task-specific stem, or the shared stem."""
    stem = sharing.get_submodule("stem")
    return unstacked(torso.stem(shapes[task]), stem, task) if isinstance(stem, PerTask) else stem


VECTOR = {"a": (4,), "b": (6,), "c": (2,), "d": (6,)}
IMAGE = dict.fromkeys("abcd", (4, 10, 10))
ACTIONS = {"a": 2, "b": 3, "c": 3, "d": 5}
MLP_TORSO, CNN = MLP(hidden=[8, 7, 5]), MinAtarCNN(channels=3, features=5, layer_norm=True)


def network_of(
    sharing: str, tasks: str, torso: Torso = MLP_TORSO, seed: int = 0, kind: type[PlainHead | DuelingHead] = PlainHead
) -> MultiTaskNetwork:
    """A network of tasks named by single letters."""
    shapes = [(IMAGE if isinstance(torso, MinAtarCNN) else VECTOR)[task] for task in tasks]
    made = structure(sharing, tagged(torso), shapes, seed)
    return MultiTaskNetwork(made, kind(made.num_features, [ACTIONS[task] for task in tasks]), 1.0)
