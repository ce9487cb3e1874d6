"""Allowed classes of `_target_` and their keys, found by reading source code. Nothing that a configuration names is executed.

A class of mtrl_cli is found with `ast`. Its module must be a file of the package, and the file must define the class at module level as a
direct subclass of the base class of its group. Imported names and aliases do not count. Only packages that the user trusts are imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mtrl_cli import types as field_types
from mtrl_cli.errors import UserError

PACKAGE = "mtrl_cli"
MISSING: Any = inspect.Parameter.empty
UNKNOWN: Any = object()

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
"""Groups of a run, each with the base class of its options."""

SWEEP_KINDS = {"launcher": "mtrl_cli.launchers.base.Launcher"}
"""Groups of a sweep, each with the base class of its options."""

ANNOTATIONS: dict[str, Any] = {**vars(field_types), "Literal": typing.Literal, "Any": Any, "Mapping": Mapping, "Sequence": Sequence}
"""Names in annotations of keys, besides builtins."""

SEVERAL = {"augmentation"}
"""Groups that take several options. Their section contains one section per option, by name, in order of use."""


def kind_of(path: str) -> str | None:
    """Return the base class of a section (`network/head`, or `augmentation/shift` in a group that takes several options), or None."""
    group, _, name = path.rpartition("/")
    return KINDS.get(group) if name and group in SEVERAL else None if path in SEVERAL else {**KINDS, **SWEEP_KINDS}.get(path)


@dataclass(frozen=True)
class Key:
    """One key of a section: type annotation and default (`MISSING`: required; `UNKNOWN`: not a literal, so the class sets it)."""

    annotation: Any
    default: Any = MISSING


@dataclass(frozen=True)
class Signature:
    """Keys and literal class attributes of a class, read without importing it."""

    target: str
    keys: Mapping[str, Key]
    attributes: Mapping[str, Any]


def is_trusted(target: str, trusted: Sequence[str]) -> bool:
    """Return whether a dotted path is in one of the packages. Whole components count: `a.b` is in `a`, `ab` is not."""
    return any(name and (target == name or target.startswith(name + ".")) for name in trusted)


def read(key: str, target: Any, kind: str, trusted: Sequence[str] = (), root: Path | None = None) -> Signature:
    """Return the signature of the class `target`, which must be a subclass of `kind`.

    Args:
        key: key of the target, for messages (`network.head._target_`).
        target: the dotted path of a class, such as `mtrl_cli.networks.torsos.MLP`.
        kind: the dotted path of the base class, such as `mtrl_cli.networks.torsos.Torso`.
        trusted: other packages that may be imported.
        root: folder of the package mtrl_cli.

    Raises:
        UserError: the class does not exist, is not a `kind`, or is in a package that is not trusted.
    """
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"{key} must be the dotted path of a class, such as {PACKAGE}.networks.torsos.MLP, got {target!r}")
    if target.startswith(f"{PACKAGE}."):
        return _read_ours(key, target, kind, root or Path(__file__).parents[1])
    if is_trusted(target, trusted):
        return _read_trusted(key, target, kind, trusted)
    package = target.split(".")[0]
    advice = f". Add trusted_packages=[{package}] to the command line if you trust the package {package} to run code"
    raise UserError(f"{key} must be a class of {PACKAGE}, got {target}" + ("" if package in sys.stdlib_module_names else advice))


def _read_ours(key: str, target: str, kind: str, root: Path) -> Signature:
    module, _, name = target.rpartition(".")
    home, _, base = kind.rpartition(".")
    of_kind = {node.name: node for node in _classes(root, module) if base in map(_last_name, node.bases)}
    if name not in of_kind:
        known = f". Choose from {module}: {', '.join(of_kind)}" if of_kind else ""
        raise UserError(f"{key} must be a {base} defined in {PACKAGE}, got {target}{known}")
    parameters = _init_parameters(of_kind[name])
    keys = _keys(parameters)
    if parameters.kwarg:  # `**common`: the keys of the base class
        keys = _keys(next(_init_parameters(node) for node in _classes(root, home) if node.name == base)) | keys
    return Signature(target, keys, _attributes(of_kind[name]))


@cache
def _classes(root: Path, module: str) -> list[ast.ClassDef]:
    """Return the classes that a module of mtrl_cli defines at module level; an empty list if the module has no file."""
    path = root.joinpath(*module.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file() and file.resolve().is_relative_to(root.resolve()):
            return [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return []


def _last_name(node: ast.expr) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _init_parameters(found: ast.ClassDef) -> ast.arguments:
    """Return the parameters of a class's own `__init__`."""
    own = (node.args for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return next(own, ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[]))


def _keys(parameters: ast.arguments) -> dict[str, Key]:
    """Return the keyword-only parameters, with annotations and literal defaults."""
    keys = {}
    for argument, default in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True):
        # The evaluated text is source code of mtrl_cli, never part of a configuration.
        annotation = eval(ast.unparse(argument.annotation), dict(ANNOTATIONS)) if argument.annotation else Any
        keys[argument.arg] = Key(annotation, MISSING if default is None else _literal(default))
    return keys


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _attributes(found: ast.ClassDef) -> dict[str, Any]:
    attributes = {}
    for node in found.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                attributes[_last_name(target)] = _literal(node.value)
    return {name: value for name, value in attributes.items() if name is not None and value is not UNKNOWN}


def _read_trusted(key: str, target: str, kind: str, trusted: Sequence[str]) -> Signature:
    module_name, _, name = target.rpartition(".")
    try:
        found = vars(importlib.import_module(module_name or target)).get(name)
    except ImportError as error:
        raise UserError(f"{key}={target}: {module_name or target} cannot be imported ({error})") from None
    base = import_class(kind)
    if not (isinstance(found, type) and issubclass(found, base) and is_trusted(found.__module__, trusted)):
        raise UserError(f"{key} must be a subclass of {kind} that {module_name or target} defines, got {target}")
    parameters = _parameters(found)
    keys = _keyword_only(parameters)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        keys = _keyword_only(_parameters(base)) | keys
    literals = {each: value for each, value in vars(found).items() if isinstance(value, str | int | float | bool)}
    return Signature(target, keys, literals)


def _parameters(found: type) -> Sequence[inspect.Parameter]:
    try:
        return list(inspect.signature(found, eval_str=True).parameters.values())
    except NameError:  # names imported for type checkers only
        return list(inspect.signature(found).parameters.values())


def _keyword_only(parameters: Sequence[inspect.Parameter]) -> dict[str, Key]:
    """Return the keyword-only parameters. A parameter with an unknown annotation accepts any value."""
    keys = {}
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY:
            known = each.annotation is not each.empty and not isinstance(each.annotation, str)
            keys[each.name] = Key(each.annotation if known else Any, each.default)
    return keys


def class_name(node: Mapping[str, Any]) -> str:
    """Return the class name of a section, without the module."""
    return str(node["_target_"]).rpartition(".")[2]


def import_class(target: str) -> type:
    """Import the class at a dotted path. Only for targets that `read` has accepted."""
    module_name, _, name = target.rpartition(".")
    found = vars(importlib.import_module(module_name))[name]
    assert isinstance(found, type), target
    return found
