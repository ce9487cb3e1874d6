"""Sections of a configuration to objects of the classes that they name."""

from __future__ import annotations

import hashlib
from typing import Any

from mtrl_cli.config import introspection
from mtrl_cli.config.introspection import KINDS, kind_of
from mtrl_cli.config.validation import NOT_THE_CLASSES
from mtrl_cli.errors import UserError

Config = dict[str, Any]


def class_of(config: Config, group: str) -> tuple[type, dict[str, Any]]:
    """The class that a group's section of the configuration names, and the section's keys for it.

    Raises:
        UserError: what it names is not a class of the group's kind.
    """
    node = config
    for part in group.split("/"):
        node = node[part]
    below = {name.removeprefix(f"{group}/") for name in KINDS if name.startswith(f"{group}/")} | NOT_THE_CLASSES.get(group, set())
    target = node["_target_"]
    # The schema has looked at the source alone; this looks at what was really imported.
    kind = kind_of(group)
    assert kind is not None, group
    ours = introspection.is_trusted(target, ["mtrl_cli", *config["trusted_packages"]])
    found = introspection.import_class(target) if ours else object
    if found.__module__ != target.rpartition(".")[0] or not issubclass(found, introspection.import_class(kind)):
        raise UserError(f"{group}._target_={target} is not a class of the kind that {group} holds ({kind.rpartition('.')[2]})")
    return found, {key: value for key, value in node.items() if key != "_target_" and key not in below}


def make(config: Config, group: str, *args: Any) -> Any:
    """The object that a group's section of the configuration names, given `args` and the section's keys.

    Raises:
        UserError: what it names is not a class of the group's kind, or refuses its values.
    """
    found, values = class_of(config, group)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{group.replace('/', '.')}._target_={found.__module__}.{found.__name__} does not define {', '.join(missing)}")
    try:
        return found(*args, **values)
    except ValueError as error:
        raise UserError(str(error)) from error


def derived_seed(seed: int, label: str) -> int:
    """An independent seed for one purpose of a run, 63 bits."""
    return int.from_bytes(hashlib.blake2b(f"{label}/{seed}".encode(), digest_size=8).digest(), "big") >> 1
