"""Validation of configurations: unknown and missing keys, and the type of every value. `cross_checks.py` checks combinations of values.

The keys of a section with a class (`_target_`) are the keyword-only parameters of the class. The keys of all other sections are in
`schema.py`. Nothing is imported (see `introspection.py`).
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import TypeAdapter, ValidationError

from mtrl_cli.config import options
from mtrl_cli.config.cross_checks import check_combinations
from mtrl_cli.config.introspection import KINDS, MISSING, SEVERAL, SWEEP_KINDS, UNKNOWN, Key, class_name, kind_of, read
from mtrl_cli.config.schema import OWN_KEYS, SECTIONS, keys_of
from mtrl_cli.errors import UserError, did_you_mean, nearest, quoted, show, unknown

LARGEST, LARGEST_FLOAT = 2**63, 1e30

NOT_PASSED = {"network": {"parameters"}}
"""Keys of OWN_KEYS that are not passed to the class."""


def validate(config: Any, *, command: str = "train", trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Check a configuration and fill in default values.

    Args:
        config: a composed or loaded configuration; untrusted.
        command: `train`, `eval` or `sweep`.
        trusted: packages other than mtrl_cli whose classes may be named.

    Returns: a new dictionary of plain values with every key. Integers become floats where a float is expected.

    Raises:
        UserError: a key is unknown or missing, a value has the wrong type, a class is not allowed, or values contradict each other.
    """
    checked = _Checker(command, trusted).section("", config)
    if command == "train":
        check_combinations(checked, trusted)
    return checked


