"""Split the overrides of `mtrl sweep` into those of the sweep, those of all runs, and those that differ between runs."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mtrl_cli.config.overrides import PATHS, parse
from mtrl_cli.errors import UserError, did_you_mean, nearest, quoted, show

Value = str | int | float
"""The value of a key in a run: a choice as it was written, or a number from an interval."""

MOST_CHOICES = 10_000
"""Limit of the values of a key: a longer range is probably a mistake."""

NEVER_VARIED = {
    "run_dir": "a sweep has one folder",
    "trusted_packages": "it applies to all runs",
    "device": "the launcher chooses it",
    "ranks": "torchrun sets it",
    "hydra.searchpath": "it applies to all runs",
}
"""Keys that cannot differ between runs, and why."""

_FUNCTIONS = ("bool", "choice", "float", "glob", "int", "interval", "range", "shuffle", "sort", "str", "tag")
_CALL = re.compile(r"\s*(\w+)\(.*", re.DOTALL)


@dataclass(frozen=True)
class Choices:
    """The values of a key, each as text after `KEY=`: `film`, `null`, `[a,b]`, `0`."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class NumberRange:
    """The numbers from `low` to `high`, both included, as the values of a key.

    Attributes:
        low, high: the ends.
        log: whether numbers are drawn uniformly on a logarithmic scale.
        is_integer: whether only integers are drawn.
    """

    low: float
    high: float
    log: bool = False
    is_integer: bool = False


Axes = Mapping[str, Choices | NumberRange]
"""The values of the keys that differ between runs, in the given order."""


@dataclass(frozen=True)
class SplitOverrides:
    """The overrides of `mtrl sweep`, split into three parts.

    Attributes:
        sweep: overrides of `sweep.*`, `launcher`, `launcher.*`, `run_dir`, `trusted_packages` and `hydra.searchpath`.
        shared: overrides of all runs. `hydra.searchpath` is in both parts, because it applies to the sweep and to its runs.
        axes: the values of the keys that differ between runs, in the given order.
    """

    sweep: tuple[str, ...]
    shared: tuple[str, ...]
    axes: Axes


def key_of(override: str) -> str:
    """Return the key of an override: `agent.n_step` for `+agent.n_step=3`."""
    return override.lstrip("+~").partition("=")[0]


def overrides_of(values: Mapping[str, Value]) -> list[str]:
    """Return the overrides that set keys to values: `["network/sharing=film", "seed=3"]`."""
    return [f"{key}={value}" for key, value in values.items()]


def first_values(axes: Axes) -> dict[str, Value]:
    """Return the first choice, or the lower end of the interval, of each key."""
    return {key: axis.values[0] if isinstance(axis, Choices) else axis.low for key, axis in axes.items()}


def split_overrides(overrides: Sequence[str]) -> SplitOverrides:
    """Split overrides into those of the sweep, those of all runs, and the axes.

    Raises:
        UserError: a key is given twice, an override contains an interpolation, or its values are not valid.
    """
    of_sweep, shared, axes = [], [], {}
    seen: dict[str, str] = {}
    for override in overrides:
        key = key_of(override)
        if "${" in override:
            raise UserError(f"{show(override)}: interpolations ('${{') are not resolved in a sweep; write the value")
        if key in seen:
            raise UserError(f"{key} is given twice, as {show(seen[key])} and {show(override)}. Give the key once")
        seen[key] = override
        axis = axis_of(override)
        if axis is not None:
            _check_may_vary(key, override)
            axes[key] = axis
        elif is_of_the_sweep(key):
            of_sweep.append(override)
        else:
            shared.append(override)
            if key == "hydra.searchpath":
                of_sweep.append(override)
    return SplitOverrides(tuple(of_sweep), tuple(shared), axes)


def is_of_the_sweep(key: str) -> bool:
    """Return whether a key belongs to the sweep rather than to its runs."""
    return re.split(r"[./@]", key, maxsplit=1)[0] in ("sweep", "launcher", "run_dir", "trusted_packages")


