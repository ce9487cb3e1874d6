"""The types of a configuration: every key, and what its value must be. Which values make no sense together: `combinations.py`.

The sections that hold a class (`_target_`) take the keyword-only parameters of that class; the others are the dataclasses of `sections.py`.
Nothing is imported for it (see `signatures.py`).
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import TypeAdapter, ValidationError

from mtrl_cli.config import options as catalogue
from mtrl_cli.config.cross_checks import check_combinations
from mtrl_cli.config.introspection import KINDS, KINDS_OF_SWEEPS, MISSING, SEVERAL, UNKNOWN, Key, Signature, class_name, kind_of, read
from mtrl_cli.config.options import nearest
from mtrl_cli.config.schema import OWN_KEYS, SECTIONS, keys_of
from mtrl_cli.errors import UserError, show

LARGEST, LARGEST_FLOAT = 2**63, 1e30

NONE_BEFORE = "mtrl_cli.augmentation.NoAugmentation"
"""What stood for no augmentation when there was one section for all."""

NOT_THE_CLASSES = {"network": {"parameters"}}  # those of them that are not given to the class


def validate(config: Any, *, command: str = "train", trusted: Sequence[str] = (), root: Path | None = None) -> dict[str, Any]:
    """Check a configuration and fill in the defaults that it leaves out.

    Args:
        config: what was composed or loaded: untrusted.
        command: `train`, `eval` or `sweep`.
        trusted: packages other than ours whose classes may be named.
        root: the folder of our package.

    Returns: a new dictionary of plain values; every key is there, whole numbers where a float is expected are floats.

    Raises:
        UserError: a key that does not exist or is missing, a value of a wrong type, a class that may not be named,
            or a combination that makes no sense.
    """
    checked = _Checker(command, trusted, root).section("", config)
    if command == "train":
        check_combinations(checked, trusted, root)
    return checked


def dotted_keys(config: Any, *, command: str = "train", trusted: Sequence[str] = (), root: Path | None = None) -> dict[str, Any]:
    """All keys that this configuration may hold (`agent.n_step`), with their annotations. Sections that are no sections are passed over."""
    return dict(_Checker(command, trusted, root).walk("", config))


class _Checker:
    """Walks a configuration section by section; a section is named by its path, `network/head`, the whole by the empty one."""

    def __init__(self, command: str, trusted: Sequence[str], root: Path | None):
        self.sections = SECTIONS[command]
        self.kinds = {"train": KINDS, "sweep": KINDS_OF_SWEEPS}.get(command, {})
        self.trusted = trusted
        self.root = root
        self.whole: Any = None

    def section(self, path: str, node: Any) -> dict[str, Any]:
        if path == "":
            self.whole = node
        if not isinstance(node, Mapping):
            raise UserError(f"{_dotted(path) or 'the configuration'}={show(node)}: expected a section of keys and values{_hint(path)}")
        if path in SEVERAL:
            return {name: self.section(f"{path}/{name}", inner) for name, inner in self.several(path, node).items()}
        keys = self.keys(path, node)
        children = self.children(path)
        allowed = {*keys, *children, *(["_target_"] if kind_of(path) else [])}
        for name in node:
            if name not in allowed:
                raise UserError(self.unknown(path, name, node))
        checked: dict[str, Any] = {"_target_": node["_target_"]} if kind_of(path) else {}
        for name, key in keys.items():
            value = node.get(name, key.default)
            if value is MISSING:
                raise UserError(f"{_join(path, name)} is missing: expected {describe(key.annotation)}")
            if value is not UNKNOWN:
                checked[name] = check_value(_join(path, name), value, key.annotation)
        for child in children:
            if child not in node and not self.may_be_left_out(f"{path}/{child}".lstrip("/")):
                raise UserError(f"{_join(path, child)} is missing: expected a section of keys and values")
            checked[child] = self.section(f"{path}/{child}".lstrip("/"), node.get(child, {}))
        return checked

    def may_be_left_out(self, path: str) -> bool:
        """Whether a section is one that older configurations do not have: all its keys have defaults."""
        return path in self.sections and all(key.default is not MISSING for key in keys_of(self.sections[path]).values())

    def keys(self, path: str, node: Mapping[str, Any]) -> dict[str, Key]:
        """The keys of a section, apart from its `_target_` and the sections within."""
        if not kind_of(path):
            return keys_of(self.sections[path])
        return {**self.signature(path, node).keys, **OWN_KEYS.get(path, {})}

    def signature(self, path: str, node: Mapping[str, Any]) -> Signature:
        kind = kind_of(path)
        assert kind is not None, path
        if "_target_" not in node:
            group, name = path.rpartition("/")[::2] if path not in self.kinds else (path, "NAME")
            options = catalogue.options(group, [catalogue.conf_folder()])
            if name != "NAME" and name not in options:
                raise UserError(f"{group}.{show(name)}: there is no such option; {catalogue.did_you_mean(name, options)}")
            chosen = "" if name == "NAME" else f"; {show(name)} is not chosen here"
            raise UserError(f"{_dotted(path)} has no _target_{chosen}: choose one of `mtrl ls {group}` with {group}={show(name)}")
        return read(_join(path, "_target_"), node["_target_"], kind, self.trusted, self.root)

    def several(self, path: str, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """The sections of a group of which several may be chosen. In runs from before, a section was that of a single class."""
        if node.get("_target_") == NONE_BEFORE and len(node) == 1:
            return {}
        for name, inner in node.items():
            if name == "_target_":
                raise UserError(
                    f"{path}._target_={show(inner)}: expected it in a section of its own; "
                    f"an option's file begins with `# @package {path}.NAME`"
                )
            if not isinstance(name, str) or not name.isidentifier() or not isinstance(inner, Mapping):
                owner = next((each for each in node if isinstance(node[each], Mapping) and name in node[each]), "NAME")
                raise UserError(f"{path}.{show(name)}={show(inner)}: expected {path}.{show(owner)}.{show(name)}, or another of its keys")
        return node

    def children(self, path: str) -> list[str]:
        """The names of the sections within a section."""
        below = [name for name in (*self.kinds, *self.sections) if name and name.rpartition("/")[0] == path]
        return [name.rpartition("/")[2] for name in below]

    def walk(self, path: str, node: Any) -> Iterator[tuple[str, Any]]:
        if path in SEVERAL:
            for name, inner in node.items() if isinstance(node, Mapping) else ():
                yield from self.walk(f"{path}/{name}", inner)
            return
        try:
            keys = self.keys(path, node) if isinstance(node, Mapping) else {}
        except UserError:
            keys = {}
        for name, key in keys.items():
            yield _join(path, name), key.annotation
        for child in self.children(path):
            if isinstance(node, Mapping):
                yield from self.walk(f"{path}/{child}".lstrip("/"), node.get(child))

    def unknown(self, path: str, name: Any, node: Mapping[str, Any]) -> str:
        """What to say about a key that does not exist: the nearest here, else the nearest anywhere."""
        word = _join(path, show(name))
        if path == "" and (group := next((group for group in self.kinds if group.rpartition("/")[2] == name), None)):
            return f"{word}: there is no such key; to choose one write {group}={show(node[name])}"
        group = path if path in self.kinds else path.rpartition("/")[0]
        owner = next((option for option in _options_with(group, str(name)) if kind_of(path)), None)
        if owner is not None:
            return f"{word}: there is no such key{_of(node, path)}; it is one of {group}={owner}"
        here = [*self.keys(path, node), *self.children(path)]
        elsewhere = {each.rpartition(".")[2]: each for each in dict(self.walk("", self.whole))}
        near = nearest(str(name), here)
        # A key of another section is what was meant only if it is that very word, or nearly so.
        meant = _join(path, near) if near else elsewhere.get(nearest(str(name), elsewhere, cutoff=0.6 if path == "" else 0.75) or "")
        what = f"did you mean {meant}?" if meant else f"{_dotted(path) or 'it'} takes {', '.join(here) or 'no keys'}"
        return f"{word}: there is no such key{_of(node, path)}; {what}"


def _options_with(group: str, key: str) -> Iterator[str]:
    """The options of a group, of ours, whose YAML holds a key."""
    for option, file in catalogue.options(group, [catalogue.conf_folder()]).items() if group else ():
        content = catalogue.read_yaml(file)
        if key in content or key in (content.get(group) or {}):
            yield option


def check_value(key: str, value: Any, annotation: Any) -> Any:
    """The value as its annotation has it. Strict: no text is a number, no bool an int; only an int may stand for a float.

    Raises:
        UserError: it is something else.
    """
    _refuse_huge(key, value)
    if isinstance(value, float) and value.is_integer() and takes_int(annotation):
        value = int(value)  # 1e6 is how one writes a budget
    try:
        return _adapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        raise UserError(f"{key}={show(value)}: expected {describe(annotation)}") from None


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return _cached_adapter(annotation)
    except TypeError:  # a trusted package's annotation that cannot be hashed
        return TypeAdapter(annotation)


@cache
def _cached_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _refuse_huge(key: str, value: Any) -> None:
    """Numbers that int64 or float32 cannot hold, wherever in a value they are."""
    for each in [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []:
        _refuse_huge(key, each)
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{key}={show(value)}: expected a number below 2**63")
    if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_FLOAT:
        raise UserError(f"{key}={show(value)}: expected a number from -1e30 to 1e30")


def takes_int(annotation: Any) -> bool:
    """Whether an annotation takes whole numbers and no others."""
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType):
        kinds = [each for each in typing.get_args(annotation) if isinstance(each, type) or typing.get_origin(each) is not None]
        return float not in kinds and any(takes_int(each) for each in kinds)
    return annotation is int


def describe(annotation: Any) -> str:
    """What an annotation expects, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _describe_annotated(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    if origin is Literal:
        return " or ".join(str(each) for each in arguments)
    if origin is list:
        return "a list of names" if arguments[0] is str else f"a list, each {describe(arguments[0])}"
    if origin is dict:
        what = "names with values" if arguments[0] is str else f"values for {describe(arguments[0])}"
        return f"{what}, each {describe(arguments[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _describe_annotated(base: Any, metadata: Sequence[Any]) -> str:
    words = describe(base)
    for field in metadata:
        if getattr(field, "description", None):
            return str(field.description)
        bounds = {type(each): each for each in getattr(field, "metadata", [])}
        if Ge in bounds and Le in bounds:
            words += f" from {bounds[Ge].ge} to {bounds[Le].le}"
        elif Gt in bounds:
            words += f" above {bounds[Gt].gt}"
        elif Ge in bounds:
            words += f" of at least {bounds[Ge].ge}"
        elif MinLen in bounds:
            words += f"{',' if ',' in words else ''} that is not empty"
    return words


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _join(path: str, name: str) -> str:
    return f"{_dotted(path)}.{name}" if path else name


def _hint(path: str) -> str:
    return f"; to choose one: {path}=NAME, see `mtrl ls {path}`" if path in {**KINDS, **KINDS_OF_SWEEPS} else ""


def _of(node: Mapping[str, Any], path: str) -> str:
    return f" in {class_name(node)}" if kind_of(path) and isinstance(node.get("_target_"), str) else ""
