"""Periodic resets against loss of plasticity."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import parts_of
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.networks.regularised import FIRST_ITERATIONS
from mtrl_cli.training.callbacks import Callback
from mtrl_cli.training.every import Every


class Resets(Callback):
    """Shrink and perturb (Ash and Adams 2020, "On Warm-Starting Neural Network Training", section 4) at an interval.

    The new value of a parameter is `shrink` times the old value plus 1 - `shrink` times the value of a freshly initialized network. 0 is a
    complete reset, as in Nikishin et al. 2022 and D'Oro et al. 2023; Schwarzer et al. 2023 ("BBF") use 0.5 for the encoder. The optimizer
    state of a reset parameter is cleared, and the target network takes the new value. Frozen parameters are not reset.

    Args:
        every: steps per task between resets, counted from the start of the run; there is no reset before the first update.
        shrink: weight of the old value.
        parts: parts of the network to reset: "torso", "sharing" (low-rank adapters included), "heads".
        last_step: last step at which a reset may happen.
        fresh: function that returns the freshly initialized network of the n-th reset; each call with n gives equal parameters.

    Attributes:
        made: number of resets so far.
    """

    name = "resets"

    def __init__(self, *, every: int, shrink: float, parts: Collection[str], last_step: float, fresh: Callable[[int], MultiTaskNetwork]):
        self.made = 0
        self._every = Every(every, last=-1)
        self._shrink = shrink
        self._parts = set(parts)
        self._last_step = last_step
        self._fresh = fresh

    def before_update(self, step: int) -> None:
        """Reset the network if an interval has passed since the last update."""
        number = step // self._every.interval
        is_due = self._every.last >= 0 and self._every.passed(step) and number * self._every.interval <= self._last_step
        self._every.last = step
        if is_due:
            self._reset(number)
            self.made += 1

    @torch.no_grad()
    def _reset(self, number: int) -> None:
        assert self.learner is not None
        network = self.learner.agent.network
        parts, fresh = parts_of(network), dict(self._fresh(number).named_parameters())
        chosen = {
            name: parameter for name, parameter in network.named_parameters() if parts[name].kind in self._parts and parameter.requires_grad
        }
        for name, parameter in chosen.items():
            parameter.copy_(self._shrink * parameter + (1 - self._shrink) * fresh[name])
        self.learner.after_parameter_change()
        for layer in spectral_layers(network):
            layer.power_step(times=FIRST_ITERATIONS)
        self.learner.after_parameter_change()
        self.learner.optimizer.reset_state(list(chosen.values()))
        self.learner.agent.sync_target(chosen)

    def metrics(self) -> dict[str, float]:
        return {"resets": float(self.made)}

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._every.last, "made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._every.last = int(state["last"])
        self.made = int(state["made"])