def _check_may_vary(key: str, override: str) -> None:
    if key in NEVER_VARIED:
        raise UserError(f"{show(override)}: {key} cannot differ between runs, because {NEVER_VARIED[key]}. Give one value")
    if is_of_the_sweep(key) or key.split(".")[0] == "hydra":
        raise UserError(f"{show(override)}: the key belongs to the sweep, not to its runs. Give one value")


def axis_of(override: str) -> Choices | NumberRange | None:
    """Parse an override with several values in Hydra's grammar. Returns None for a single value.

    Raises:
        UserError: the values are not valid.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    if key in PATHS and not (key == "init_from" and value.startswith("choice(")):
        return None  # a path may contain any character
    is_list_of_paths = key in PATHS and "," in value and value.endswith(")")
    try:
        # Hydra's grammar accepts null between commas, but not in choice().
        parsed = OverridesParser.create().parse_override(f"{key}={value[len('choice(') : -1]}" if is_list_of_paths else override)
    except HydraException as error:
        _check_single_value(override, value, error)
        return None  # plain text, as in `mtrl train`
    if not parsed.is_sweep_override():
        return None
    if parsed.package is not None:
        raise UserError(f"{show(override)}: a group with @package is not supported; write {parsed.key_or_group}={value}")
    return _axis(override, value, parsed._value)


def _check_single_value(override: str, value: str, error: Exception) -> None:
    """Raise UserError if a value that Hydra's grammar does not accept was probably meant as several values."""
    call = _CALL.fullmatch(value)
    if call and call[1] in _FUNCTIONS:
        reason = str(error).splitlines()[0].partition(": ")[2] or str(error).splitlines()[0]
        raise UserError(f"{show(override)} cannot be parsed: {show(reason)}")
    pieces = _pieces(value)
    if value[:1] not in ("[", "{", "(") and len(pieces) > 1:
        quoted = ",".join(piece if re.fullmatch(r"[\w.-]+", piece) else f"'{piece}'" for piece in pieces if piece)
        raise UserError(
            f"{show(override)}: expected values between commas, quoted if they have special characters: "
            f"{override.partition('=')[0]}={quoted}"
        )


def _axis(override: str, value: str, sweep: Any) -> Choices | NumberRange:
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    if not isinstance(sweep, ChoiceSweep | IntervalSweep | RangeSweep):
        raise UserError(f"{show(override)}: glob is not supported; name the values: {override.partition('=')[0]}=NAME,NAME")
    if isinstance(sweep, IntervalSweep):
        return _interval(override, sweep)
    if sweep.tags:
        raise UserError(f"{show(override)}: only intervals have tags, such as tag(log,interval(1e-5,1e-3))")
    if isinstance(sweep, ChoiceSweep):
        elements, texts = list(sweep.list), _written(value, sweep.list)
    else:
        elements = list(itertools.islice(_steps(override, sweep), MOST_CHOICES + 1))
        texts = [as_text(each) for each in elements]
    if not texts:
        raise UserError(f"{show(override)} has no values. Give values such as range(5) or range(0,1,0.1)")
    if len(texts) > MOST_CHOICES:
        raise UserError(f"{show(override)} has more than {MOST_CHOICES:,} values. Give fewer values, or an interval")
    count = Counter(map(_comparable, elements))
    repeated = next((text for text, each in zip(texts, elements, strict=True) if count[_comparable(each)] > 1), None)
    if repeated is not None:
        raise UserError(f"{show(override)} has {show(repeated)} twice. Give each value once")
    if sweep.shuffle:  # the same order each time: the same command must be the same sweep
        random.Random(hashlib.sha256(override.encode()).digest()).shuffle(texts)
    return Choices(tuple(texts))


