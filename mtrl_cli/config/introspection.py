"""What a `_target_` may be, and which keys its class takes: found by reading source, so that nothing named in a configuration runs.

A class of ours is looked up with `ast`: its module's file must lie in the package, and the class must be defined at the top of that
file as a direct subclass of the kind that its group holds. A module's imports are no way in, neither are aliases. Only packages that the
user trusts are imported.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from mtrl_cli import types as field_types
from mtrl_cli.errors import UserError

PACKAGE = "mtrl_cli"
MISSING: Any = object()

KINDS = {
    "env": "mtrl_cli.envs.pack.Pack",
    "network": "mtrl_cli.networks.torsos.Torso",
    "network/sharing": "mtrl_cli.networks.sharing.Sharing",
    "network/head": "mtrl_cli.networks.heads.Head",
    "agent": "mtrl_cli.agents.agent.Agent",
    "agent/value_scale": "mtrl_cli.agents.value_scale.ValueScale",
    "optimizer": "mtrl_cli.training.optimizers.Optimizer",
    "replay": "mtrl_cli.replay.buffers.Replay",
    "task_weights": "mtrl_cli.task_weights.base.TaskWeights",
    "augmentation": "mtrl_cli.augmentation.base.Augmentation",
}
"""Each group, and the base class of what it holds."""

KINDS_OF_SWEEPS = {"launcher": "mtrl_cli.launchers.base.Launcher"}
"""Those of a sweep, which no run has."""

SEVERAL = {"augmentation"}
"""Groups of which several options may be chosen: their section holds one of each, by name, in the order in which they are used."""


def kind_of(path: str) -> str | None:
    """The base class of what a section holds (`network/head`, or `augmentation/shift` within a group of several), if it holds a class."""
    group, _, name = path.rpartition("/")
    return KINDS.get(group) if name and group in SEVERAL else None if path in SEVERAL else {**KINDS, **KINDS_OF_SWEEPS}.get(path)


@dataclass(frozen=True)
class Key:
    """One key of a section: what its value is checked against, and its default (`MISSING`: required; `UNKNOWN`: left to the class)."""

    annotation: Any
    default: Any = MISSING


UNKNOWN: Any = object()


@dataclass(frozen=True)
class Signature:
    """What is known of a class without importing it: the keys it takes, and its class attributes that are literals."""

    target: str
    keys: Mapping[str, Key]
    attributes: Mapping[str, Any]


def is_trusted(target: str, trusted: Sequence[str]) -> bool:
    """Whether a dotted path lies in one of the packages, by whole components: `a.b` is in `a`, `ab` is not."""
    return any(name and (target == name or target.startswith(name + ".")) for name in trusted)


def read(key: str, target: Any, kind: str, trusted: Sequence[str] = (), root: Path | None = None) -> Signature:
    """The signature of the class `target`, which must be a `kind`.

    Args:
        key: where the target stands, for messages (`network.head._target_`).
        target: the dotted path of a class, such as `mtrl_cli.networks.torsos.MLP`.
        kind: the dotted path of the base class, such as `mtrl_cli.networks.torsos.Torso`.
        trusted: packages other than ours that may be imported.
        root: the folder of our package.

    Raises:
        UserError: there is no such class, it is of another kind, or it is in a package that is not trusted.
    """
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"{key}={target!r}: expected the dotted path of a class, such as {PACKAGE}.networks.torsos.MLP")
    if target.startswith(f"{PACKAGE}."):
        return _read_ours(key, target, kind, root or Path(__file__).parents[1])
    if is_trusted(target, trusted):
        return _read_trusted(key, target, kind, trusted)
    package = target.split(".")[0]
    advice = f"\nIf you trust the package {package} with running code, say so on the command line: trusted_packages=[{package}]"
    raise UserError(f"{key}={target}: expected a class of {PACKAGE}" + ("" if package in sys.stdlib_module_names else advice))


def _read_ours(key: str, target: str, kind: str, root: Path) -> Signature:
    *parts, name = target.split(".")[1:]
    base = kind.rpartition(".")[2]
    tree = _parse(root, tuple(parts))
    found = _class_of(tree, name) if tree else None
    if found is None or base not in (_last_name(node) for node in found.bases):
        known = (
            f"; {'.'.join([PACKAGE, *parts])} has " + ", ".join(_classes_of_kind(tree, base))
            if tree and _classes_of_kind(tree, base)
            else ""
        )
        raise UserError(f"{key}={target}: expected a {base} that {PACKAGE} itself defines{known}")
    keys = _keys(found)
    if _hands_on(found):
        home = _parse(root, tuple(kind.split(".")[1:-1]))
        owner = _class_of(home, base) if home else None
        keys = {**(_keys(owner) if owner else {}), **keys}
    return Signature(target, keys, _attributes(found))


@cache
def _parse(root: Path, parts: tuple[str, ...]) -> ast.Module | None:
    """The syntax tree of a module of ours, or None where it has no file."""
    path = root.joinpath(*parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if parts and file.is_file() and file.resolve().is_relative_to(root.resolve()):
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _class_of(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _classes_of_kind(tree: ast.Module, base: str) -> list[str]:
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and base in (_last_name(each) for each in node.bases)]


def _last_name(node: ast.expr) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _init_of(found: ast.ClassDef) -> ast.FunctionDef | None:
    return next((node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)


def _hands_on(found: ast.ClassDef) -> bool:
    """Whether a class takes further keywords (`**common`): then those of its kind are keys, too."""
    init = _init_of(found)
    return init is not None and init.args.kwarg is not None


def _keys(found: ast.ClassDef) -> dict[str, Key]:
    """The keyword-only parameters of a class's own `__init__`, with their annotations and those defaults that are literals."""
    init = _init_of(found)
    if init is None:
        return {}
    keys = {}
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        annotation = ast.unparse(argument.annotation) if argument.annotation else "typing.Any"
        keys[argument.arg] = Key(_evaluate(annotation, found.name, argument.arg), MISSING if default is None else _literal(default))
    return keys


