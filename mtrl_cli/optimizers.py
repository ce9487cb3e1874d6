"""How gradients move parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from mtrl_cli.fields import Fraction, NonNegativeFloat, PositiveFloat


class Optimizer(ABC):
    """A torch optimizer with gradient clipping.

    Args:
        parameters: what is trained.
        lr, lr_final: step size at the start of a run, and the share of it that is left at the end, reached linearly.
        max_grad_norm: gradients are scaled down to this global norm; 0: never.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, lr_final: float, max_grad_norm: float):
        self.parameters = parameters
        self._lr, self._lr_final = lr, lr_final
        self._max_grad_norm = max_grad_norm
        # On a GPU the step size is a tensor there, which a recorded update reads anew each time.
        self._on_gpu = any(parameter.is_cuda for parameter in parameters)
        self._optimizer = self.make(parameters, torch.tensor(lr, device=parameters[0].device) if self._on_gpu else lr, self._on_gpu)

    def at(self, progress: float) -> None:
        """Set the step size for a moment of the run, 0 at its start and 1 at its end."""
        lr = self._lr * (1 - (1 - self._lr_final) * min(1.0, progress))
        for group in self._optimizer.param_groups:
            if self._on_gpu:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @abstractmethod
    def make(self, parameters: list[torch.nn.Parameter], lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        """torch's optimizer, whose steps a CUDA graph can hold where `capturable`."""

    def step(self) -> torch.Tensor:
        """Clip, move, and forget the gradients. Returns the gradient's global norm before clipping (scalar, on the device)."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm or torch.inf)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def forget(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Let the optimizer begin with parameters as if it had never moved them."""
        for parameter in parameters:
            self._optimizer.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """State of each parameter, by its position: `{"0": {"exp_avg": ...}, ...}`. Options come from the configuration."""
        return {str(index): dict(values) for index, values in self._optimizer.state_dict()["state"].items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": {int(index): values for index, values in state.items()}, "param_groups": groups})
        # A file knows no layout, and fused optimizers read moments in that of their parameter.
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015).

    Args:
        lr: step size at the start.
        lr_final: the share of it that is left at the end of the run, reached linearly; 1: constant.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        max_grad_norm: gradients are scaled down to this global norm; 0: never.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        *,
        lr: PositiveFloat,
        lr_final: Fraction = 1.0,
        eps: PositiveFloat,
        weight_decay: NonNegativeFloat,
        max_grad_norm: NonNegativeFloat,
    ):
        self._options: dict[str, Any] = {"eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, lr, lr_final, max_grad_norm)

    def make(self, parameters: list[torch.nn.Parameter], lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr, **self._options, fused=True, capturable=capturable)


class RAdam(Optimizer):
    """Adam whose first steps are shorter, as far as the gradients' variance is not known yet (Liu et al. 2020, "RAdam").

    Args:
        lr: step size at the start.
        lr_final: the share of it that is left at the end of the run, reached linearly; 1: constant.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        max_grad_norm: gradients are scaled down to this global norm; 0: never.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        *,
        lr: PositiveFloat,
        lr_final: Fraction = 1.0,
        eps: PositiveFloat,
        weight_decay: NonNegativeFloat,
        max_grad_norm: NonNegativeFloat,
    ):
        self._options: dict[str, Any] = {"eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, lr, lr_final, max_grad_norm)

    def make(self, parameters: list[torch.nn.Parameter], lr: float | torch.Tensor, capturable: bool) -> torch.optim.Optimizer:
        return torch.optim.RAdam(parameters, lr, **self._options, foreach=True, capturable=capturable)
