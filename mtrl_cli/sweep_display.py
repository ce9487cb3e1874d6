"""What a user sees of a sweep: a live table of its trials on a terminal, plain lines anywhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the table shows it.

    Attributes:
        number: from 0.
        overrides: the words in which it differs from others.
        state: waiting, queued (with the launcher), running, completed, pruned, failed, or elsewhere (another worker has it).
        score: the last evaluation's figure, if there was one.
        step, steps: per task, so far and in all.
        seconds: of work so far; None before there was any.
        note: such as why it failed, or that it was gone on with after its process died.
    """

    number: int
    overrides: tuple[str, ...]
    state: str
    score: float | None = None
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    note: str = ""
