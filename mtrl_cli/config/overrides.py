"""Command-line overrides: `KEY=VALUE` in Hydra's grammar."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from mtrl_cli.config import options
from mtrl_cli.errors import UserError, did_you_mean, quoted

PATHS = ("run_dir", "init_from")
"""Keys whose values are plain text: a folder may be named 2025, 1e5 or a,b."""

_WORD = r"(?:-?(?:0|[1-9]\d*)(?:\.\d+)?(?:e-?[1-9]\d*)?|(?!(?i:true|false|null|inf|nan)\b)[A-Za-z][\w-]*|true|false|null)"
SIMPLE = re.compile(rf"([A-Za-z]\w*(?:\.[A-Za-z]\w*)+|[A-Za-z]\w*(?:/[A-Za-z]\w*)*)=({_WORD}|\[{_WORD}(?:,{_WORD})*\])", re.ASCII)
"""Overrides that are read without Hydra's parser, with the same result."""


@dataclass(frozen=True)
class Override:
    """One override: its key, its plain value, and its text for Hydra."""

    key: str
    value: Any
    for_hydra: str


def parse(text: str, command: str = "") -> Override:
    """Parse one override. A value that Hydra's grammar does not accept is read as text (`run_dir=~/a=b`).

    Args:
        text: the command-line argument.
        command: name of the command; with `train`, the error for several values refers to `mtrl sweep`.

    Raises:
        UserError: the text is not an override, or has several values.
    """
    simple = _parse_simple(text)
    if simple is not None:
        return simple
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override as Parsed
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    key, equals, value = text.partition("=")
    parsed: Parsed | None = None
    as_text = f"{key}={hydra_quoted(value)}"
    is_path = key in PATHS and value != "null" and value[:1] not in ('"', "'")
    for attempt in (as_text,) if is_path else (text, as_text):
        try:
            parsed = parser.parse_override(attempt)
            break
        except HydraException:
            if not equals or value[:1] in ("[", "{", '"', "'", "("):
                break
    if parsed is None or parsed.key_or_group == "":
        raise UserError(f"{quoted(text)} is not an override. {how_to_write(text)}")
    if parsed.is_sweep_override():
        remedies = [f"{key}=[{value}] for a list"] if "," in value and "(" not in value else []
        remedies += [f"mtrl sweep {shlex.quote(text)} for one run per value"] if command == "train" else []
        raise UserError(f"{key} must be a single value, got {value}" + (f". Use {', or '.join(remedies)}" if remedies else ""))
    if parsed.package is not None:
        raise UserError(f"{text}: packages (@) are not supported. Use {parsed.key_or_group}={value}")
    return Override(parsed.key_or_group, parsed.value(), str(parsed.input_line).lstrip("+"))


def _parse_simple(text: str) -> Override | None:
    """Read a simple override without Hydra's parser, whose import takes a quarter of a second. Returns None for any other override."""
    match = SIMPLE.fullmatch(text)
    if match is None:
        return None
    key, value = match.groups()
    if key in PATHS and value != "null":
        return None if value.startswith("[") else Override(key, value, f"{key}={hydra_quoted(value)}")
    plain = [_plain(word) for word in value[1:-1].split(",")] if value.startswith("[") else _plain(value)
    return Override(key, plain, text)


def _plain(word: str) -> Any:
    is_name = word[0].isalpha() and word not in ("true", "false", "null")
    return word if is_name else json.loads(word)


def how_to_write(text: str) -> str:
    """Return the advice for an argument that is not an override."""
    if "=" not in text:
        folders = [options.conf_folder()]
        for group in options.groups(folders, None):
            if text in options.options(group, folders):
                return did_you_mean(f"{group}={text}", "")
    return "Expected KEY=VALUE, such as env=atari_pack, agent.n_step=5 or env.tasks=[pong,breakout]"


def hydra_quoted(value: str) -> str:
    """Put text in double quotes for Hydra: a backslash is doubled only before a quote."""
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', re.sub(r"(\\+)$", r"\1\1", value)) + '"'