@cache
def _namespace() -> dict[str, Any]:
    return {
        **vars(builtins),
        "typing": typing,
        "Literal": typing.Literal,
        "Any": typing.Any,
        "Mapping": Mapping,
        "Sequence": Sequence,
        **vars(field_types),
    }


def _evaluate(annotation: str, owner: str, key: str) -> Any:
    try:
        return eval(annotation, dict(_namespace()))  # the source of our own package, never of a configuration
    except NameError as error:
        raise TypeError(
            f"{owner}.__init__: the annotation of {key} must be made of builtins, Literal and the names of fields.py"
        ) from error


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _attributes(found: ast.ClassDef) -> dict[str, Any]:
    attributes = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
            attributes[node.target.id] = _literal(node.value)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            attributes[node.targets[0].id] = _literal(node.value)
    return {name: value for name, value in attributes.items() if value is not UNKNOWN}


def _read_trusted(key: str, target: str, kind: str, trusted: Sequence[str]) -> Signature:
    module_name, _, name = target.rpartition(".")

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{key}={target}: {reason}")

    try:
        found = vars(importlib.import_module(module_name or target)).get(name)
    except ImportError as error:
        refuse(f"{module_name or target} cannot be imported ({error})")
    base = import_class(kind)
    if not (isinstance(found, type) and issubclass(found, base) and is_trusted(found.__module__, trusted)):
        refuse(f"expected a class that {module_name or target} defines as a subclass of {kind}")
    parameters = _parameters(found)
    keys = _keyword_only(parameters)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        keys = _keyword_only(_parameters(base)) | keys
    literals = {each: value for each, value in vars(found).items() if isinstance(value, str | int | float | bool)}
    return Signature(target, keys, literals)


def _parameters(found: type) -> Sequence[inspect.Parameter]:
    try:
        return list(inspect.signature(found, eval_str=True).parameters.values())
    except NameError:  # names that are imported for type checkers only
        return list(inspect.signature(found).parameters.values())


def _keyword_only(parameters: Sequence[inspect.Parameter]) -> dict[str, Key]:
    return {each.name: _key_of(each) for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _key_of(parameter: inspect.Parameter) -> Key:
    annotation = parameter.annotation
    known = annotation is not inspect.Parameter.empty and not isinstance(annotation, str)
    default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
    return Key(annotation if known else Any, default)


def class_name(node: Mapping[str, Any]) -> str:
    """The class that a section names, without its module."""
    return str(node["_target_"]).rpartition(".")[2]


def import_class(target: str) -> type:
    """The class at a dotted path. Only for targets that `read` has let through."""
    module_name, _, name = target.rpartition(".")
    found = vars(importlib.import_module(module_name))[name]
    assert isinstance(found, type), target
    return found
