"""Compose configuration files and overrides as Hydra does, for the part of Hydra's grammar that the package's own files use.

Importing Hydra and composing with it takes longer than the rest of `mtrl train --dry-run`. `compose` reads each file once per process and
merges copies. It raises `NeedsHydra` for everything else (interpolation in values, packages of defaults entries, deletions, mistakes);
the caller then composes with Hydra itself, which also writes the error message.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

SELF = "_self_"
GLOBAL = "_global_"
PACKAGE = re.compile(r"#\s*@package\s+(_global_|[A-Za-z]\w*(?:\.[A-Za-z]\w*)*)")
KEY = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*")
PLAIN = (str, int, float, bool, type(None))


class NeedsHydra(Exception):
    """The configuration uses something that only Hydra composes."""


def compose(name: str, folders: Sequence[Path], choices: Mapping[str, Any], values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Compose `conf/<name>.yaml` with its defaults list, then set values by dotted key.

    Args:
        name: the primary configuration: train, eval or sweep.
        folders: the search path; the first folder holds the primary configuration.
        choices: group to option, or to a list of options.
        values: dotted keys and their values, in order; a dictionary is merged into an existing one.

    Raises:
        NeedsHydra: anything that this function does not compose exactly as Hydra does.
    """
    tree = _Tree(folders, choices)
    config: dict[str, Any] = {}
    for package, content in tree.expand_root(name):
        _merge(config, _nested(package, content))
    for key, value in values:
        if not KEY.fullmatch(key) or any(part.isdigit() for part in key.split(".")):
            raise NeedsHydra(key)
        _check_plain(value)
        _merge(config, _nested(key, value))
    return config


