"""Which parameters stand still: those that were loaded from a source and are frozen, until they thaw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mtrl_cli.networks.lora import LowRank
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import parts_of
from mtrl_cli.networks.per_task import Stacked, TaskOwned, weight_of

Rows = Mapping[str, list[int] | None]
"""Of each tensor of which something was loaded, by name, the rows that were; None: all of it."""


class Freezing:
    """Holds loaded parts of a network still up to certain steps.

    What was not loaded is never frozen, nor are low-rank adapters. A tensor that is frozen as a whole requires no gradient: so it takes
    part in nothing. Of one of which some rows were loaded (each task's own stem, where one task is new) the gradients of those rows are
    dropped before they are clipped, and the rows put back after the optimizer's step, whatever that does to them.

    Which are frozen at a step follows from the arguments, from what was loaded and from the step alone. Steps are per task.

    Args:
        network: of the run.
        freeze: "none", "torso", "torso:N" (its first N layers, the stem being the first) or "all_but_heads".
        unfreeze_at: the step at which frozen parts thaw; None: never.
        gradual: the last frozen layer thaws then, the one before at twice that step, and so on, down to the input.

    Raises:
        ValueError: the torso has fewer layers than N.

    Attributes:
        stage: how many thaws there have been.
        moments: the steps at which something thaws.
    """

    def __init__(self, network: MultiTaskNetwork, *, freeze: str = "none", unfreeze_at: int | None = None, gradual: bool = False):
        self._network = network
        self._thaws = _thaws(network, freeze, unfreeze_at, gradual)
        self._sizes = _sizes_of_rows(network)
        self._loaded: Rows = {}
        self.stage = 0
        self.moments: list[int] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @property
    def is_asked(self) -> bool:
        """Whether anything would be frozen, were all of it loaded."""
        return bool(self._thaws)

    @property
    def is_any(self) -> bool:
        """Whether anything is frozen at first."""
        return any(name in self._loaded for name in self._thaws)

    def stage_at(self, step: int) -> int:
        """How many thaws there have been by a step."""
        return sum(moment <= step for moment in self.moments)

    def begin(self, loaded: Rows) -> None:
        """Freeze what was loaded, at step 0."""
        self._know(loaded)
        self.move_to(0)

    def _know(self, loaded: Rows) -> None:
        self._loaded = dict(loaded)
        self.moments = sorted({thaw for name, thaw in self._thaws.items() if thaw is not None and name in loaded})

    def move_to(self, stage: int) -> list[torch.nn.Parameter]:
        """Freeze what is frozen after so many thaws, and nothing else. Returns what has thawed by it, wholly or in part."""
        parameters = dict(self._network.named_parameters())
        before, now = self._still(self.stage), self._still(stage)
        self.stage, self._kept = stage, []
        for name, parameter in parameters.items():
            is_whole = self._loaded.get(name) is None
            parameter.requires_grad_(not (name in now and is_whole))
            if name in now and is_whole:
                parameter.grad = None
            elif name in now:
                self._keep(name, parameter)
        for name, buffer in self._network.named_buffers():
            if self._loaded.get(name) and weight_of(name) in now:
                self._keep(name, buffer)
        return [parameters[name] for name in sorted(before - now)]

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Remember the rows of a tensor that were loaded."""
        is_trained = torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
        is_trained[torch.tensor(self._loaded[name], device=tensor.device)] = False
        self._kept.append((tensor, is_trained.view(-1, *(1,) * (tensor.dim() - 1)), tensor.detach().clone()))

    def _still(self, stage: int) -> set[str]:
        """The tensors that are frozen, wholly or in part, after so many thaws."""
        return {name for name, thaw in self._thaws.items() if name in self._loaded and thaw not in self.moments[:stage]}

    def trained_rows(self, parameters: Sequence[torch.nn.Parameter]) -> dict[int, torch.Tensor]:
        """Of those of some parameters that are frozen in part, by position: which rows are trained, bool, to be multiplied with."""
        masks = {id(tensor): mask for tensor, mask, _ in self._kept}
        return {index: masks[id(parameter)] for index, parameter in enumerate(parameters) if id(parameter) in masks}

    def drop_gradients(self) -> None:
        """Before gradients are clipped: those of frozen rows count for nothing."""
        for parameter, mask, _ in self._kept:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def put_back(self) -> None:
        """After the parameters have been moved: frozen rows have not been."""
        for parameter, mask, kept in self._kept:
            parameter.copy_(torch.where(mask, parameter, kept))

    @property
    def number(self) -> int:
        """How many parameters are frozen now, without padding."""
        total = 0
        for name, parameter in self._network.named_parameters():
            if name in self._still(self.stage):
                sizes, rows = self._sizes.get(name, {}), self._loaded[name]
                total += sum(sizes[row] for row in (sizes if rows is None else rows)) if sizes else parameter.numel()
        return total

    def what_thawed(self, stage: int) -> str:
        """A line on what the thaw that leads to a stage let go."""
        before, now = self._still(stage - 1), self._still(stage)
        parts = parts_of(self._network)
        layers = sorted({part.layer + 1 for name in before - now if (part := parts[name]).layer is not None})
        others = any(parts[name].layer is None for name in before - now)
        named = [f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} of the torso"] if layers else []
        left = f"{len(now)} tensors stay frozen" if now else "nothing is frozen any more"
        return f"thawed at step {self.moments[stage - 1]:,}: {' and '.join(named + ['the sharing structure'] * others)}; {left}"

    def state_dict(self) -> dict[str, Any]:
        return {"loaded": dict(self._loaded), "stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave; the network has its parameters.

        Raises:
            ValueError: it is of another network.
        """
        loaded = state.get("loaded", {})  # older checkpoints know none
        parameters = self._network.state_dict()
        for name, rows in loaded.items():
            if name not in parameters or not (rows is None or all(0 <= row < len(parameters[name]) for row in rows)):
                raise ValueError(f"what was loaded of {name} is not of this network")
        self._know(loaded)
        self.move_to(int(state.get("stage", 0)))


def _sizes_of_rows(network: MultiTaskNetwork) -> dict[str, dict[int, int]]:
    """Of each tensor whose rows are several modules' or tasks', how many parameters a row has without padding."""
    parameters, sizes = dict(network.named_parameters()), dict[str, dict[int, int]]()
    for path, module in network.named_modules():
        if isinstance(module, TaskOwned | Stacked):
            for each in module.slices():
                row = each.index[0]
                assert isinstance(row, int)
                if (name := f"{path}.{each.parameter}") in parameters:
                    sizes.setdefault(name, {})[row] = parameters[name][each.index].numel()
    return sizes


def layers_of(network: MultiTaskNetwork) -> int:
    """How many layers a network's torso has."""
    return 1 + max((part.layer for part in parts_of(network).values() if part.layer is not None), default=-1)


def _thaws(network: MultiTaskNetwork, freeze: str, unfreeze_at: int | None, gradual: bool) -> dict[str, int | None]:
    """The step at which each parameter thaws (None: never) that `freeze` names."""
    if freeze == "none":
        return {}
    layers = layers_of(network)
    frozen = int(freeze.partition(":")[2] or layers)
    if not 1 <= frozen <= layers:
        raise ValueError(f"transfer.freeze={freeze}: the torso has {layers} layers, its stem included; expected torso:1 to torso:{layers}")
    adapters = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, LowRank))
    found: dict[str, int | None] = {}
    for name, part in parts_of(network).items():
        if name.startswith(adapters) or part.kind == "heads" or (part.kind == "sharing" and freeze != "all_but_heads"):
            continue
        # What the structure adds lies behind the torso, and thaws with its last layer.
        layer = frozen - 1 if part.layer is None else part.layer
        if layer < frozen:
            found[name] = None if unfreeze_at is None else unfreeze_at * (frozen - layer if gradual else 1)
    return found
