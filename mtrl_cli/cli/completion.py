"""What the shell offers after TAB: groups, options, keys, values and games."""

from __future__ import annotations

import os
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from mtrl_cli.config import introspection, options
from mtrl_cli.errors import UserError

SWEEP_RESUMABLE = ("sweep.trials", "sweep.retries")


def complete(command: str, given: Sequence[str], incomplete: str) -> list[tuple[str, str]]:
    """The words that may stand where `incomplete` stands, each with a line of help (which may be empty).

    Args:
        command: `train`, `bench`, `transfer`, `sweep`, `sharing` (of `study`), `eval` or `resume`.
        given: the whole words of the command line before it.
        incomplete: what has been typed of the word, such as `env=at` or `agent.n_`.
    """
    command = {"bench": "train", "transfer": "train", "sharing": "sweep"}.get(command, command)  # which take the same words
    try:
        return _complete(command, [word for word in given if "=" in word], incomplete)
    except (UserError, OSError):
        return []


def words_of_bash() -> tuple[list[str], str] | None:
    """The words before the cursor and the word at it, as they were typed, or None outside bash.

    Bash takes `env=at` apart into three words and expects only what comes after the `=`.
    """
    if "COMP_WORDS" not in os.environ or not os.environ.get("COMP_CWORD", "").isdecimal():
        return None
    lexer = shlex.shlex(os.environ["COMP_WORDS"], posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        for word in lexer:
            words.append(word)
    except ValueError:  # a quotation that is still open
        words.append(lexer.token)
    position = int(os.environ["COMP_CWORD"])
    words = [*words, *[""] * (position + 1 - len(words))][: position + 1]
    joined: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if joined and (word == "=" or before == "="):
            joined[-1] += word
        else:
            joined.append(word)
    return joined[:-1], joined[-1]


def _complete(command: str, given: Sequence[str], incomplete: str) -> list[tuple[str, str]]:
    from mtrl_cli.config import compose

    folders = compose.search_path(given) if any("hydra.searchpath" in word for word in given) else [options.conf_folder()]
    of_command = {"train": ["train"], "sweep": ["train", "sweep"], "resume": ["sweep"]}.get(command, [])
    groups = [group for name in of_command for group in options.groups(folders, name)]
    key, equals, value = incomplete.partition("=")
    if not equals and incomplete == "":
        return [(f"{group}=", "") for group in groups] + [(f"{name}=", "") for name in _keys(command, given)[0] if "." not in name]
    if key in groups:
        return (
            _options(key, value, folders)
            if equals
            else [*_options(key, "", folders), *_names(key, [each for each in groups if each != key])]
        )
    annotations, content = _keys(command, given)
    if equals:
        return _values(key, value, annotations, content, folders)
    found = [*_names(key, groups), *_names(key, annotations)]
    if len(found) > 1 or not found:
        return found
    only = found[0][0].removesuffix("=")
    return _options(only, "", folders) if only in groups else _values(only, "", annotations, content, folders)


def _names(prefix: str, names: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"{name}=", "") for name in names if name.startswith(prefix)]


def _options(group: str, prefix: str, folders: Sequence[Path]) -> list[tuple[str, str]]:
    files = options.options(group, folders)
    if group in introspection.SEVERAL and prefix.startswith("["):
        return _listed(group, prefix, [name for name in files if name != "none"])
    return [(f"{group}={name}", options.description(file)) for name, file in files.items() if name.startswith(prefix)]


def _keys(command: str, given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All keys with their annotations, and the configuration as it would be."""
    from mtrl_cli.config import compose, validation
    from mtrl_cli.config import schema as sections

    if command == "resume":  # of a run, and of a sweep
        everything = sections.keys_of(sections.Trainer)
        of_sweeps, content = _keys("sweep", [word for word in given if word.startswith("launcher")])
        changed = {name: key for name, key in of_sweeps.items() if name in SWEEP_RESUMABLE or name.startswith("launcher.")}
        return {**{name: everything[name].annotation for name in compose.RESUMABLE}, **changed}, content
    if command == "sweep":
        shared, of_sweep = _apart(given)
        (annotations, content), sweep = _keys("train", shared), _composed("sweep", of_sweep)
        return {**annotations, **validation.dotted_keys(sweep, command="sweep")}, {**content, **sweep}
    content = _composed(command, given)
    return validation.dotted_keys(content, command=command), content


def _apart(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a sweep's first run, and those of the sweep, as far as they can be read."""
    from mtrl_cli.sweeps import search_space

    shared: list[str] = []
    of_sweep: list[str] = []
    for word in given:
        try:
            apart = search_space.take_apart([word])
        except UserError:
            continue
        shared += [*apart.shared, *(f"{key}={axis.words[0]}" for key, axis in apart.axes.items() if isinstance(axis, search_space.Choices))]
        of_sweep += apart.sweep
    return shared, of_sweep


def _composed(command: str, given: Sequence[str]) -> dict[str, Any]:
    """The configuration as it would be; where there is a mistake in it, what it is by default."""
    from mtrl_cli.config import compose

    try:
        return compose.compose_unchecked(command, given)
    except UserError:
        return compose.compose_unchecked(command, [])


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _values(
    key: str, prefix: str, annotations: Mapping[str, Any], content: Mapping[str, Any], folders: Sequence[Path]
) -> list[tuple[str, str]]:
    """`key=value` for each value that can be named: choices, games, and else what it is now."""
    if key not in annotations:
        return []
    if key == "env.tasks":
        return _listed(key, prefix, sorted(options.known_tasks(_at(content, "env._target_"), folders) or []))
    choices, now = _choices(annotations[key]), _at(content, key)
    if isinstance(now, str | int | float) and not isinstance(now, bool) and str(now) not in choices:
        choices = ["", *choices, str(now)]  # the empty one keeps the shell from adding a space behind the only value
    return [(f"{key}={choice}", "") for choice in choices or [""] if choice.startswith(prefix)]


def _listed(key: str, prefix: str, known: Sequence[str]) -> list[tuple[str, str]]:
    """`env.tasks=[pong,br` to `env.tasks=[pong,breakout`."""
    before, _, last = prefix.lstrip("[").rpartition(",")
    start = "[" + (f"{before}," if before else "")
    found = [f"{key}={start}{name}" for name in known if name.startswith(last) and name not in before.split(",")]
    if len(found) == 1:
        found = [f"{found[0]}]", f"{found[0]},"]  # two, so that the shell adds no space
    return [(word, "") for word in found]


def _choices(annotation: Any) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _choices(arguments[0])
    if origin is Literal:
        return [str(each) for each in arguments]
    if origin in (typing.Union, types.UnionType):
        return [choice for each in arguments for choice in _choices(each)]
    return ["true", "false"] if annotation is bool else []
