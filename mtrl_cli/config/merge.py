"""Compose the built-in configuration files and simple overrides as Hydra does.

Importing Hydra and composing with it takes longer than the rest of `mtrl train --dry-run`. `compose` supports what the built-in files
use: tests/config/test_merge.py compares every option with Hydra. The caller composes users' files and other overrides with Hydra itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from mtrl_cli.config import options
from mtrl_cli.config.overrides import Override

SELF = "_self_"
PACKAGE = re.compile(r"# @package ([\w.]+)")
KEY = re.compile(r"[\w.-]+")

Part = tuple[str, dict[str, Any]]
"""A dotted path in the configuration (empty: the root), and the keys to merge there."""


class NeedsHydra(Exception):
    """An override uses something that only Hydra composes."""


def compose(name: str, choices: Mapping[str, Any], values: Sequence[Override]) -> dict[str, Any]:
    """Compose `conf/<name>.yaml` with its defaults list, then set values by dotted key.

    Args:
        name: the primary configuration: train, eval or sweep. The keys of its file precede the keys of its defaults list.
        choices: option, or list of options, of each chosen group.
        values: overrides that set values, in order; a dictionary is merged into an existing dictionary.

    Raises:
        NeedsHydra: a value contains an interpolation, or would replace a list by a dictionary or the reverse.
    """
    defaults, root = _read("", name)
    groups = {group.removeprefix("optional "): option for entry in defaults if entry != SELF for group, option in entry.items()}
    chosen = dict(choices)
    parts: dict[str, list[Part]] = {}
    # Like Hydra, expand the last group first: its `override` entries take precedence over the entries of the groups above. An interpolated
    # option depends on all other choices.
    last_first = list(reversed(groups))
    for group in sorted(last_first, key=lambda group: "${" in str(groups[group])):
        option = chosen.setdefault(group, groups[group])
        if isinstance(option, str):
            option = Template(option).substitute(chosen)
        several = option if isinstance(option, list) else [] if option is None else [option]
        parts[group] = [part for each in several for part in _expand(group, each, chosen)]
    config: dict[str, Any] = {}
    for path, content in [root, *(part for group in groups for part in parts[group])]:
        _merge(config, path, content)
    for override in values:
        if not KEY.fullmatch(override.key) or "${" in override.for_hydra or "???" in override.for_hydra:
            raise NeedsHydra
        _merge(config, override.key, override.value)
    return config


def _expand(group: str, option: str, chosen: dict[str, Any]) -> list[Part]:
    """List the siblings that an option extends, then the option. Add the choices of its `override` entries to `chosen`."""
    if not _file(group, option).is_file():  # an optional group
        return []
    defaults, own = _read(group, option)
    parts: list[Part] = []
    for entry in defaults:
        if isinstance(entry, dict):
            for key, other in entry.items():
                chosen.setdefault(key.removeprefix("override /"), other)
        elif entry != SELF:
            parts += _expand(group, entry, chosen)
    return [*parts, own]


@cache
def _read(group: str, option: str) -> tuple[list[Any], Part]:
    """Return the defaults list and the keys of a built-in file. Callers must not change the keys."""
    file = _file(group, option)
    content = options.read_yaml(file)
    header = PACKAGE.match(file.read_text(encoding="utf-8"))
    package = header[1] if header else group.replace("/", ".")
    return content.pop("defaults", []), (package.replace("_global_", ""), content)


def _file(group: str, option: str) -> Path:
    return options.conf_folder() / group / f"{option}.yaml"


def _merge(config: dict[str, Any], path: str, content: Any) -> None:
    """Merge a copy of a value or a section at a dotted path; lists and scalars are replaced, sections merged."""
    for key in reversed(path.split(".") if path else []):
        content = {key: content}
    _update(config, content)


def _update(config: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        old = config.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _update(old, value)
        elif {type(old), type(value)} == {dict, list}:
            raise NeedsHydra
        else:
            config[key] = copy.deepcopy(value)
