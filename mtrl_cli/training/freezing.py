"""Freezing of parameters that were loaded from a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mtrl_cli.networks.matching import LoadedRows, Piece, count_parameters, pieces_of
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import parts_of
from mtrl_cli.networks.per_task import weight_of
from mtrl_cli.training.callbacks import Callback


class Freezing(Callback):
    """Freezes loaded parameters until a step.

    Parameters that were not loaded and low-rank adapters are never frozen. A tensor that is frozen completely requires no gradient. Where
    only some rows were loaded (such as the stems of known tasks, next to the stem of a new task), the gradients of these rows are zeroed
    before clipping, and the rows are restored after the optimizer step.

    Args:
        network: of the run.
        freeze: "none", "torso", "torso:N" (the first N layers of the torso, the stem included) or "all_but_heads".
        unfreeze_at: step per task at which the parameters are unfrozen; None: never.

    Raises:
        ValueError: the torso has fewer layers than N.

    Attributes:
        is_unfrozen: whether `unfreeze_at` was reached.
    """

    name = "freezing"

    def __init__(self, network: MultiTaskNetwork, *, freeze: str = "none", unfreeze_at: int | None = None):
        self.unfreeze_at = unfreeze_at
        self.is_unfrozen = False
        self._network = network
        self._pieces = _pieces_to_freeze(network, freeze)
        self._names = {piece.tensor for piece in self._pieces}
        self._loaded: LoadedRows = {}
        self._kept_parameters: list[Kept] = []
        self._kept_buffers: list[Kept] = []

    @property
    def is_requested(self) -> bool:
        """Whether the configuration freezes any parameters."""
        return bool(self._names)

    @property
    def is_active(self) -> bool:
        """Whether the run starts with frozen parameters."""
        return any(name in self._loaded for name in self._names)

    @property
    def frozen(self) -> set[str]:
        """Names of parameters that are frozen now, completely or in part."""
        return set() if self.is_unfrozen else {name for name in self._names if name in self._loaded}

    @property
    def count(self) -> int:
        """Number of scalar parameters that are frozen now, without padding."""
        frozen = self.frozen
        pieces = [each for each in self._pieces if each.tensor in frozen and each.is_in(self._loaded[each.tensor])]
        return count_parameters(self._network, pieces)

    def freeze(self, loaded: LoadedRows) -> None:
        """Freeze loaded parameters. Afterwards the learner must be rebuilt."""
        self._loaded = dict(loaded)
        self._apply()

    def _apply(self) -> None:
        self._kept_parameters, self._kept_buffers = [], []
        frozen = self.frozen
        for name, parameter in self._network.named_parameters():
            is_complete = self._loaded.get(name) is None
            parameter.requires_grad_(not (name in frozen and is_complete))
            if name in frozen and is_complete:
                parameter.grad = None
            elif name in frozen:
                self._kept_parameters.append(self._keep(name, parameter))
        for name, buffer in self._network.named_buffers():
            if self._loaded.get(name) and weight_of(name) in frozen:
                self._kept_buffers.append(self._keep(name, buffer))

    def _keep(self, name: str, tensor: torch.Tensor) -> Kept:
        """Copy the loaded rows of a tensor."""
        is_trained = torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
        is_trained[torch.tensor(self._loaded[name], device=tensor.device)] = False
        return tensor, is_trained.view(-1, *(1,) * (tensor.dim() - 1)), tensor.detach().clone()

    # -- moments of an update -----------------------------------------------------------------------------------------------

    def before_update(self, step: int) -> None:
        """Unfreeze the parameters at `unfreeze_at`, with fresh optimizer state."""
        if self.unfreeze_at is None or self.is_unfrozen or not self.is_active or step < self.unfreeze_at:
            return
        unfrozen = sorted(self.frozen)
        self.is_unfrozen = True
        self._apply()
        if self.learner is not None:
            self.learner.optimizer.reset_state([self._network.get_parameter(name) for name in unfrozen])
            self.learner.rebuild()

    @torch.no_grad()
    def before_losses(self) -> None:
        """Restore the singular vectors of frozen rows after a power iteration."""
        _restore(self._kept_buffers)

    def before_step(self) -> None:
        """Zero the gradients of frozen rows."""
        for parameter, is_trained, _ in self._kept_parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(is_trained)

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore frozen rows."""
        _restore(self._kept_parameters)
        _restore(self._kept_buffers)

    def row_masks(self, parameters: Sequence[torch.nn.Parameter]) -> dict[int, torch.Tensor]:
        masks = {id(tensor): is_trained for tensor, is_trained, _ in self._kept_parameters}
        return {index: masks[id(parameter)] for index, parameter in enumerate(parameters) if id(parameter) in masks}

    # -- messages and state -------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        return {"transfer/frozen": float(self.count)} if self.is_active else {}

    def describe_unfreezing(self) -> str:
        """Describe the parameters that are unfrozen at `unfreeze_at`, in a line."""
        pieces = [piece for piece in self._pieces if piece.tensor in self._loaded]
        layers = sorted({piece.layer + 1 for piece in pieces if piece.layer is not None})
        named = [f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} of the torso"] if layers else []
        others = ["the sharing structure"] if any(piece.layer is None for piece in pieces) else []
        return f"unfroze {' and '.join(named + others)} at step {self.unfreeze_at:,}; all parameters are trained"

    def state_dict(self) -> dict[str, Any]:
        return {"loaded": dict(self._loaded), "is_unfrozen": self.is_unfrozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`, after the parameters of the network.

        Raises:
            ValueError: the state is of another network.
        """
        parameters = self._network.state_dict()
        for name, rows in state["loaded"].items():
            if name not in parameters or not (rows is None or all(0 <= row < len(parameters[name]) for row in rows)):
                raise ValueError(f"the loaded rows of {name} are not of this network")
        self.is_unfrozen = bool(state["is_unfrozen"])
        self.freeze(state["loaded"])
        if self.is_active and self.learner is not None:
            self.learner.rebuild()


Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A partly frozen tensor, the mask of its trained rows, and a copy of its values."""


def _restore(kept: Sequence[Kept]) -> None:
    for tensor, is_trained, values in kept:
        tensor.copy_(torch.where(is_trained, tensor, values))


def layers_of(network: MultiTaskNetwork) -> int:
    """Return the number of layers of the torso."""
    return 1 + max((part.layer for part in parts_of(network).values() if part.layer is not None), default=-1)


def _pieces_to_freeze(network: MultiTaskNetwork, freeze: str) -> list[Piece]:
    """Return the pieces of the parameters that `freeze` selects."""
    if freeze == "none":
        return []
    layers = layers_of(network)
    frozen_layers = int(freeze.partition(":")[2] or layers)
    if not 1 <= frozen_layers <= layers:
        raise ValueError(f"transfer.freeze={freeze}: the torso has {layers} layers with its stem; expected torso:1 to torso:{layers}")
    kinds = ("torso", "sharing") if freeze == "all_but_heads" else ("torso",)
    names_of_tasks = [str(task) for task in range(network.sharing.num_tasks)]
    names = {name for name, _ in network.named_parameters()}
    pieces = [piece for piece in pieces_of(network, names_of_tasks).values() if piece.tensor in names and piece.kind in kinds]
    return [piece for piece in pieces if piece.layer is None or piece.layer < frozen_layers]
