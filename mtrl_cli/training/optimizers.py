"""Optimizers with gradient clipping and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from mtrl_cli.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat


def lr_factor(schedule: str, final: float, progress: float) -> float:
    """Factor of the learning rate at a point of the run.

    Args:
        schedule: "constant" is 1, "linear" falls linearly from 1 to `final`, "cosine" is half a wave (Loshchilov and Hutter 2017, "SGDR",
            equation 5, without restarts).
        final: the factor at the end of the run.
        progress: 0 at the start of the run, 1 at the end.
    """
    progress = min(1.0, progress)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - (1 - final) * progress
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


class Optimizer:
    """A torch optimizer with gradient clipping, a learning-rate schedule, and learning-rate factors of parts of the network.

    The keyword-only parameters are keys of every optimizer whose constructor passes further keywords (`**common`) to this one.
    `parameters` and `kinds` are passed by position.

    Args:
        parameters: trained parameters, in the order of the network. A parameter without a gradient neither moves nor decays.
        kinds: part of the network of each parameter (`networks/parts.py`); (): no part has a factor.
        lr: initial learning rate.
        lr_final: share of the learning rate at the end of the run.
        schedule: of the learning rate (`lr_factor`).
        warm_up: steps per task, from the first update, over which the learning rate grows linearly from 0.
        factors: of the learning rates of single parts: "torso", "sharing" (parameters that a sharing structure adds), "heads".
        weight_decay: L2 penalty, added to the gradient; with AdamW the decay of the parameters, multiplied by the learning rate.
        max_grad_norm: largest global gradient norm; 0: no clipping.
        options: further options of the torch optimizer.

    Attributes:
        kind: class of the torch optimizer.
        implementation: option of the torch optimizer that selects its fastest implementation.
        capturable: whether a CUDA graph can record a step (`machine/cuda_graphs.py`).

    Raises:
        ValueError: a schedule without effect, or factors without `kinds`.
    """

    capturable: ClassVar[bool] = True
    kind: ClassVar[Callable[..., torch.optim.Optimizer]]
    implementation: ClassVar[str] = "fused"

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        kinds: Sequence[str] = (),
        *,
        lr: PositiveFloat,
        lr_final: Fraction = 1.0,
        schedule: Literal["constant", "linear", "cosine"] = "linear",
        warm_up: NonNegativeInt = 0,
        factors: dict[Literal["torso", "sharing", "heads"], PositiveFloat] = {},  # noqa: B006 (a literal, so that the schema can read it)
        weight_decay: NonNegativeFloat = 0.0,
        max_grad_norm: NonNegativeFloat,
        **options: Any,
    ):
        if schedule == "cosine" and lr_final == 1:
            raise ValueError(
                "optimizer.schedule=cosine has no effect with optimizer.lr_final=1: set the final share of the learning rate, "
                "for example optimizer.lr_final=0"
            )
        self.parameters = list(parameters)
        self._lr = lr
        self._lr_final = lr_final
        self._schedule = schedule
        self._warm_up = warm_up
        self._max_grad_norm = max_grad_norm
        # On a GPU learning rates are tensors on the device, which every replay of a CUDA graph reads.
        self._on_gpu = any(parameter.is_cuda for parameter in self.parameters)
        by_factor = _by_factor(self.parameters, kinds, factors)
        self._factors = list(by_factor)
        groups = [{"params": members, "lr": self._on_device(lr * factor)} for factor, members in by_factor.items()]
        if self._on_gpu and self.kind is not torch.optim.SGD:  # fused steps of SGD can always be recorded
            options["capturable"] = True
        self._optimizer = self.kind(groups, self._on_device(lr), weight_decay=weight_decay, **options, **{self.implementation: True})

    def _on_device(self, lr: float) -> float | torch.Tensor:
        return torch.tensor(lr, device=self.parameters[0].device) if self._on_gpu else lr

    def set_lr(self, progress: float, learning_for: float = math.inf) -> None:
        """Set the learning rates for a point of the run.

        Args:
            progress: 0 at the start and 1 at the end.
            learning_for: steps per task since the first update, for the warm-up; negative before that update, as in benchmarks.
        """
        lr = self._lr * lr_factor(self._schedule, self._lr_final, progress)
        if 0 < self._warm_up > learning_for:
            lr *= max(0.0, learning_for) / self._warm_up
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            if self._on_gpu:
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor

    def clip_gradients(self) -> torch.Tensor:
        """Clip the gradients. Returns their global norm before clipping (scalar, on the device)."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm or torch.inf)

    def step(self) -> None:
        """Update the parameters and delete the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def reset_state(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Reset the moments and step counts of parameters to their initial values."""
        for parameter in parameters:
            # In place, because CUDA graphs use these tensors. All state of torch's optimizers starts at zero.
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parameters by position: `{"0": {"exp_avg": ...}, ...}`. Hyperparameters are not part of the state."""
        states = ((index, self._optimizer.state.get(parameter)) for index, parameter in enumerate(self.parameters))
        return {str(index): dict(values) for index, values in states if values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`, independent of parameter groups."""
        in_groups = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        position = {id(parameter): index for index, parameter in enumerate(in_groups)}
        states = {position[id(self.parameters[int(index)])]: values for index, values in state.items()}
        self._optimizer.load_state_dict({"state": states, "param_groups": self._optimizer.state_dict()["param_groups"]})
        # Checkpoints store contiguous tensors, but fused optimizers require the memory layout of the parameter.
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _by_factor(
    parameters: Sequence[torch.nn.Parameter], kinds: Sequence[str], factors: Mapping[Any, float]
) -> dict[float, list[torch.nn.Parameter]]:
    """Group parameters by factor, in the order of first occurrence."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    if factors and not kinds:
        raise ValueError(f"optimizer.factors={dict(factors)} requires the part of the network of each parameter, got none")
    for parameter, kind in zip(parameters, kinds or [""] * len(parameters), strict=True):
        groups.setdefault(factors.get(kind, 1.0), []).append(parameter)
    return groups


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015).

    Args:
        eps: added to the denominator.
        common: see `Optimizer`.
    """

    kind = torch.optim.Adam

    def __init__(self, *network: Any, eps: PositiveFloat, **common: Any):
        super().__init__(*network, eps=eps, **common)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2): each step subtracts lr * weight_decay * parameter.

    Args:
        eps: added to the denominator.
        common: see `Optimizer`.
    """

    kind = torch.optim.AdamW

    def __init__(self, *network: Any, eps: PositiveFloat, **common: Any):
        super().__init__(*network, eps=eps, **common)


class RAdam(Optimizer):
    """Adam with shorter first steps while the variance of the gradients is uncertain (Liu et al. 2020, "RAdam").

    Args:
        eps: added to the denominator.
        common: see `Optimizer`.
    """

    kind = torch.optim.RAdam
    implementation = "foreach"

    def __init__(self, *network: Any, eps: PositiveFloat, **common: Any):
        super().__init__(*network, eps=eps, **common)


class RMSprop(Optimizer):
    """RMSProp (Tieleman and Hinton 2012); centred (Graves 2013, equations 38 to 45) as in the original DQN.

    Args:
        alpha: decay of the running means.
        eps: added to the denominator, after the square root.
        momentum: of the steps.
        centred: divide by the estimated standard deviation of the gradient instead of its root mean square.
        common: see `Optimizer`.
    """

    kind = torch.optim.RMSprop
    implementation = "foreach"

    def __init__(self, *network: Any, alpha: Fraction, eps: PositiveFloat, momentum: Fraction, centred: bool, **common: Any):
        super().__init__(*network, alpha=alpha, eps=eps, momentum=momentum, centered=centred, **common)


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013).

    Args:
        momentum: share of the previous step in the next; 0: none.
        nesterov: use Nesterov momentum.
        common: see `Optimizer`.

    Raises:
        ValueError: nesterov without momentum.
    """

    kind = torch.optim.SGD

    def __init__(self, *network: Any, momentum: Fraction, nesterov: bool, **common: Any):
        if nesterov and not momentum:
            raise ValueError("optimizer.nesterov=true requires optimizer.momentum above 0, for example 0.9")
        super().__init__(*network, momentum=momentum, nesterov=nesterov, **common)

    def step(self) -> None:
        if self._optimizer.defaults["momentum"]:
            # torch initialises the buffers of a group together; zeros for parameters that join later are equivalent.
            for parameter in self.parameters:
                if parameter.grad is not None and not self._optimizer.state[parameter]:
                    self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        super().step()
