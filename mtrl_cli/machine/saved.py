"""State of objects as dictionaries of their attributes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from mtrl_cli.machine import rng


class Saved:
    """Object whose state is a set of attributes: tensors, arrays, random generators, numbers, None and objects with a state.

    Attributes:
        saved: names of the attributes. The keys of the state are the same names without a leading underscore.
    """

    saved: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return the state. It holds the tensors and arrays themselves, not copies."""
        return {name.lstrip("_"): _state_of(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`. Tensors and arrays are changed in place.

        Raises:
            KeyError: the state lacks an attribute.
            ValueError: a tensor or an array has another shape in the state.
        """
        for name in self.saved:
            mine, value = getattr(self, name), state[name.lstrip("_")]
            if isinstance(mine, torch.Generator):
                rng.restore(mine, value)
            elif isinstance(mine, torch.Tensor | np.ndarray):
                if mine.shape != value.shape:
                    raise ValueError(f"{name.lstrip('_')} must have shape {tuple(mine.shape)}, got {tuple(value.shape)}")
                mine[...] = value
            elif hasattr(mine, "load_state_dict"):
                mine.load_state_dict(value)
            else:
                setattr(self, name, value)


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else value
