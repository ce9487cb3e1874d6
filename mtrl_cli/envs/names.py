"""Names of tasks that a configuration gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from mtrl_cli.errors import UserError, unknown


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
            raise UserError(unknown("task", name, sorted(known), where=f" in {key}: not {what}"))