def _interval(override: str, sweep: Any) -> NumberRange:
    low, high, tags = sweep.start, sweep.end, set(sweep.tags)
    if tags - {"log"}:
        raise UserError(
            f"{show(override)}: unknown tag {show(sorted(tags - {'log'})[0])}; only log is supported: tag(log,interval(1e-5,1e-3))"
        )
    if not (isinstance(low, int | float) and isinstance(high, int | float) and math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{show(override)}: an interval must go from a number to a larger number, such as interval(0.1,0.9)")
    if "log" in tags and low <= 0:
        raise UserError(f"{show(override)}: a logarithmic interval must start above 0, got {low:g}")
    return NumberRange(low, high, log="log" in tags, is_integer=isinstance(low, int) and isinstance(high, int))


def _steps(override: str, sweep: Any) -> Iterator[int | float]:
    """Yield the numbers of a range, with decimal arithmetic for fractions: 0.1 + 0.2 is 0.3."""
    start, stop, step = sweep.start, sweep.stop, sweep.step
    if not all(isinstance(each, int) or math.isfinite(each) for each in (start, stop, step)) or step == 0:
        raise UserError(f"{show(override)}: the numbers of a range must be finite and its step not 0, such as range(0,1,0.1)")
    if all(isinstance(each, int) for each in (start, stop, step)):
        return iter(range(start, stop, step))
    first, last, by = (Decimal(repr(each)) for each in (start, stop, step))
    return map(float, itertools.takewhile(lambda each: each < last if by > 0 else each > last, (first + by * n for n in itertools.count())))


def _written(value: str, elements: Sequence[Any]) -> list[str]:
    """Return the elements of a choice as the user wrote them if that is unambiguous, or else in a form that parses to the same values."""
    call = _CALL.fullmatch(value)
    inner = value.strip()[len("choice(") : -1] if call and call[1] == "choice" else value
    pieces = [piece.strip() for piece in _pieces(inner)]
    if len(pieces) == len(elements) and all(_reads_as(piece, each) for piece, each in zip(pieces, elements, strict=True)):
        return pieces
    return [as_text(each) for each in elements]


def _pieces(text: str) -> list[str]:
    """Split text at its commas, except those in brackets or quotes or behind a backslash."""
    pieces, depth, quote, escaped = [""], 0, "", False
    for letter in text:
        if not quote and not escaped and depth == 0 and letter == ",":
            pieces.append("")
            continue
        pieces[-1] += letter
        if escaped or letter == "\\":
            escaped = not escaped
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
    return pieces


def _reads_as(text: str, element: Any) -> bool:
    try:
        return bool(_comparable(parse(f"key={text}").value) == _comparable(element))
    except UserError:
        return False


def as_text(element: Any) -> str:
    """Format a value so that `KEY=` and the text parse to the value again: null, true, 1e-05, film, 'a b', [1,2], {a:1}."""
    from hydra.core.override_parser.types import QuotedString

    if element is None or isinstance(element, bool):
        return {None: "null", True: "true", False: "false"}[element]
    if isinstance(element, list):
        return "[" + ",".join(as_text(each) for each in element) + "]"
    if isinstance(element, dict):
        return "{" + ",".join(f"{as_text(key)}:{as_text(each)}" for key, each in element.items()) + "}"
    if isinstance(element, str):
        return element if re.fullmatch(r"[A-Za-z_][\w./-]*", element, re.ASCII) and _reads_as(element, element) else _in_quotes(element)
    return _in_quotes(element.text) if isinstance(element, QuotedString) else repr(element)


def _in_quotes(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _comparable(element: Any) -> Any:
    """Return a key that is equal for equal values only: 1 and 1.0 are equal, true and 1 differ."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(element, QuotedString):
        return "text", element.text
    if isinstance(element, list):
        return "list", tuple(_comparable(each) for each in element)
    if isinstance(element, dict):
        return "dict", tuple((_comparable(key), _comparable(each)) for key, each in element.items())
    if isinstance(element, float) and math.isnan(element):
        return "number", "nan"
    kind = "number" if isinstance(element, int | float) and not isinstance(element, bool) else type(element).__name__
    return ("text" if kind == "str" else kind), element


def near_miss(overrides: Sequence[str]) -> str | None:
    """Return an error for an override whose section is misspelled, such as `swep.trials=3`; otherwise None."""
    for override in overrides:
        key = key_of(override)
        top = key.partition(".")[0]
        near = nearest(top, ["sweep", "launcher"], cutoff=0.8)
        if near and top != near:
            return f"unknown key {quoted(key)}. {did_you_mean(near + key.removeprefix(top), '')}"
    return None
