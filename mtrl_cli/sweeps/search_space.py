"""The words of `mtrl sweep` taken apart: those of the sweep, those that all its runs have, and those that its runs differ in."""

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

from mtrl_cli.config.overrides import PATHS
from mtrl_cli.errors import UserError, did_you_mean, nearest, quoted, show

Value = str | int | float
"""Of one key in one trial: a choice as the word that it was written as, a number drawn from an interval."""

MOST_CHOICES = 10_000
"""Of one key: a longer range is a slip of the hand."""

OF_THE_SWEEP = ("run_dir", "trusted_packages")
NEVER_VARIED = {
    "run_dir": "a sweep is one folder",
    "trusted_packages": "it is for all runs",
    "device": "where a run is worked on is for the launcher",
    "ranks": "it is for torchrun to say",
    "hydra.searchpath": "it is for all runs",
}
"""Keys that runs of one sweep cannot differ in, and why."""

_FUNCTIONS = ("bool", "choice", "float", "glob", "int", "interval", "range", "shuffle", "sort", "str", "tag")
_CALL = re.compile(r"\s*(\w+)\(.*", re.DOTALL)


@dataclass(frozen=True)
class Choices:
    """The values that a key may take, each as the word that stands behind `KEY=`: `film`, `null`, `[a,b]`, `0`."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class NumberRange:
    """The numbers from `low` to `high`, both included, that a key may take.

    Attributes:
        low, high: the ends.
        log: whether numbers are drawn uniformly on a logarithmic scale.
        is_integer: whether only integers are drawn.
    """

    low: float
    high: float
    log: bool = False
    is_integer: bool = False


@dataclass(frozen=True)
class Words:
    """A command line of `mtrl sweep`.

    Attributes:
        sweep: `sweep.*`, `launcher=…`, `launcher.*`, `run_dir=`, `trusted_packages=`, and the user's folders of configuration.
        shared: what all runs have; the user's folders again.
        axes: what they differ in, by key, in the order in which it was given.
    """

    sweep: tuple[str, ...]
    shared: tuple[str, ...]
    axes: Mapping[str, Choices | NumberRange]


def take_apart(words: Sequence[str]) -> Words:
    """Sort the words of a command line.

    Raises:
        UserError: a key stands twice, a word holds an interpolation, or several values cannot be read or used.
    """
    of_sweep, shared, axes = [], [], {}
    seen: dict[str, str] = {}
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if "${" in word:
            raise UserError(
                f"{show(word)}: the words of a sweep are kept, and no interpolation ('${{') in them is resolved: write the value"
            )
        if key in seen:
            raise UserError(f"{key} is given twice, as {show(seen[key])} and as {show(word)}: expected it once")
        seen[key] = word
        axis = axis_of(word)
        if axis is not None:
            _refuse_where_never_varied(key, word)
            axes[key] = axis
        elif key in OF_THE_SWEEP or is_of_the_sweep(key):
            of_sweep.append(word)
        else:
            shared.append(word)
            if key == "hydra.searchpath":
                of_sweep.append(word)
    return Words(tuple(of_sweep), tuple(shared), axes)


def is_of_the_sweep(key: str) -> bool:
    """Whether a key is `sweep.…`, `launcher` or `launcher.…`."""
    return re.split(r"[./@]", key, maxsplit=1)[0] in ("sweep", "launcher")


def _refuse_where_never_varied(key: str, word: str) -> None:
    if key in NEVER_VARIED:
        raise UserError(f"{show(word)}: the runs of a sweep cannot differ in {key}, as {NEVER_VARIED[key]}; expected one value")
    if is_of_the_sweep(key) or key.split(".")[0] == "hydra":
        raise UserError(f"{show(word)}: expected one value, as this is of the sweep and not of its runs")


def axis_of(word: str) -> Choices | NumberRange | None:
    """The values that a word gives to its key, where these are several in Hydra's grammar; else None.

    Raises:
        UserError: they cannot be read, or not be used.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = word.partition("=")
    if key in PATHS and not (key == "init_from" and value.startswith("choice(")):
        return None  # a path may hold anything
    is_list_of_paths = key in PATHS and "," in value and value.endswith(")")
    try:
        # Hydra's choice() takes no null, the same values without it do.
        parsed = OverridesParser.create().parse_override(f"{key}={value[len('choice(') : -1]}" if is_list_of_paths else word)
    except HydraException as error:
        _refuse_if_meant(word, value, error)
        return None  # text, as for a run
    if not parsed.is_sweep_override():
        return None
    if parsed.package is not None:
        raise UserError(f"{show(word)}: a group has one place here; write {parsed.key_or_group}={value}")
    return _axis(word, value, parsed._value)


def _refuse_if_meant(word: str, value: str, error: Exception) -> None:
    """Refuse what can only have been meant as several values, and would be taken as text."""
    call = _CALL.fullmatch(value)
    if call and call[1] in _FUNCTIONS:
        reason = str(error).splitlines()[0].partition(": ")[2] or str(error).splitlines()[0]
        raise UserError(f"{show(word)} cannot be read: {show(reason)}")
    pieces = _pieces(value)
    if value[:1] not in ("[", "{", "(") and len(pieces) > 1:
        quoted = ",".join(piece if re.fullmatch(r"[\w.-]+", piece) else f"'{piece}'" for piece in pieces if piece)
        raise UserError(f"{show(word)}: expected values between commas, text with other signs in quotes: {word.partition('=')[0]}={quoted}")


