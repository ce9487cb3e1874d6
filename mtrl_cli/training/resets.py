"""Periodic resets against loss of plasticity."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from mtrl_cli.agents.agent import Agent
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import parts_of
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.networks.regularised import FIRST_ITERATIONS
from mtrl_cli.training.optimizers import Optimizer


class Resets:
    """Shrink and perturb (Ash and Adams 2020, "On Warm-Starting Neural Network Training", section 4) every so often: each parameter keeps
    a share of its value, and the rest is that of a freshly initialised network. A share of 0 resets whole, as in Nikishin et al. 2022 and
    D'Oro et al. 2023; 0.5 is what Schwarzer et al. 2023 ("BBF") give the encoder. What the optimizer knows of a parameter is forgotten,
    and a target network takes the new value. Frozen parameters stay as they are.

    Args:
        every: steps per task from one to the next, counted from the start of the run; there is none before the first update.
        shrink: the share that is kept.
        parts: of the network that are reset: "torso", "sharing" (low-rank adapters among it), "heads".
        last_step: no reset comes later.
        fresh: the n-th reset's network of new parameters, the same for the same n.

    Attributes:
        made: how many there were.
    """

    def __init__(self, *, every: int, shrink: float, parts: Collection[str], last_step: float, fresh: Callable[[int], MultiTaskNetwork]):
        self._every, self._shrink, self._parts, self._last_step, self._fresh = every, shrink, set(parts), last_step, fresh
        self._passed: int | None = None
        self.made = 0

    def make_what_is_due(self, step: int, agent: Agent, optimizer: Optimizer, put_back: Callable[[], None] = lambda: None) -> None:
        """Before an update at a step (per task): reset, if the step is the first at or beyond a multiple of the interval.

        Args:
            put_back: gives frozen rows of what is else trained their values again.
        """
        number = step // self._every
        if self._passed is not None and number > self._passed and number * self._every <= self._last_step:
            self._reset(number, agent, optimizer, put_back)
            self.made += 1
        self._passed = number

    @torch.no_grad()
    def _reset(self, number: int, agent: Agent, optimizer: Optimizer, put_back: Callable[[], None]) -> None:
        network, parts = agent.network, parts_of(agent.network)
        fresh = dict(self._fresh(number).named_parameters())
        chosen = {
            name: parameter for name, parameter in network.named_parameters() if parts[name].kind in self._parts and parameter.requires_grad
        }
        for name, parameter in chosen.items():
            parameter.copy_(self._shrink * parameter + (1 - self._shrink) * fresh[name])
        put_back()
        for layer in spectral_layers(network):
            layer.power_step(times=FIRST_ITERATIONS)
        put_back()
        optimizer.forget(list(chosen.values()))
        agent.sync_target(chosen)

    def state_dict(self) -> dict[str, Any]:
        return {"passed": -1 if self._passed is None else self._passed, "made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        passed = int(state["passed"])
        self._passed, self.made = None if passed < 0 else passed, int(state["made"])
