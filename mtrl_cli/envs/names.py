"""Validate task names in a configuration."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mtrl_cli.errors import UserError, unknown


def check_names(names: Sequence[str], known: Collection[str], kind: str, key: str = "env.tasks") -> None:
    """Check that all names are known.

    Args:
        kind: kind of name, for messages: "an Atari game".
        key: configuration key of the names.

    Raises:
        UserError: an unknown name, with a suggestion.
    """
    for name in names:
        if name not in known:
            raise UserError(unknown("task", name, sorted(known), where=f" in {key}: not {kind}"))