def _axis(word: str, value: str, sweep: Any) -> Choices | NumberRange:
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    if not isinstance(sweep, ChoiceSweep | IntervalSweep | RangeSweep):
        raise UserError(f"{show(word)}: glob is not used here; name the values, {word.partition('=')[0]}=NAME,NAME")
    if isinstance(sweep, IntervalSweep):
        return _interval(word, sweep)
    if sweep.tags:
        raise UserError(f"{show(word)}: a tag has a meaning for intervals only: tag(log,interval(1e-5,1e-3))")
    if isinstance(sweep, ChoiceSweep):
        elements, words = list(sweep.list), _written(value, sweep.list)
    else:
        elements = list(itertools.islice(_steps(word, sweep), MOST_CHOICES + 1))
        words = [as_word(each) for each in elements]
    if not words:
        raise UserError(f"{show(word)} holds no value: expected such as range(5), or range(0,1,0.1)")
    if len(words) > MOST_CHOICES:
        raise UserError(f"{show(word)} holds more than {MOST_CHOICES:,} values: expected fewer, or an interval to choose from")
    count = Counter(map(_comparable, elements))
    repeated = next((text for text, each in zip(words, elements, strict=True) if count[_comparable(each)] > 1), None)
    if repeated is not None:
        raise UserError(f"{show(word)} holds {show(repeated)} twice: expected each value once")
    if sweep.shuffle:  # in the same order each time, or the same command would be another sweep
        random.Random(hashlib.sha256(word.encode()).digest()).shuffle(words)
    return Choices(tuple(words))


def _interval(word: str, sweep: Any) -> NumberRange:
    low, high, tags = sweep.start, sweep.end, set(sweep.tags)
    if tags - {"log"}:
        raise UserError(
            f"{show(word)}: the tag {show(sorted(tags - {'log'})[0])} has no meaning here; expected tag(log,interval(1e-5,1e-3))"
        )
    if not (isinstance(low, int | float) and isinstance(high, int | float) and math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{show(word)}: expected an interval from a number to a larger one, such as interval(0.1,0.9)")
    if "log" in tags and low <= 0:
        raise UserError(f"{show(word)}: a logarithmic scale has no {low:g}; expected an interval that begins above 0")
    return NumberRange(low, high, log="log" in tags, is_integer=isinstance(low, int) and isinstance(high, int))


def _steps(word: str, sweep: Any) -> Iterator[int | float]:
    """The numbers of a range; of fractions as they are written, without the error of sums of binary ones."""
    start, stop, step = sweep.start, sweep.stop, sweep.step
    if not all(isinstance(each, int) or math.isfinite(each) for each in (start, stop, step)) or step == 0:
        raise UserError(f"{show(word)}: expected a range with a step that is not 0, such as range(0,1,0.1)")
    if all(isinstance(each, int) for each in (start, stop, step)):
        return iter(range(start, stop, step))
    first, last, by = (Decimal(repr(each)) for each in (start, stop, step))
    return map(float, itertools.takewhile(lambda each: each < last if by > 0 else each > last, (first + by * n for n in itertools.count())))


def _written(value: str, elements: Sequence[Any]) -> list[str]:
    """The elements of a choice as the user wrote them, where that can be told; else as words that read the same."""
    call = _CALL.fullmatch(value)
    inner = value.strip()[len("choice(") : -1] if call and call[1] == "choice" else value
    pieces = [piece.strip() for piece in _pieces(inner)]
    if len(pieces) == len(elements) and all(_reads_as(piece, each) for piece, each in zip(pieces, elements, strict=True)):
        return pieces
    return [as_word(each) for each in elements]


def _pieces(text: str) -> list[str]:
    """Text taken apart at its commas, but for those in brackets, in quotes or behind a backslash."""
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


def _reads_as(word: str, element: Any) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"key={word}")
    except HydraException:
        return False
    return not parsed.is_sweep_override() and _comparable(parsed._value) == _comparable(element)


def as_word(element: Any) -> str:
    """A value as a word that stands behind `KEY=` and reads as that value again: null, true, 1e-05, film, 'a b', [1,2], {a:1}."""
    from hydra.core.override_parser.types import QuotedString

    if element is None or isinstance(element, bool):
        return {None: "null", True: "true", False: "false"}[element]
    if isinstance(element, list):
        return "[" + ",".join(as_word(each) for each in element) + "]"
    if isinstance(element, dict):
        return "{" + ",".join(f"{as_word(key)}:{as_word(each)}" for key, each in element.items()) + "}"
    if isinstance(element, str):
        return element if re.fullmatch(r"[A-Za-z_][\w./-]*", element) and _reads_as(element, element) else _in_quotes(element)
    return _in_quotes(element.text) if isinstance(element, QuotedString) else repr(element)


def _in_quotes(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _comparable(element: Any) -> Any:
    """What two equal values have in common, and no others: 1 and 1.0 are one number, true and 1 are two values."""
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


def near_miss(words: Sequence[str]) -> str | None:
    """What to say of a word that is nearly one of a sweep's: `swep.trials=3`. None if there is none."""
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        top = key.partition(".")[0]
        near = nearest(top, ["sweep", "launcher"], cutoff=0.8)
        if near and top != near:
            return f"unknown key {quoted(key)}. {did_you_mean(near + key.removeprefix(top), '')}"
    return None