class _Tree:
    """The defaults lists of all files: which options are chosen, and in which order their files are merged.

    A choice on the command line precedes `override` entries. Of those, the entry that is read first counts. As in Hydra, defaults
    lists are read from their last entry to their first.
    """

    def __init__(self, folders: Sequence[Path], choices: Mapping[str, Any]):
        self.folders = folders
        self.choices = dict(choices)
        self.chosen: dict[str, Any] = {}

    def expand_root(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """List packages and contents of all files in the order in which they are merged."""
        content, _ = self._read(name, optional=False)
        root = {key: value for key, value in content.items() if key != "defaults"}
        parts: list[list[tuple[str, dict[str, Any]]]] = []
        interpolated: list[tuple[int, str, str]] = []
        for entry in reversed(content.get("defaults") or [SELF]):
            if entry == SELF:
                parts.append([("", root)])
                continue
            group, option, optional = _group_entry(entry)
            if isinstance(option, str) and "${" in option and group not in self.choices:
                if not optional:
                    raise NeedsHydra(option)
                interpolated.append((len(parts), group, option))
                parts.append([])
                continue
            parts.append(self._expand_group(group, self.choices.get(group, option), optional))
        for index, group, option in interpolated:
            parts[index] = self._expand_interpolated(group, option)
        if set(self.choices) - set(self.chosen):
            raise NeedsHydra("an override of a group that is not in the defaults list")
        return [part for parts_of_entry in reversed(parts) for part in parts_of_entry]

    def _expand_group(self, group: str, option: Any, optional: bool) -> list[tuple[str, dict[str, Any]]]:
        if group in self.chosen:
            raise NeedsHydra(f"{group} appears twice")
        self.chosen[group] = option
        if option is None:
            return []
        if isinstance(option, list):
            expanded = [self._expand_file(f"{group}/{each}", group, optional) for each in reversed(option)]
            return [part for parts in reversed(expanded) for part in parts]
        return self._expand_file(f"{group}/{option}", group, optional)

    def _expand_interpolated(self, group: str, option: str) -> list[tuple[str, dict[str, Any]]]:
        names = re.findall(r"\$\{(\w+)\}", option)
        if option.count("$") != len(names) or not all(isinstance(self.chosen.get(name), str | None) for name in names):
            raise NeedsHydra(option)
        resolved = re.sub(r"\$\{(\w+)\}", lambda match: str(self.chosen.get(match[1])), option)
        before = len(self.choices)
        parts = self._expand_group(group, resolved, optional=True)
        if len(self.choices) != before:
            raise NeedsHydra("an override in an interpolated option")
        return parts

    def _expand_file(self, path: str, group: str, optional: bool) -> list[tuple[str, dict[str, Any]]]:
        content, package = self._read(path, optional)
        own = (group.replace("/", ".") if package is None else package, {key: value for key, value in content.items() if key != "defaults"})
        entries = content.get("defaults") or []
        siblings = [entry for entry in entries if not isinstance(entry, Mapping)]
        for entry in entries:
            if isinstance(entry, Mapping):
                self._add_override(entry)
        if siblings and SELF not in siblings:
            siblings.append(SELF)
        if not siblings:
            return [own]
        parts = []
        for entry in reversed(siblings):
            if entry == SELF:
                parts.append([own])
                continue
            if not isinstance(entry, str) or not re.fullmatch(r"\w+", entry) or own[0] != GLOBAL:
                raise NeedsHydra(str(entry))
            parts.append(self._expand_file(f"{group}/{entry}", group, optional=False))
            if parts[-1][-1][0] != GLOBAL:
                raise NeedsHydra(str(entry))
        return [part for parts_of_entry in reversed(parts) for part in parts_of_entry]

    def _add_override(self, entry: Mapping[str, Any]) -> None:
        if len(entry) != 1:
            raise NeedsHydra(str(entry))
        ((key, option),) = entry.items()
        match = re.fullmatch(r"override /([\w/]+)", str(key))
        if match is None or not isinstance(option, str) or "${" in option:
            raise NeedsHydra(str(entry))
        if match[1] in self.chosen:
            raise NeedsHydra(f"{match[1]} is overridden after it was expanded")
        self.choices.setdefault(match[1], option)

    def _read(self, path: str, optional: bool) -> tuple[dict[str, Any], str | None]:
        for folder in self.folders:
            file = folder / f"{path}.yaml"
            if file.is_file():
                return read(file, file.stat().st_mtime_ns)
        if optional:
            return {}, GLOBAL
        raise NeedsHydra(f"{path} is missing")


def _group_entry(entry: Any) -> tuple[str, Any, bool]:
    """Split an entry of the primary defaults list into group, option and whether it is optional."""
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise NeedsHydra(str(entry))
    ((key, option),) = entry.items()
    match = re.fullmatch(r"(optional )?(\w+(?:/\w+)*)", str(key))
    if match is None:
        raise NeedsHydra(str(key))
    return match[2], option, match[1] is not None


@lru_cache(maxsize=512)
def read(file: Path, changed: int) -> tuple[dict[str, Any], str | None]:
    """Read a configuration file as Hydra does: its content, which must not be changed, and the package in its header.

    Args:
        file: the file.
        changed: when it was changed, so that a changed file is read again.
    """
    text = file.read_text(encoding="utf-8")
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise NeedsHydra(str(error)) from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise NeedsHydra(f"{file} is no mapping")
    _check_plain({key: value for key, value in content.items() if key != "defaults"})
    return content, _package(text)


def _package(text: str) -> str | None:
    """Return the package that a file's header names (`# @package _global_`)."""
    for line in text[:512].splitlines():
        if line.strip() and not line.strip().startswith("#"):
            break
        if "@" in line:
            match = PACKAGE.fullmatch(line.strip())
            if match is None:
                raise NeedsHydra(line)
            return match[1]
    return None


def _check_plain(value: Any) -> None:
    """Refuse interpolations, missing values, and types that OmegaConf converts."""
    for each in _leaves(value):
        if type(each) not in PLAIN or (isinstance(each, str) and ("${" in each or each == "???")):
            raise NeedsHydra(str(each))


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) is dict:
        for key, each in value.items():
            yield key
            yield from _leaves(each)
    elif type(value) is list:
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _nested(dotted: str, content: Any) -> Any:
    """Wrap content in the dictionaries that a package or a dotted key names."""
    for key in reversed(dotted.split(".") if dotted not in ("", GLOBAL) else []):
        content = {key: content}
    return content


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Merge a copy of `new`; lists and scalars are replaced, dictionaries merged."""
    for key, value in new.items():
        old = into.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        elif {type(old), type(value)} == {dict, list}:
            raise NeedsHydra(f"{key} is both a list and a dictionary")
        else:
            into[key] = copy.deepcopy(value)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """OmegaConf's YAML: `1e-4` is a float, dates are text, and a key that appears twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if key.tag == yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, "found duplicate key", node.start_mark)
        return super().construct_mapping(node, deep=deep)


FLOAT = re.compile(
    r"""^(?:
     [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
