"""Find the width that gives a network the number of parameters in `network.parameters`.

A torso names the keys that set its width (`Torso.scaled_keys`). All these keys are scaled by one common factor, found by bisection. Where
rounding leaves a gap at the budget, one key is scaled separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mtrl_cli.errors import UserError

TOLERANCE = 0.02
"""Relative deviation from the budget that is accepted."""

TRAINED_BYTES = 5 * 4
"""Bytes per parameter in training: parameter, target parameter, gradient and two moments of the optimizer, each float32."""

UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}

Values = dict[str, Any]
Count = Callable[[Values], int]

# Range of factors, and where a bisection stops: at a size within _NEAR of the budget, or at a ratio of neighboring factors of _FINEST.
_LOWEST, _HIGHEST, _NEAR, _FINEST = 2.0**-20, 2.0**16, TOLERANCE / 4, 1 + 1e-6
# Where one key is scaled separately, the other keys have the common factor times 2^(i/8), nearest first.
_STEPS_PER_OCTAVE, _OCTAVES = 8, 6


def parse(parameters: int | str) -> int:
    """Convert a budget to a number: 1.7M is 1,700,000."""
    return parameters if isinstance(parameters, int) else round(float(parameters[:-1]) * UNITS[parameters[-1]])


def meets(size: int, budget: int) -> bool:
    """Return whether a number of parameters is within the tolerance of a budget."""
    return abs(size - budget) <= TOLERANCE * budget


def check_memory(parameters: int | str, room: float) -> None:
    """Refuse a budget whose training requires more than `room` bytes.

    Raises:
        UserError: the message names both sizes.
    """
    needed = TRAINED_BYTES * parse(parameters)
    if needed > room:
        raise UserError(
            f"network.parameters={parameters} requires {needed / 2**30:.1f} GiB in training, but {room / 2**30:.1f} GiB are free. "
            "Use a smaller network"
        )


def fit(values: Mapping[str, Any], parameters: int | str, count: Count) -> Values:
    """Return the values of a torso's scaled keys that give a network the number of parameters, within 2%.

    Args:
        values: the configured values: units or channels (int, or lists of int) and factors on them (float). Their ratios are kept as far
            as rounding allows. Values that already meet the budget are unchanged.
        parameters: the total number, as in `network.parameters`.
        count: function that returns the number of parameters for given values; 0 where no network can be built.

    Raises:
        UserError: no width meets the budget; the message names the nearest sizes.
    """
    budget, start = parse(parameters), dict(values)
    sizes = _Sizes(count, budget)
    if meets(sizes.of(start), budget):
        return start
    smallest = sizes.of(_scaled(start, _LOWEST))
    if smallest > budget and not meets(smallest, budget):
        raise UserError(
            f"network.parameters must be at least {smallest:,}, the size of this network at its smallest width, got {parameters}"
        )
    common = _nearest(sizes, lambda factor: _scaled(start, factor), 1.0)
    found = _scaled(start, common)
    if meets(sizes.of(found), budget):
        return found
    for step in range(_STEPS_PER_OCTAVE * _OCTAVES + 1):
        factors = {common * 2 ** (sign * step / _STEPS_PER_OCTAVE) for sign in (-1, 1)}
        moved = [_moved(sizes, start, place, factor) for factor in factors for place in range(len(_numbers(start)))]
        near = [(abs(math.log(own / common)), widths) for own, widths in moved if meets(sizes.of(widths), budget)]
        if near:
            return min(near, key=lambda each: each[0])[1]
    raise UserError(
        f"network.parameters={parameters} is not within {TOLERANCE:.0%} of any size of this network. Use a nearby size: {sizes.around()}"
    )


def _moved(sizes: _Sizes, start: Values, place: int, factor: float) -> tuple[float, Values]:
    """Scale all widths by `factor`, but fit the width at `place` to the budget. Return the factor of that width, and all widths."""
    own = _nearest(sizes, lambda candidate: _scaled(start, factor, place, candidate), factor)
    return own, _scaled(start, factor, place, own)


class _Sizes:
    """Cache of the numbers of parameters by width."""

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
        """Format the nearest sizes below and above the budget among those counted."""
        below = [size for size in self._known.values() if 0 < size <= self.budget]
        above = [size for size in self._known.values() if size > self.budget]
        return " or ".join(f"{size:,}" for size in ([max(below)] if below else []) + ([min(above)] if above else []))


def _nearest(sizes: _Sizes, along: Callable[[float], Values], start: float) -> float:
    """Return the factor whose size is nearest to the budget. Sizes are non-decreasing in the factor."""

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


def _numbers(values: Values) -> list[float]:
    return [each for value in values.values() for each in (value if isinstance(value, list) else [value])]


def _scaled(values: Values, factor: float, place: int = -1, own: float = 1.0) -> Values:
    """Scale all numbers of the values by `factor`, except the number at index `place`, which is scaled by `own`."""
    scaled = (_times(number, own if index == place else factor) for index, number in enumerate(_numbers(values)))
    return {key: [next(scaled) for _ in value] if isinstance(value, list) else next(scaled) for key, value in values.items()}


def _times(value: float, factor: float) -> float:
    """Scale a value. An integer stays an integer of at least 1; a float is rounded to five digits, as in config.yaml."""
    return max(1, round(value * factor)) if isinstance(value, int) else float(f"{value * factor:.5g}")
