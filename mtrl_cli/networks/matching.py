"""What two multi-task networks have in common: their parameters by task and name, and what of one can be taken into the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mtrl_cli.networks.lora import LowRank
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import Kind, parts_of
from mtrl_cli.networks.per_task import Stacked, TaskOwned, weight_of

Fate = Literal["loaded", "fresh", "left"]


@dataclass(frozen=True)
class Piece:
    """A parameter (or buffer) that tasks share, or one task's own part of it, without padding.

    Attributes:
        tensor: its name in the network's state.
        index: where in it; (): all of it. The row comes first.
        kind, layer: of the part that it belongs to (`parts.py`), with "adapters" for those that low-rank adaptation adds.
        unit: pieces of one task and unit are taken together or not at all.
    """

    tensor: str
    index: tuple[int | slice, ...]
    kind: Kind | Literal["adapters"]
    layer: int | None
    unit: str

    def of(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The piece itself, a view."""
        return state[self.tensor][self.index]


Key = tuple[str | None, str]
"""Whose a piece is (the name of a task; None: of all), and its name as it would be under hard sharing."""


def pieces_of(network: MultiTaskNetwork, tasks: Sequence[str]) -> dict[Key, Piece]:
    """All parameters and saved buffers of a network, each task's own apart.

    Names are those of a network that shares all but its heads: a task's own stem is called as a common one is.
    """
    parts, state = parts_of(network), network.state_dict(keep_vars=True)
    adapters = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, LowRank))
    renamed = {f"sharing.{mine}.": f"sharing.{torso}." for mine, torso in network.sharing.names_in_torso().items()}

    def piece(tensor: str, name: str, index: tuple[int | slice, ...]) -> tuple[str, Piece]:
        name = next((new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)), name)
        module = name.rpartition(".")[0]
        # A buffer (of spectral normalisation) goes with the parameters of the layer that it is in.
        beside = (part for known, part in parts.items() if known.startswith(tensor.rpartition(".")[0] + "."))
        part = parts.get(tensor) or parts.get(weight_of(tensor)) or next(beside, None)
        kind, layer = (part.kind, part.layer) if part is not None else ("sharing", None)
        if tensor.startswith(adapters):
            return name, Piece(tensor, index, "adapters", None, module)
        unit = f"layer {layer}" if kind == "torso" else "head" if kind == "heads" else module
        return name, Piece(tensor, index, kind, layer, unit)

    found: dict[Key, Piece] = {}
    divided: set[str] = set()
    for path, module in network.named_modules():
        if isinstance(module, TaskOwned) or (isinstance(module, Stacked) and module.owners is not None):
            for each in module.slices():
                name, made = piece(f"{path}.{each.parameter}", f"{path}.{each.name}", each.index)
                found[None if each.owner is None else tasks[each.owner], name] = made
                divided.add(f"{path}.{each.parameter}")
    for tensor in state:
        if tensor not in divided:
            name, made = piece(tensor, tensor, ())
            found[None, name] = made
    return found


@dataclass(frozen=True)
class Source:
    """A network whose parameters may be taken.

    Attributes:
        network: it.
        tasks: their names, in order.
        known: those that are the same tasks as in the other network, of the same name.
        heads: those whose heads mean the same there.
    """

    network: MultiTaskNetwork
    tasks: Sequence[str]
    known: Collection[str]
    heads: Collection[str]


@dataclass(frozen=True)
class Outcome:
    """What became of a part: of all tasks (None) or of one.

    Attributes:
        task, kind, layer: which part.
        fate: loaded from the source, fresh, or left in the source.
        number: of parameters.
        why: where it is not loaded.
    """

    task: str | None
    kind: str
    layer: int | None
    fate: Fate
    number: int
    why: str = ""


@dataclass(frozen=True)
class Taken:
    """What was taken into a network.

    Attributes:
        rows: of each tensor of which something was loaded, by name, the rows that were; None: all of it.
        outcomes: for a table.
    """

    rows: dict[str, list[int] | None]
    outcomes: list[Outcome]

    def loads(self, kind: str) -> bool:
        """Whether anything of a kind of part was loaded."""
        return any(outcome.kind == kind and outcome.fate == "loaded" for outcome in self.outcomes)

    @property
    def heads(self) -> list[str]:
        """The tasks that got their heads from the source."""
        return [outcome.task for outcome in self.outcomes if outcome.kind == "heads" and outcome.fate == "loaded" and outcome.task]


