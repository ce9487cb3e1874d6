"""Configurations as plain YAML: how they are written, and read from run folders, which may come from a stranger.

Of bounded size and depth, without aliases, and no interpolation is resolved.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from mtrl_cli.errors import UserError, show
from mtrl_cli.files import atomic

LARGEST_FILE = 256 * 1024
DEEPEST = 16

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML built without libyaml has only the slow one


class _QuickLoader(_Fast):  # type: ignore[misc]
    """Plain YAML, read ten times faster; of a key that stands twice the last counts."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors, even where one list stands at two keys."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _each in (_Loader, _QuickLoader, _Dumper):  # YAML 1.1 reads 1e-4 as text; with this it is a number, as it is in an override
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read(path: Path, *, quickly: bool = False) -> dict[Any, Any]:
    """The keys and values in a run folder's file, as they stand: nothing is known yet of whether they make a configuration.

    Args:
        path: the file; a link that leads out of its folder is not followed.
        quickly: for whoever reads a thousand and only tells of them.

    Raises:
        UserError: it is no such file, too large, or no plain YAML.
    """
    return _mapping(path, _content(path), _QuickLoader if quickly else _Loader)


def read_alike(path: Path, lines: re.Pattern[bytes], known: dict[bytes, dict[Any, Any]]) -> dict[Any, Any]:
    """As `read(path, quickly=True)`, for many files that are alike but for a few lines: what the others say is parsed once.

    Args:
        path: the file.
        lines: what matches the lines, of one key and its value each, in which the files differ.
        known: what was parsed before.
    """
    content = _content(path)
    shared = lines.sub(b"", content)
    if shared not in known:
        known[shared] = _mapping(path, shared, _QuickLoader)
    own = b"".join(found[0] for found in lines.finditer(content))
    return {**known[shared], **(_mapping(path, own, _QuickLoader) if own else {})}


def _content(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}")
    return atomic.read_bytes(path, path.parent, LARGEST_FILE)


def _mapping(path: Path, content: bytes, loader: Any) -> dict[Any, Any]:
    parsed = _parse(path, content, loader)
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: expected keys and values")
    return parsed


def _parse(path: Path, content: bytes, loader: Any) -> Any:
    """YAML without aliases, interpolations, tags of Python, or depth."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None
    if "${" in text:
        raise UserError(f"{path} holds an interpolation ('${{'), which is not resolved in a loaded file: write the value itself")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise UserError(f"{path} holds an anchor or alias ({show(event.anchor)}): write the value itself")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{path} is nested deeper than {DEEPEST} levels: no configuration of ours")
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''} cannot be read as plain YAML: {show(problem)}") from None


def dump(config: dict[str, Any]) -> str:
    """A configuration as YAML, in the order of its keys; `read` gives the same back."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
