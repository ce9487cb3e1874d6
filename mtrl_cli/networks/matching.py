"""Warm start of one multi-task network from another: match parameters by task and name, and copy those that fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mtrl_cli.networks.lora import LowRank
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import Kind, parts_of
from mtrl_cli.networks.per_task import Stacked, TaskOwned, weight_of

Status = Literal["loaded", "fresh", "left"]
LoadedRows = dict[str, list[int] | None]
"""Loaded rows of tensors, by name; None: all rows. Tensors without loaded rows are absent."""


@dataclass(frozen=True)
class Piece:
    """A parameter or buffer that tasks share, or one task's slice of it without padding.

    Attributes:
        tensor: name of the tensor in the network's state.
        index: position of the piece in the tensor; () for the whole tensor. The first element is the row.
        kind, layer: part of the network (`parts.py`); "adapters" for the parameters of low-rank adaptation.
        unit: name of the group that is loaded as a whole: if one piece of a task's unit does not match, none is loaded.
    """

    tensor: str
    index: tuple[int | slice, ...]
    kind: Kind | Literal["adapters"]
    layer: int | None
    unit: str

    def of(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """View of the piece in a state."""
        return state[self.tensor][self.index]

    def is_in(self, rows: Sequence[int] | None) -> bool:
        """Whether the piece is in one of the rows of its tensor; None: all rows."""
        return rows is None or self.index[0] in rows


Key = tuple[str | None, str]
"""Task that owns a piece (None: all tasks), and the name that the piece has under hard sharing."""


def pieces_of(network: MultiTaskNetwork, tasks: Sequence[str]) -> dict[Key, Piece]:
    """All parameters and saved buffers of a network, those of different tasks separately.

    Names are those of hard sharing with one stem: the stem of a task has the name of the common stem.
    """
    parts, state = parts_of(network), network.state_dict(keep_vars=True)
    adapters = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, LowRank))
    renamed = {f"sharing.{mine}.": f"sharing.{torso}." for mine, torso in network.sharing.names_in_torso.items()}
    pieces: dict[Key, Piece] = {}

    def add(owner: int | None, tensor: str, name: str, index: tuple[int | slice, ...]) -> None:
        name = next((new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)), name)
        module = name.rpartition(".")[0]
        # A buffer of spectral normalisation belongs to the layer of the parameters in the same module.
        siblings = (part for other, part in parts.items() if other.startswith(tensor.rpartition(".")[0] + "."))
        part = parts.get(tensor) or parts.get(weight_of(tensor)) or next(siblings, None)
        kind, layer = (part.kind, part.layer) if part is not None else ("sharing", None)
        unit = f"layer {layer}" if kind == "torso" else "head" if kind == "heads" else module
        piece = Piece(tensor, index, kind, layer, unit)
        if tensor.startswith(adapters):
            piece = Piece(tensor, index, "adapters", None, module)
        pieces[None if owner is None else tasks[owner], name] = piece

    for path, module in network.named_modules():
        if isinstance(module, TaskOwned) or (isinstance(module, Stacked) and module.owners is not None):
            for each in module.slices():
                add(each.owner, f"{path}.{each.parameter}", f"{path}.{each.name}", each.index)
    divided = {piece.tensor for piece in pieces.values()}
    for tensor in state:
        if tensor not in divided:
            add(None, tensor, tensor, ())
    return pieces


@dataclass(frozen=True)
class Source:
    """Network to load parameters from.

    Attributes:
        network: network of the source.
        tasks: names of its tasks, in order.
        known: names of the tasks that both networks have.
        heads: names of the tasks whose heads have the same meaning in both networks.
    """

    network: MultiTaskNetwork
    tasks: Sequence[str]
    known: Collection[str]
    heads: Collection[str]


@dataclass(frozen=True)
class Outcome:
    """Result of a warm start for one part of the network.

    Attributes:
        task: task that owns the part; None for all tasks.
        kind, layer: part of the network.
        status: "loaded" from the source, "fresh" (not loaded), or "left" (in the source only).
        number: number of parameters.
        reason: reason for a fresh part.
    """

    task: str | None
    kind: str
    layer: int | None
    status: Status
    number: int
    reason: str = ""


@dataclass(frozen=True)
class Loaded:
    """Result of a warm start.

    Attributes:
        rows: loaded rows of each tensor.
        outcomes: results for all parts, for a table.
    """

    rows: LoadedRows
    outcomes: list[Outcome]

    def loads(self, kind: str) -> bool:
        """Whether any part of a kind was loaded."""
        return any(outcome.kind == kind and outcome.status == "loaded" for outcome in self.outcomes)

    @property
    def heads(self) -> list[str]:
        """Tasks whose heads were loaded."""
        return [outcome.task for outcome in self.outcomes if outcome.kind == "heads" and outcome.status == "loaded" and outcome.task]


@torch.no_grad()
def load_matching(source: Source, network: MultiTaskNetwork, tasks: Sequence[str]) -> Loaded:
    """Copy the parts of a source into a network, where all tensors of a part have the same shapes.

    A task's own part is copied to the task of the same name. A shared part is copied to the shared part and to each task's own part of the
    same name (a stem). A task's own part is copied to a shared part only if the network has no other task. A layer with one tensor that
    does not fit stays fresh as a whole.
    """
    mine, theirs = pieces_of(network, tasks), pieces_of(source.network, source.tasks)
    state, given = network.state_dict(), source.network.state_dict()
    units: dict[tuple[str | None, str], list[Key]] = {}
    for key, piece in mine.items():
        units.setdefault((key[0], piece.unit), []).append(key)
    loaded: list[Piece] = []
    used: set[Key] = set()
    outcomes: list[Outcome] = []
    for (task, _), keys in units.items():
        pieces = [mine[key] for key in keys]
        matches = [_match(key, mine[key], source, tasks, network, theirs) for key in keys]
        reasons = [_mismatch(piece.of(state), match, theirs, given) for piece, match in zip(pieces, matches, strict=True)]
        reason = next(filter(None, reasons), "")
        if not reason:
            for piece, match in zip(pieces, matches, strict=True):
                assert not isinstance(match, str)
                piece.of(state).copy_(theirs[match].of(given))
                used.add(match)
            loaded += pieces
        status: Status = "fresh" if reason else "loaded"
        outcomes.append(Outcome(task, pieces[0].kind, pieces[0].layer, status, count_parameters(network, pieces), reason))
    for (task, name), piece in theirs.items():
        if (task, name) not in used:
            outcomes.append(Outcome(task, piece.kind, piece.layer, "left", count_parameters(source.network, [piece])))
    return Loaded(_rows(loaded, mine.values()), outcomes)


def _match(
    key: Key, piece: Piece, source: Source, tasks: Sequence[str], network: MultiTaskNetwork, theirs: Mapping[Key, Piece]
) -> Key | str:
    """Key of the matching piece in the source, or the reason why there is none."""
    task, name = key
    if name.removeprefix("sharing.").startswith(network.sharing.of_all_tasks) and list(tasks) != list(source.tasks):
        return "depends on the list of tasks"
    if piece.kind == "heads" and task not in source.heads:
        return "new task" if task not in source.known else "different actions or head"
    owners = [None, *(tasks if len(tasks) == 1 else [])] if task is None else [task, None]
    candidates = [(owner, name) for owner in owners if owner is None or owner in source.known]
    match = next((candidate for candidate in candidates if candidate in theirs), None)
    if match is not None:
        return match
    if piece.kind == "adapters":
        return "zero at the start"
    return "not in the source" if task is None or task in source.known else "new task"


def _mismatch(mine: torch.Tensor, match: Key | str, theirs: Mapping[Key, Piece], given: Mapping[str, torch.Tensor]) -> str:
    """Reason why a piece cannot be copied; empty if it can."""
    if isinstance(match, str):
        return match
    shape = theirs[match].of(given).shape
    return "" if shape == mine.shape else f"shape {_shape(mine.shape)}, in the source {_shape(shape)}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def count_parameters(network: MultiTaskNetwork, pieces: Sequence[Piece]) -> int:
    """Number of parameters in pieces, without buffers."""
    parameters = dict(network.named_parameters())
    return sum(parameters[piece.tensor][piece.index].numel() for piece in pieces if piece.tensor in parameters)


def _rows(loaded: Iterable[Piece], pieces: Iterable[Piece]) -> LoadedRows:
    total = Counter(piece.tensor for piece in pieces)
    rows: dict[str, list[int]] = {}
    for piece in loaded:
        rows.setdefault(piece.tensor, []).extend(row for row in piece.index[:1] if isinstance(row, int))
    return {name: None if not found or len(found) == total[name] else sorted(found) for name, found in rows.items()}