@torch.no_grad()
def take(source: Source, network: MultiTaskNetwork, tasks: Sequence[str]) -> Taken:
    """Copy into a network what it has in common with a source, part by part, where the shapes of a part's tensors agree.

    What is a task's own goes to the task of that name; what all share to what all share, and to each task's own of that name (a stem); a
    task's own to what all share only if that task is the only one. Parts are left whole: a layer of which one tensor does not fit is fresh.
    """
    mine, theirs = pieces_of(network, tasks), pieces_of(source.network, source.tasks)
    state, given = network.state_dict(), source.network.state_dict()
    units: dict[tuple[str | None, str], list[Key]] = {}
    for key, piece in mine.items():
        units.setdefault((key[0], piece.unit), []).append(key)
    loaded: list[Key] = []
    used: set[Key] = set()
    outcomes: list[Outcome] = []
    for (task, _), keys in units.items():
        found = [_counterpart(key, mine[key], source, tasks, network, theirs) for key in keys]
        whys = [_mismatch(mine[key].of(state), other, theirs, given) for key, other in zip(keys, found, strict=True)]
        why = next((why for why in whys if why), "")
        if not why:
            for key, other in zip(keys, found, strict=True):
                assert not isinstance(other, str)
                mine[key].of(state).copy_(theirs[other].of(given))
                used.add(other)
            loaded += keys
        first = mine[keys[0]]
        number = _numbers(network, [mine[key] for key in keys])
        outcomes.append(Outcome(task, first.kind, first.layer, "fresh" if why else "loaded", number, why))
    for (task, name), piece in theirs.items():
        if (task, name) not in used:
            outcomes.append(Outcome(task, piece.kind, piece.layer, "left", _numbers(source.network, [piece])))
    return Taken(_rows([mine[key] for key in loaded], mine.values()), outcomes)


def _counterpart(
    key: Key, piece: Piece, source: Source, tasks: Sequence[str], network: MultiTaskNetwork, theirs: Mapping[Key, Piece]
) -> Key | str:
    """What of the source a piece may be taken from, or why there is nothing."""
    task, name = key
    if name.removeprefix("sharing.").startswith(network.sharing.of_all_tasks) and list(tasks) != list(source.tasks):
        return "goes by the list of tasks"
    if piece.kind == "heads" and task not in source.heads:
        return "new task" if task not in source.known else "other actions or head"
    if task is None:
        only = tasks[0] if len(tasks) == 1 and tasks[0] in source.known else None
        candidates: list[Key] = [(None, name), *([(only, name)] if only else [])]
    else:
        candidates = [*([(task, name)] if task in source.known else []), (None, name)]
    other = next((other for other in candidates if other in theirs), None)
    if other is not None:
        return other
    if piece.kind == "adapters":
        return "changes nothing at first"
    return "not in the source" if task is None or task in source.known else "new task"


def _mismatch(mine: torch.Tensor, other: Key | str, theirs: Mapping[Key, Piece], given: Mapping[str, torch.Tensor]) -> str:
    """Why a piece cannot be taken; empty where it can."""
    if isinstance(other, str):
        return other
    shape = theirs[other].of(given).shape
    return "" if shape == mine.shape else f"other shape: {_shape(mine.shape)}, in the source {_shape(shape)}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _numbers(network: MultiTaskNetwork, pieces: Sequence[Piece]) -> int:
    """How many parameters pieces are, buffers aside."""
    parameters = dict(network.named_parameters())
    return sum(parameters[piece.tensor][piece.index].numel() for piece in pieces if piece.tensor in parameters)


def _rows(loaded: Sequence[Piece], pieces: Iterator[Piece] | Collection[Piece]) -> dict[str, list[int] | None]:
    """The rows of each tensor that were loaded; None where that is all of it."""
    everything: dict[str, int] = {}
    for piece in pieces:
        everything[piece.tensor] = everything.get(piece.tensor, 0) + 1
    rows: dict[str, list[int] | None] = {}
    for piece in loaded:
        first = piece.index[0] if piece.index else None
        if isinstance(first, int):
            rows.setdefault(piece.tensor, []).append(first)  # type: ignore[union-attr]
        else:
            rows[piece.tensor] = None
    return {name: None if which is None or len(which) == everything[name] else sorted(which) for name, which in rows.items()}
