"""Instantiate the classes that sections of a configuration name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mtrl_cli.config import introspection
from mtrl_cli.config.introspection import KINDS, kind_of
from mtrl_cli.config.validation import NOT_PASSED
from mtrl_cli.errors import UserError

Config = dict[str, Any]


def class_of(config: Config, group: str) -> tuple[Any, dict[str, Any]]:
    """Return the class that the section of a group names, and the keyword arguments in the section.

    Raises:
        UserError: `_target_` is not a subclass of the group's base class.
    """
    node = config
    for part in group.split("/"):
        node = node[part]
    below = {name.removeprefix(f"{group}/") for name in KINDS if name.startswith(f"{group}/")} | NOT_PASSED.get(group, set())
    target = node["_target_"]
    # Validation has read source code only; this checks the imported class.
    kind = kind_of(group)
    assert kind is not None, group
    ours = introspection.is_trusted(target, ["mtrl_cli", *config["trusted_packages"]])
    found = introspection.import_class(target) if ours else object
    if found.__module__ != target.rpartition(".")[0] or not issubclass(found, introspection.import_class(kind)):
        raise UserError(f"{group.replace('/', '.')}._target_ must be a subclass of {kind.rpartition('.')[2]}, got {target}")
    return found, {key: value for key, value in node.items() if key != "_target_" and key not in below}


def make(config: Config, group: str, *args: Any) -> Any:
    """Instantiate the class that the section of a group names, with `args` and the keys of the section.

    Raises:
        UserError: `_target_` is not a subclass of the group's base class, or the class refuses its values.
    """
    found, values = class_of(config, group)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{group.replace('/', '.')}._target_={found.__module__}.{found.__name__} does not define {', '.join(missing)}")
    with refusals():
        return found(*args, **values)


@contextmanager
def refusals() -> Iterator[None]:
    """Convert the ValueError of a constructor that refuses its values into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def derived_seed(seed: int, label: str) -> int:
    """Derive an independent 63-bit seed for one purpose of a run."""
    return int.from_bytes(hashlib.blake2b(f"{label}/{seed}".encode(), digest_size=8).digest(), "big") >> 1