def dotted_keys(config: Any, *, command: str = "train", trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Return all keys that this configuration may contain (`agent.n_step`), with their annotations. Invalid sections are skipped."""
    return dict(_Checker(command, trusted).walk("", config))


class _Checker:
    """Checks a configuration section by section. A section is named by its path, `network/head`; the root is the empty path."""

    def __init__(self, command: str, trusted: Sequence[str]):
        self.sections = SECTIONS[command]
        self.kinds = {"train": KINDS, "sweep": SWEEP_KINDS}.get(command, {})
        self.trusted = trusted
        self.whole: Any = None

    def section(self, path: str, node: Any) -> dict[str, Any]:
        if path == "":
            self.whole = node
        if not isinstance(node, Mapping):
            hint = f". Choose an option with {path}=NAME (see `mtrl ls {path}`)" if path in {**KINDS, **SWEEP_KINDS} else ""
            raise UserError(f"{_dotted(path) or 'the configuration'} must be a section of keys and values, got {show(node)}{hint}")
        if path in SEVERAL:
            return {name: self.section(f"{path}/{name}", inner) for name, inner in self.several(path, node).items()}
        keys, children = self.keys(path, node), self.children(path)
        for name in node:
            if name not in {*keys, *children, *(["_target_"] if kind_of(path) else [])}:
                raise UserError(self.unknown(path, name, node))
        checked: dict[str, Any] = {"_target_": node["_target_"]} if kind_of(path) else {}
        for name, key in keys.items():
            value = node.get(name, key.default)
            if value is MISSING:
                raise UserError(f"{_join(path, name)} is missing. Set {_join(path, name)} to {describe(key.annotation)}")
            if value is not UNKNOWN:
                checked[name] = check_value(_join(path, name), value, key.annotation)
        for child in children:
            if child not in node:
                raise UserError(f"{_join(path, child)} is missing. Add a section of keys and values")
            checked[child] = self.section(f"{path}/{child}".lstrip("/"), node[child])
        return checked

    def keys(self, path: str, node: Mapping[str, Any]) -> dict[str, Key]:
        """Return the keys of a section, without its `_target_` and its inner sections."""
        kind = kind_of(path)
        if kind is None:
            return keys_of(self.sections[path])
        if "_target_" not in node:
            group, name = (path, "NAME") if path in self.kinds else path.rpartition("/")[::2]
            known = options.options(group, [options.conf_folder()])
            if name != "NAME" and name not in known:
                raise UserError(unknown("option", name, known, prefix=f"{group}="))
            chosen = "" if name == "NAME" else f": {show(name)} is not chosen"
            raise UserError(f"{_dotted(path)} has no _target_{chosen}. Choose an option with {group}={show(name)} (see `mtrl ls {group}`)")
        found = read(_join(path, "_target_"), node["_target_"], kind, self.trusted)
        return {**found.keys, **OWN_KEYS.get(path, {})}

    def several(self, path: str, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the sections of a group that takes several options."""
        for name, inner in node.items():
            if name == "_target_":
                raise UserError(
                    f"{path}._target_={show(inner)} must be in a separate section. Begin the option's file with `# @package {path}.NAME`"
                )
            if not isinstance(name, str) or not name.isidentifier() or not isinstance(inner, Mapping):
                owner = next((each for each in node if isinstance(node[each], Mapping) and name in node[each]), "NAME")
                raise UserError(f"unknown key {quoted(f'{path}.{name}')}. Use {path}.{show(owner)}.{show(name)}")
        return node

    def children(self, path: str) -> list[str]:
        """Return the names of the inner sections of a section."""
        return [name.rpartition("/")[2] for name in (*self.kinds, *self.sections) if name and name.rpartition("/")[0] == path]

    def walk(self, path: str, node: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, Mapping):
            return
        if path in SEVERAL:
            for name, inner in node.items():
                yield from self.walk(f"{path}/{name}", inner)
            return
        try:
            keys = self.keys(path, node)
        except UserError:
            keys = {}
        for name, key in keys.items():
            yield _join(path, name), key.annotation
        for child in self.children(path):
            yield from self.walk(f"{path}/{child}".lstrip("/"), node.get(child))

    def unknown(self, path: str, name: Any, node: Mapping[str, Any]) -> str:
        """Format the message for an unknown key, with the most similar key of the section, else of the whole configuration."""
        has_class = kind_of(path) is not None
        start = f"unknown key {quoted(_join(path, show(name)))}{f' in {class_name(node)}' if has_class else ''}. "
        if path == "" and (group := next((group for group in self.kinds if group.rpartition("/")[2] == name), None)):
            return f"{start}Choose an option with {group}={show(node[name])}"
        group = path if path in self.kinds else path.rpartition("/")[0]
        owner = next((option for option in _options_with(group, str(name)) if has_class), None)
        if owner is not None:
            return f"{start}Remove the key, or choose {group}={owner}, which has the key"
        here = [*self.keys(path, node), *self.children(path)]
        elsewhere = {each.rpartition(".")[2]: each for each in dict(self.walk("", self.whole))}
        near = nearest(str(name), here)
        # A key of another section is suggested only if its name is almost equal.
        meant = _join(path, near) if near else elsewhere.get(nearest(str(name), elsewhere, cutoff=0.6 if path == "" else 0.75) or "")
        return start + did_you_mean(meant, f"Keys of {_dotted(path) or 'the configuration'}: {', '.join(here) or 'none'}")


def _options_with(group: str, key: str) -> Iterator[str]:
    """Yield the built-in options of a group whose YAML contains a key."""
    for option, file in options.options(group, [options.conf_folder()]).items() if group else ():
        content = options.read_yaml(file)
        if key in content or key in (content.get(group) or {}):
            yield option


def check_value(key: str, value: Any, annotation: Any) -> Any:
    """Validate a value against an annotation. Strict: text is never a number, a bool never an int; an int may become a float.

    Raises:
        UserError: the value has another type or is out of range.
    """
    _refuse_huge(key, value)
    if isinstance(value, float) and value.is_integer() and takes_int(annotation):
        value = int(value)  # budgets are written as 1e6
    try:
        return _adapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        raise UserError(f"{key} must be {describe(annotation)}, got {quoted(value) if isinstance(value, str) else show(value)}") from None


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return _cached_adapter(annotation)
    except TypeError:  # a trusted package's annotation that cannot be hashed
        return TypeAdapter(annotation)


@cache
def _cached_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _refuse_huge(key: str, value: Any) -> None:
    """Refuse numbers that int64 or float32 cannot represent, also inside lists and mappings."""
    for each in [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []:
        _refuse_huge(key, each)
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{key} must be below 2**63, got {show(value)}")
    if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_FLOAT:
        raise UserError(f"{key} must be from -1e30 to 1e30, got {show(value)}")


def takes_int(annotation: Any) -> bool:
    """Return whether an annotation accepts integers and no other numbers."""
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType):
        kinds = [each for each in typing.get_args(annotation) if isinstance(each, type) or typing.get_origin(each) is not None]
        return float not in kinds and any(takes_int(each) for each in kinds)
    return annotation is int


def describe(annotation: Any) -> str:
    """Describe the values that an annotation accepts."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _describe_annotated(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(str, arguments[:-1])), str(arguments[-1])]))
    if origin is list:
        return "a list of names" if arguments[0] is str else f"a list, each {describe(arguments[0])}"
    if origin is dict:
        keys = "a mapping of names" if arguments[0] is str else f"a mapping of {describe(arguments[0])}"
        return f"{keys} to values, each {describe(arguments[1])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _describe_annotated(base: Any, metadata: Sequence[Any]) -> str:
    text = describe(base)
    noun = text.partition(" ")[2]  # integer, number
    for field in metadata:
        if getattr(field, "description", None):
            return str(field.description)
        bounds = {type(each): each for each in getattr(field, "metadata", [])}
        if Ge in bounds and Le in bounds:
            text += f" from {bounds[Ge].ge} to {bounds[Le].le}"
        elif Gt in bounds:
            text = f"a positive {noun}" if bounds[Gt].gt == 0 else f"{text} above {bounds[Gt].gt}"
        elif Ge in bounds:
            text = f"a non-negative {noun}" if bounds[Ge].ge == 0 else f"{text} of at least {bounds[Ge].ge}"
        elif MinLen in bounds:
            text = f"a non-empty {noun}"
    return text


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _join(path: str, name: str) -> str:
    return f"{_dotted(path)}.{name}" if path else name
