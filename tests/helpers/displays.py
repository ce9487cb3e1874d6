"""A clock that is advanced by hand, and the table of a live display on a terminal of some size."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mtrl_cli.runs import terminal
from mtrl_cli.runs.terminal import LiveDisplay


class Clock:
    """A clock that is advanced by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(terminal.time, "monotonic", lambda: self.now)


def set_size(shown: LiveDisplay, width: int, height: int) -> None:
    """Set the size of a display's terminal."""
    shown.console = Console(file=io.StringIO(), width=width, height=height)


def rendered(shown: LiveDisplay) -> str:
    """Return the text of a display's table."""
    out = io.StringIO()
    Console(file=out, width=shown.console.width, height=shown.console.height).print(shown.table())
    return out.getvalue()
