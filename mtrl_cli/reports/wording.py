"""Phrases that several report sections use."""

from __future__ import annotations

from collections.abc import Sequence

FEW_SEEDS = 5


def some(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """List names, and count those beyond the first few: `a, b and 3 more`."""
    return separator.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: `1 run`, `2 runs`."""
    return f"{count:,} {noun if count == 1 else noun + 's'}"


def few_seeds(seeds: int) -> str:
    """Caution about intervals over fewer than `FEW_SEEDS` seeds."""
    return f"Intervals over {seeds} seeds are too narrow: take them as a hint, and run {FEW_SEEDS} or more."


def titled(title: str, about: str) -> str:
    """Add to a section's title what it is about, if anything: `Transfer: optimizer.lr=0.001`."""
    return f"{title}: {about}" if about else title
