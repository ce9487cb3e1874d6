"""Shell completion of groups, options, keys, values and task names."""

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


def complete_word(command: str, given: list[str], incomplete: str) -> list[tuple[str, str]]:
    """Return the completions of the word at the cursor in the form that the shell expects."""
    typed = bash_words()
    if typed is None:
        return complete(command, given, incomplete)
    given, word = typed
    prefix = word[: len(word) - len(incomplete)]  # bash expects only the part after the last `=`
    return [(found.removeprefix(prefix), line) for found, line in complete(command, given, word)]


def complete(command: str, given: Sequence[str], incomplete: str) -> list[tuple[str, str]]:
    """Return the completions of `incomplete`, each with a help text that may be empty.

    Args:
        command: `train`, `bench`, `transfer`, `sweep`, `sharing` (of `study`), `eval` or `resume`.
        given: the complete words before the cursor.
        incomplete: the beginning of a word, such as `env=at` or `agent.n_`.
    """
    command = {"bench": "train", "transfer": "sweep", "sharing": "sweep"}.get(command, command)  # commands with the same overrides
    try:
        return _complete(command, [word for word in given if "=" in word], incomplete)
    except (UserError, OSError):
        return []


def bash_words() -> tuple[list[str], str] | None:
    """Return the words before the cursor and the word at the cursor, or None in other shells.

    Bash splits `env=at` into three words and expects only the part after the `=`. This function joins the words again.
    """
    if "COMP_WORDS" not in os.environ or not os.environ.get("COMP_CWORD", "").isdecimal():
        return None
    lexer = shlex.shlex(os.environ["COMP_WORDS"], posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        for word in lexer:
            words.append(word)
    except ValueError:  # an unclosed quotation mark
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
    if key in groups:
        longer = [name for name in groups if name.startswith(key) and name != key and not equals]
        return [*_options(key, value, folders), *((f"{name}=", "") for name in longer)]
    annotations, content = _keys(command, given)
    if not equals:
        names = [name for name in (*groups, *annotations) if name.startswith(key) and (key or "." not in name)]
        if len(names) != 1:
            return [(f"{name}=", "") for name in names]
        key = names[0]
    return _options(key, value, folders) if key in groups else _values(key, value, annotations, content, folders)


def _options(group: str, prefix: str, folders: Sequence[Path]) -> list[tuple[str, str]]:
    files = options.options(group, folders)
    if group in introspection.SEVERAL and prefix.startswith("["):
        return _listed(group, prefix, [name for name in files if name != "none"])
    return [(f"{group}={name}", options.description(file)) for name, file in files.items() if name.startswith(prefix)]


def _keys(command: str, given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all keys with their annotations, and the configuration with the overrides that were given."""
    from mtrl_cli.config import compose, schema, validation

    if command == "resume":  # the argument may be a run or a sweep
        everything = schema.keys_of(schema.Trainer)
        of_sweeps, content = _keys("sweep", [word for word in given if word.startswith("launcher")])
        changed = {name: key for name, key in of_sweeps.items() if name in SWEEP_RESUMABLE or name.startswith("launcher.")}
        return {**{name: everything[name].annotation for name in compose.RESUMABLE}, **changed}, content
    if command == "sweep":
        shared, of_sweep = _split(given)
        (annotations, content), sweep = _keys("train", shared), _composed("sweep", of_sweep)
        return {**annotations, **validation.dotted_keys(sweep, command="sweep")}, {**content, **sweep}
    content = _composed(command, given)
    return validation.dotted_keys(content, command=command), content


def _split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into the overrides of a sweep's first run and those of the sweep. Words that cannot be parsed are skipped."""
    from mtrl_cli.sweeps import search_space

    shared: list[str] = []
    of_sweep: list[str] = []
    for word in given:
        try:
            apart = search_space.split_overrides([word])
        except UserError:
            continue
        shared += [*apart.shared, *search_space.overrides_of(search_space.first_values(apart.axes))]
        of_sweep += apart.sweep
    return shared, of_sweep


def _composed(command: str, given: Sequence[str]) -> dict[str, Any]:
    """Return the configuration, without the overrides if they are invalid."""
    from mtrl_cli.config import compose

    try:
        return compose.compose_unchecked(command, given)
    except UserError:
        return compose.compose_unchecked(command, [])


def _values(
    key: str, prefix: str, annotations: Mapping[str, Any], content: dict[str, Any], folders: Sequence[Path]
) -> list[tuple[str, str]]:
    """Return `key=value` for each choice or task name, or else for the current value."""
    from mtrl_cli.config import compose

    if key not in annotations:
        return []
    values = dict(compose.flat(content))
    if key == "env.tasks":
        return _listed(key, prefix, sorted(options.known_tasks(str(values.get("env._target_")), folders) or []))
    choices, current = _choices(annotations[key]), values.get(key)
    if isinstance(current, str | int | float) and not isinstance(current, bool) and str(current) not in choices:
        choices = ["", *choices, str(current)]  # with two completions, the shell adds no space after the value
    return [(f"{key}={choice}", "") for choice in choices or [""] if choice.startswith(prefix)]


def _listed(key: str, prefix: str, known: Sequence[str]) -> list[tuple[str, str]]:
    """Complete the last name of a list: `env.tasks=[pong,br` to `env.tasks=[pong,breakout`."""
    before, _, last = prefix.lstrip("[").rpartition(",")
    start = "[" + (f"{before}," if before else "")
    found = [f"{key}={start}{name}" for name in known if name.startswith(last) and name not in before.split(",")]
    if len(found) == 1:
        found = [f"{found[0]}]", f"{found[0]},"]  # with two completions, the shell adds no space
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
