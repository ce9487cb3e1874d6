"""Plain YAML of run folders, which may come from untrusted sources.

Files have a bounded size and depth, and no aliases; interpolations are not resolved.
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
    """Plain YAML without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {repeated}", node.start_mark)
        return super().construct_mapping(node, deep)


_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML without libyaml has only the slow loader


class _QuickLoader(_Fast):  # type: ignore[misc]
    """Plain YAML, read ten times faster. The last of duplicate keys wins."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors, even where two keys share one list."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _each in (_Loader, _QuickLoader, _Dumper):  # YAML 1.1 reads 1e-4 as text; read 1e-4 as a number, as in an override
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read(path: Path, *, quickly: bool = False) -> dict[Any, Any]:
    """Read keys and values of a file in a run folder, unvalidated.

    Args:
        path: path of the file; a link out of its folder is not followed.
        quickly: whether to use the fast loader, for reports on thousands of runs.

    Raises:
        UserError: the file is missing, too large, or not plain YAML.
    """
    return _mapping(path, _content(path), _QuickLoader if quickly else _Loader)


def read_alike(path: Path, lines: re.Pattern[bytes], known: dict[bytes, dict[Any, Any]]) -> dict[Any, Any]:
    """Read one of many files that differ in a few lines. The common lines are parsed only once.

    The result is that of `read(path, quickly=True)`.

    Args:
        path: path of the file.
        lines: pattern of the lines that differ, each with one key and one value.
        known: cache of parsed common lines.
    """
    content = _content(path)
    shared = lines.sub(b"", content)
    if shared not in known:
        known[shared] = _mapping(path, shared, _QuickLoader)
    own = b"".join(found[0] for found in lines.finditer(content))
    return {**known[shared], **(_mapping(path, own, _QuickLoader) if own else {})}


def _content(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise UserError(f"{path.parent} is not a run folder: {path.name} is missing")
    return atomic.read_bytes(path, path.parent, LARGEST_FILE)


def _mapping(path: Path, content: bytes, loader: Any) -> dict[Any, Any]:
    """Parse a mapping in YAML without aliases, interpolations, Python tags or deep nesting."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if "${" in text:
        raise UserError(f"{path} contains an interpolation ('${{'), which is not resolved in a run folder. Replace it by its value")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise UserError(f"{path} contains an anchor or alias ({show(event.anchor)}). Replace the alias by its value")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{path} is nested deeper than {DEEPEST} levels")
        parsed = yaml.load(text, Loader=loader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''} is not plain YAML: {show(problem)}") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} must contain keys and values")
    return parsed


def dump(config: dict[str, Any]) -> str:
    """Format a configuration as YAML in the order of its keys. `read` returns the same configuration."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
