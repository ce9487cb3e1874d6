"""Validate task names in a configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from mtrl_cli.errors import UserError, unknown


def check_names(names: Sequence[str], known: Collection[str], kind: str, key: str = "env.tasks") -> None:
    """Raise UserError for an empty list, a repeated name, or an unknown name (with a suggestion).

    Args:
        kind: the kind of name, for messages: "an Atari game".
        key: the configuration key that holds the names.
    """
    if not names:
        raise UserError(f"{key} must name at least one task ({kind}), for example {key}=[{min(known, default='...')}]")
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{key} must name each task once, got {name} {count} times")
        if name not in known:
            raise UserError(unknown("task", name, sorted(known), where=f" in {key}: not {kind}"))
