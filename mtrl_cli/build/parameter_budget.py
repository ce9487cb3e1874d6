"""`network.parameters`: the width that gives a network a wanted number of parameters.

A torso says which of its keys make it wider (`Torso.scaled_keys`). All are scaled by one common factor, found by bisection; where
rounding leaves a gap at the budget, one of them is moved alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mtrl_cli.errors import UserError

TOLERANCE = 0.02
"""How far from the budget a network may be."""

TRAINED_BYTES = 5 * 4
"""Of a parameter in training: itself, the target network's, its gradient and the optimizer's two moments, each a float32."""

UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}

Values = dict[str, Any]
Count = Callable[[Values], int]

# Factors that are tried, and where a bisection stops: at a size this near, or where neighbouring factors differ by no unit.
_LOWEST, _HIGHEST, _NEAR, _FINEST = 2.0**-20, 2.0**16, TOLERANCE / 4, 1 + 1e-6
# Where one key is moved alone, the others stand at the common factor times 2^(i/8), nearest first.
_STEPS_PER_OCTAVE, _OCTAVES = 8, 6


def parse(parameters: int | str) -> int:
    """A budget as a number: 1.7M is 1,700,000."""
    return parameters if isinstance(parameters, int) else round(float(parameters[:-1]) * UNITS[parameters[-1]])


def meets(size: int, budget: int) -> bool:
    """Whether a number of parameters is within the tolerance of a budget."""
    return abs(size - budget) <= TOLERANCE * budget


def check_memory(parameters: int | str, room: float) -> None:
    """Refuse a budget whose training would take more than `room` bytes.

    Raises:
        UserError: it names both.
    """
    needed = TRAINED_BYTES * parse(parameters)
    if needed > room:
        raise UserError(f"network.parameters={parameters} needs {needed / 2**30:.1f} GiB to be trained, and there are {room / 2**30:.1f}")


def fit(values: Mapping[str, Any], parameters: int | str, count: Count) -> Values:
    """The values of a torso's scaled keys with which a network has `budget` parameters, within 2%.

    Args:
        values: those keys as configured: units or channels (int, lists of them) and factors on them (float). Their ratios are kept
            as far as rounding allows; if they meet the budget already, they stay.
        parameters: how many in all, as `network.parameters` has it.
        count: from such values to the number of parameters; 0 where a network cannot be built with them.

    Raises:
        UserError: no width meets the budget; it names the nearest sizes that there are.
    """
    budget, start = parse(parameters), dict(values)
    sizes = _Sizes(count, budget)
    if meets(sizes.of(start), budget):
        return start
    places = list(_places(start))
    smallest = sizes.of(_scaled(start, dict.fromkeys(places, _LOWEST)))
    if smallest > budget and not meets(smallest, budget):
        raise UserError(f"network.parameters={parameters} is too small: at its least width this network has {smallest:,} parameters")
    common = _nearest(sizes, lambda factor: _scaled(start, dict.fromkeys(places, factor)), 1.0)
    found = _scaled(start, dict.fromkeys(places, common))
    if meets(sizes.of(found), budget):
        return found
    for step in range(_STEPS_PER_OCTAVE * _OCTAVES + 1):
        factors = {common * 2 ** (sign * step / _STEPS_PER_OCTAVE) for sign in (-1, 1)}
        moved = [_moved(sizes, start, place, factor) for factor in factors for place in places]
        near = [(abs(math.log(own / common)), widths) for own, widths in moved if meets(sizes.of(widths), budget)]
        if near:
            return min(near, key=lambda each: each[0])[1]
    raise UserError(f"network.parameters={parameters}: no width gives that within {TOLERANCE:.0%}; the nearest sizes are {sizes.around()}")


def _moved(sizes: _Sizes, start: Values, place: tuple[str, int], factor: float) -> tuple[float, Values]:
    """With one number moved alone and the others at a factor: its own factor, and the values, that come nearest to the budget."""
    others = dict.fromkeys(_places(start), factor)

    def along(own: float) -> Values:
        return _scaled(start, others | {place: own})

    own = _nearest(sizes, along, factor)
    return own, along(own)


class _Sizes:
    """Numbers of parameters by width, each counted once."""

    def __init__(self, count: Count, budget: int):
        self.budget = budget
        self._count = count
        self._known: dict[str, int] = {}

    def of(self, values: Values) -> int:
        key = repr(values)
        if key not in self._known:
            self._known[key] = self._count(values)
        return self._known[key]

    def around(self) -> str:
        """The nearest sizes below and above the budget that were met, in words."""
        below = [size for size in self._known.values() if 0 < size <= self.budget]
        above = [size for size in self._known.values() if size > self.budget]
        return " and ".join(f"{size:,}" for size in ([max(below)] if below else []) + ([min(above)] if above else []))


def _nearest(sizes: _Sizes, along: Callable[[float], Values], start: float) -> float:
    """The factor whose size is nearest to the budget. Sizes never fall along factors."""

    def size(factor: float) -> int:
        return sizes.of(along(factor))

    low = high = start
    while size(low) > sizes.budget and low > _LOWEST:
        low /= 2
    while size(high) < sizes.budget and high < _HIGHEST:
        high *= 2
    while high / low > _FINEST:
        middle = math.sqrt(low * high)
        if abs(size(middle) - sizes.budget) <= _NEAR * sizes.budget:
            return middle
        low, high = (middle, high) if size(middle) < sizes.budget else (low, middle)
    return min((low, high), key=lambda factor: abs(size(factor) - sizes.budget))


def _places(values: Values) -> Iterator[tuple[str, int]]:
    """All numbers in the values: a key, and the position in its list (0 where it holds no list)."""
    for key, value in values.items():
        yield from ((key, position) for position in range(len(value) if isinstance(value, list) else 1))


def _scaled(values: Values, factors: Mapping[tuple[str, int], float]) -> Values:
    return {
        key: [_times(each, factors[key, position]) for position, each in enumerate(value)]
        if isinstance(value, list)
        else _times(value, factors[key, 0])
        for key, value in values.items()
    }


def _times(value: float, factor: float) -> float:
    """A whole number stays one, of at least 1; others keep five digits, as they are written into a configuration."""
    return max(1, round(value * factor)) if isinstance(value, int) else float(f"{value * factor:.5g}")
