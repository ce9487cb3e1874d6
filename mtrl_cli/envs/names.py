"""Names of tasks that a configuration gives."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Sequence

from mtrl_cli.errors import UserError


def check_names(names: Sequence[str], known: Collection[str], what: str, key: str = "env.tasks") -> None:
    """Refuse an empty list, a name given twice, and a name that is not `known`, suggesting what may have been meant.

    Args:
        what: what the names are, for messages: "an Atari game".
        key: where they stand.

    Raises:
        UserError
    """
    if not names:
        raise UserError(f"{key} is empty: name at least one task, {what} each, such as {key}=[{min(known, default='...')}]")
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{key} names {name} {count} times: each task may be given once")
        if name not in known:
            lowered = {each.lower(): each for each in sorted(known)}
            meant = [lowered[each] for each in difflib.get_close_matches(name.lower(), lowered)]
            choices = sorted(known) if len(known) <= 20 else []
            hint = f"did you mean {' or '.join(meant)}?" if meant else f"choose from {', '.join(choices)}" if choices else ""
            raise UserError(f"{key}: {name!r} is not {what}" + (f"; {hint}" if hint else ""))
