"""Validate task names in a configuration."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Sequence

from mtrl_cli.errors import UserError


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
            lowered = {each.lower(): each for each in sorted(known)}
            matches = [lowered[each] for each in difflib.get_close_matches(name.lower(), lowered)]
            choices = f" Choose from {', '.join(sorted(known))}." if len(known) <= 20 else ""
            hint = f" Did you mean {' or '.join(matches)}?" if matches else choices
            raise UserError(f"{key}: {name!r} is not {kind}.{hint}")
