"""Phrases and formats that several report sections use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def some(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """List names, and count those beyond the first few: `a, b and 3 more`."""
    return separator.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: `1 run`, `2 runs`."""
    return f"{count:,} {noun if count == 1 else noun + 's'}"


def titled(title: str, about: str) -> str:
    """Add a section's subject, if there is one, to its title: `Transfer: optimizer.lr=0.001`."""
    return f"{title}: {about}" if about else title


def clipped(text: str, most: int) -> str:
    """Shorten text to at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def word(value: Any) -> str:
    """Format a configuration value for an override: the text after `KEY=`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
