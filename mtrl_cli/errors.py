"""Exceptions that end a command, with the exit codes of the command line, and helpers for error messages."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any

MOST_LISTED = 30
"""Maximum number of candidates in the message for an unknown name."""


class UserError(ValueError):
    """Invalid command, configuration or folder; nothing was created. The message has one or two lines. Exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """The run failed, for example because of a non-finite loss or a full disk. The message has one or two lines. Exit code 1."""

    exit_code = 1


class RanksLost(RunError):
    """Another rank has ended, so this rank cannot continue.

    Attributes:
        is_reported: whether this rank has printed the error.
    """

    is_reported = False


class Stopped(BaseException):
    """SIGINT or SIGTERM was received. Exit code 128 + signal number, after saving.

    Not an `Exception`, so that no `except Exception` in a library can swallow it.

    Attributes:
        is_reported: whether the state of the run has been printed.
    """

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.is_reported = False


def show(value: Any) -> str:
    """Format a value for a message: on one line, at most 80 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
    if not re.fullmatch(r"[\w./:,@+\[\]{} '-]+", text):
        text = repr(text)
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def quoted(value: Any) -> str:
    """Format a value for a message, in quotes."""
    text = show(value)
    return text if text[:1] in ("'", '"') else f"'{text}'"


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar candidate, or None. Case is ignored; among equally similar candidates the shortest wins."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates, key=len, reverse=True)}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[matches[0]] if matches else None


def did_you_mean(suggestion: str | None, otherwise: str) -> str:
    """Format a suggestion, or other advice where there is no suggestion."""
    return f"Did you mean {quoted(suggestion)}?" if suggestion else otherwise


def unknown(kind: str, name: Any, candidates: Iterable[str], *, prefix: str = "", where: str = "", otherwise: str = "") -> str:
    """Format the message for an unknown name: `unknown option 'env=atari'. Did you mean 'env=atari_pack'?`

    Args:
        kind: `key`, `option`, `group`, `task`.
        name: the unknown name.
        candidates: the known names.
        prefix: text before the name and the suggestion (`env=`).
        where: end of the first sentence (` in DQN`).
        otherwise: advice where no candidate is similar; default: the candidates, if there are few.
    """
    known = list(candidates)
    near = nearest(str(name), known)
    listed = f"Expected one of: {', '.join(known)}" if len(known) <= MOST_LISTED else ""
    advice = did_you_mean(near and prefix + near, otherwise or listed)
    return f"unknown {kind} {quoted(f'{prefix}{show(name)}')}{where}. {advice}".rstrip(". ")


def print_error(message: str) -> None:
    """Print an error on standard error. Control characters are replaced, as a message may quote an untrusted file."""
    print(f"mtrl: error: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Replace characters that could control the terminal, except line ends. Files of a run may be untrusted."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
