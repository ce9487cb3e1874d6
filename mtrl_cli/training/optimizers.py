"""How gradients move parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from mtrl_cli.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat

Groups = list[dict[str, Any]]
Schedule = Literal["constant", "linear", "cosine"]


def share_left(schedule: Schedule, final: float, progress: float) -> float:
    """The share of a learning rate that a schedule leaves at a moment of the run.

    Args:
        schedule: "constant" stays at 1, "linear" is a straight line from 1 to `final`, "cosine" half a wave (Loshchilov and Hutter 2017,
            "SGDR", equation 5, without restarts).
        final: the share at the end.
        progress: 0 at the start of the run, 1 at its end.
    """
    progress = min(1.0, progress)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - (1 - final) * progress
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


class Optimizer(ABC):
    """A torch optimizer with gradient clipping, a learning-rate schedule, and learning-rate factors of parts of the network.

    The keyword-only parameters here are keys of every class whose own constructor hands its further keywords (`**common`) to this one,
    as it does with what it is given of the network (`parameters` and `kinds`).

    Args:
        parameters: what is trained, in the order of the network. One without a gradient is left alone: it neither moves nor decays.
        kinds: of each parameter, the part of the network that it belongs to (`parts.py`); None: unknown.
        lr: step size at the start.
        lr_final: the share of it that is left at the end of the run.
        schedule: how it gets there (`share_left`); "constant": it does not.
        warm_up: steps per task, from the first update, over which the step size grows linearly from 0, whatever the schedule.
        factors: of the step sizes of single parts: "torso", "sharing" (what a sharing structure adds to the torso), "heads".
        max_grad_norm: gradients are scaled down to this global norm; 0: never.

    Attributes:
        capturable: whether a step can be recorded once and replayed (`capture.py`).

    Raises:
        ValueError: a schedule that would change nothing, or factors of parts that are not known.
    """

    capturable: ClassVar[bool] = True
    _options: dict[str, Any]

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        kinds: Sequence[str] | None = None,
        *,
        lr: PositiveFloat,
        lr_final: Fraction = 1.0,
        schedule: Literal["constant", "linear", "cosine"] = "linear",
        warm_up: NonNegativeInt = 0,
        factors: dict[Literal["torso", "sharing", "heads"], PositiveFloat] = {},  # noqa: B006 (a literal, so that the schema can read it)
        max_grad_norm: NonNegativeFloat,
    ):
        if schedule == "cosine" and lr_final == 1:
            raise ValueError(
                "optimizer.schedule=cosine changes nothing with optimizer.lr_final=1: say which share is left at the end, "
                "for example optimizer.lr_final=0"
            )
        self.parameters = list(parameters)
        self._lr, self._lr_final, self._schedule, self._warm_up = lr, lr_final, schedule, warm_up
        self._max_grad_norm = max_grad_norm
        # On a GPU step sizes are tensors there, which a recorded update reads anew each time.
        self._on_gpu = any(parameter.is_cuda for parameter in self.parameters)
        groups = _grouped(self.parameters, kinds, factors)
        self._factors = [group.pop("factor") for group in groups]
        for group, factor in zip(groups, self._factors, strict=True):
            group["lr"] = self._on_device(lr * factor)
        self._optimizer = self.make(groups, self._on_device(lr), self._on_gpu)

    def _on_device(self, lr: float) -> float | torch.Tensor:
        return torch.tensor(lr, device=self.parameters[0].device) if self._on_gpu else lr

    def at(self, progress: float, learning_for: float = math.inf) -> None:
        """Set the step sizes for a moment of the run.

        Args:
            progress: 0 at its start and 1 at its end.
            learning_for: steps per task since the first update, for the warm-up; below 0 before it was due, as where an update is timed.
        """
        lr = self._lr * share_left(self._schedule, self._lr_final, progress)
        if 0 < self._warm_up > learning_for:
            lr *= max(0.0, learning_for) / self._warm_up
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            if self._on_gpu:
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor

    @abstractmethod
    def make(self, groups: Groups, lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        """torch's optimizer of groups with step sizes of their own, whose steps a CUDA graph can hold where `capturable`."""

    def step(self) -> torch.Tensor:
        """Clip, move, and forget the gradients. Returns the gradient's global norm before clipping (scalar, on the device)."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm or torch.inf)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def forget(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Start some of the parameters anew: their moments and counts of steps become what they were before their first step."""
        for parameter in parameters:
            # In place: a recorded step goes on with these very tensors. All that torch's optimizers keep begins with zeros.
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def state_dict(self) -> dict[str, Any]:
        """State of each parameter that has any, by its position among all: `{"0": {"exp_avg": ...}, ...}`. Options come from the
        configuration."""
        states = ((index, self._optimizer.state.get(parameter)) for index, parameter in enumerate(self.parameters))
        return {str(index): dict(values) for index, values in states if values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, whatever groups the parameters were in."""
        in_groups = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        position = {id(parameter): index for index, parameter in enumerate(in_groups)}
        states = {position[id(self.parameters[int(index)])]: values for index, values in state.items()}
        self._optimizer.load_state_dict({"state": states, "param_groups": self._optimizer.state_dict()["param_groups"]})
        # A file knows no layout, and fused optimizers read moments in that of their parameter.
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _grouped(parameters: Sequence[torch.nn.Parameter], kinds: Sequence[str] | None, factors: Mapping[Any, float]) -> Groups:
    """One group for each factor that parameters have, in the order in which they first occur."""
    if not factors:
        return [{"params": list(parameters), "factor": 1.0}]
    if kinds is None:
        raise ValueError(f"optimizer.factors={dict(factors)}: the parts of this network are not known")
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for parameter, kind in zip(parameters, kinds, strict=True):
        groups.setdefault(factors.get(kind, 1.0), []).append(parameter)
    return [{"params": members, "factor": factor} for factor, members in groups.items()]


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015).

    Args:
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
    """

    def __init__(self, *network: Any, eps: PositiveFloat, weight_decay: NonNegativeFloat, **common: Any):
        self._options = {"eps": eps, "weight_decay": weight_decay}
        super().__init__(*network, **common)

    def make(self, groups: Groups, lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr, **self._options, fused=True, capturable=capturable)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2): each step also takes lr * weight_decay of a parameter.

    Args:
        eps: added to the denominator.
        weight_decay: the decay, times the step size.
    """

    def __init__(self, *network: Any, eps: PositiveFloat, weight_decay: NonNegativeFloat, **common: Any):
        self._options = {"eps": eps, "weight_decay": weight_decay}
        super().__init__(*network, **common)

    def make(self, groups: Groups, lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr, **self._options, fused=True, capturable=capturable)


class RAdam(Optimizer):
    """Adam whose first steps are shorter, as far as the gradients' variance is not known yet (Liu et al. 2020, "RAdam").

    Args:
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
    """

    def __init__(self, *network: Any, eps: PositiveFloat, weight_decay: NonNegativeFloat, **common: Any):
        self._options = {"eps": eps, "weight_decay": weight_decay}
        super().__init__(*network, **common)

    def make(self, groups: Groups, lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        return torch.optim.RAdam(groups, lr, **self._options, foreach=True, capturable=capturable)


class RMSprop(Optimizer):
    """RMSProp (Tieleman and Hinton 2012); centred (Graves 2013, equations 38 to 45) as the first DQN was trained.

    Args:
        alpha: decay of the running means.
        eps: added to the denominator, after the root is taken.
        momentum: of the steps.
        centred: divide by an estimate of the gradient's standard deviation rather than of its root mean square.
        weight_decay: L2 penalty, added to the gradient.
    """

    def __init__(
        self,
        *network: Any,
        alpha: Fraction,
        eps: PositiveFloat,
        momentum: Fraction,
        centred: bool,
        weight_decay: NonNegativeFloat,
        **common: Any,
    ):
        self._options = {
            "alpha": alpha,
            "eps": eps,
            "momentum": momentum,
            "centered": centred,
            "weight_decay": weight_decay,
        }
        super().__init__(*network, **common)

    def make(self, groups: Groups, lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr, **self._options, foreach=True, capturable=capturable)


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013).

    Args:
        momentum: share of the last step's direction in the next; 0: none.
        nesterov: look ahead along it.
        weight_decay: L2 penalty, added to the gradient.

    Raises:
        ValueError: nesterov without momentum.
    """

    def __init__(
        self,
        *network: Any,
        momentum: Fraction,
        nesterov: bool,
        weight_decay: NonNegativeFloat,
        **common: Any,
    ):
        if nesterov and not momentum:
            raise ValueError("optimizer.nesterov=true needs optimizer.momentum above 0, for example 0.9")
        self._options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(*network, **common)

    def make(self, groups: Groups, lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr, **self._options, fused=True)  # fused reads lr on the device, and so is always capturable

    def step(self) -> torch.Tensor:
        if self._options["momentum"]:
            # torch takes a whole group's first step at once; parameters that join later begin with zeros, which is the same.
            for parameter in self.parameters:
                if parameter.grad is not None and not self._optimizer.state[parameter]:
                    self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step()
