"""Output to the terminal: lines, tables, formatted numbers, and the base class of live displays."""

from __future__ import annotations

import io
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mtrl_cli.parallel import torchrun

LIVE_SECONDS = 0.3
PLAIN_WIDTH = 200  # of tables where the output is not a terminal


def print_line(line: str) -> None:
    """Print a line on standard output, on the first rank only. After a broken pipe, print nothing."""
    if torchrun.place().is_first:
        OutputGuard(sys.stdout)(lambda: print(line, flush=True))


def is_live(out: TextIO) -> bool:
    """Return whether a table can be redrawn on `out`: a capable terminal, without NO_COLOR."""
    return _is_terminal(out) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("dumb", "unknown")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError. Rich would end the process."""
        self.quiet = True
        raise BrokenPipeError


def console(out: TextIO) -> Console:
    """Return a rich console on `out`: plain text, and wide enough for every table, if `out` is not a terminal."""
    if is_live(out):
        return _Console(file=out)
    width = None if _is_terminal(out) else PLAIN_WIDTH
    return _Console(file=out, force_terminal=False, no_color=True, color_system=None, width=width)


def _is_terminal(out: TextIO) -> bool:
    try:
        return out.isatty()
    except (AttributeError, ValueError):
        return False


def _discard_output(out: TextIO) -> None:
    """Redirect a broken standard output to the null device. Python would otherwise report an error at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, out.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


class OutputGuard:
    """Run actions that write to a stream, until the stream breaks: `guard(action)`.

    A closed pipe, a closed terminal or a full disk is no reason to end a training run.
    """

    def __init__(self, out: TextIO):
        self._out = out
        self._is_broken = False

    def __call__(self, action: Callable[[], object]) -> None:
        if self._is_broken:
            return
        try:
            action()
        except (OSError, UnicodeEncodeError, ValueError) as error:
            if not isinstance(error, OSError | UnicodeEncodeError) and not self._out.closed:
                raise
            self._is_broken = True
            _discard_output(self._out)


# -- tables -----------------------------------------------------------------------------------------------------------------------


def table(
    rows: Iterable[Sequence[str | Text]],
    header: Sequence[str],
    *,
    show_header: bool = True,
    right: Collection[str] = (),
    fold: Collection[str] = (),
    min_widths: Mapping[str, int] | None = None,
    max_widths: Mapping[str, int] | None = None,
    gap: int = 2,
) -> Table:
    """Build a table without borders. Cells are plain text: markup in them is not interpreted.

    Args:
        rows: the cells of each row.
        header: the columns' titles, by which the other arguments name columns.
        show_header: whether to print the titles.
        right: columns to align right.
        fold: columns that wrap where the terminal is narrow. Other columns are cut with an ellipsis.
        min_widths, max_widths: of columns, in characters.
        gap: spaces between columns.
    """
    built = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=show_header)
    for title in header:
        built.add_column(
            title,
            justify="right" if title in right else "left",
            no_wrap=title not in fold,
            overflow="fold" if title in fold else "ellipsis",
            min_width=(min_widths or {}).get(title),
            max_width=(max_widths or {}).get(title),
        )
    for row in rows:
        built.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return built


def as_text(renderable: RenderableType) -> str:
    """Render as plain text of any width, without trailing spaces."""
    out = io.StringIO()
    Console(file=out, force_terminal=False, no_color=True, color_system=None, width=100_000).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def number(value: float | None) -> str:
    """Format with about four digits and thousands separators: 0.12, 12.3, 1,234; "-" for None."""
    if value is None:
        return "-"
    if value != value or value in (float("inf"), -float("inf")):
        return str(value)
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 or value == int(value) else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def fixed(value: float | None) -> str:
    """Format with three decimals; "-" for None."""
    return "-" if value is None else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """Format as 1:02:03, or 2:03 below an hour; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# -- live displays ----------------------------------------------------------------------------------------------------------------


class LiveDisplay(ABC):
    """Show progress: a table that is redrawn on a terminal, or else a line at intervals.

    The output is also plain with NO_COLOR or TERM=dumb. After a broken pipe (`| head`) nothing more is printed.

    Args:
        out: where to write; None: standard output.
        quiet: whether to print nothing.

    Attributes:
        plain_seconds: the interval between lines.
    """

    plain_seconds: float

    def __init__(self, out: TextIO | None = None, *, quiet: bool = False):
        self.out = sys.stdout if out is None else out
        self.is_live = is_live(self.out) and not quiet
        self.console = console(self.out)
        self.console.quiet = quiet
        self._guard = OutputGuard(self.out)
        self._live: Live | None = None
        self._refreshed = -float("inf")
        self._printed_line: str | None = None  # None before the first refresh

    @abstractmethod
    def table(self) -> RenderableType:
        """Render the live table, within the size of `self.console`."""

    @abstractmethod
    def line(self) -> str:
        """Summarize the progress in one line."""

    def __enter__(self) -> Self:
        if self.is_live:
            self._live = Live(
                console=self.console, auto_refresh=False, transient=False, vertical_overflow="crop", get_renderable=self.table
            )
            self._guard(self._live.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._guard(self._live.stop)  # redraws the table
            self._live = None
        elif self._printed_line not in (None, self.line()):
            self.message(self.line())

    def refresh(self) -> None:
        """Redraw the table or print the line, if the last refresh was long enough ago."""
        now = time.monotonic()
        if now - self._refreshed < (LIVE_SECONDS if self.is_live else self.plain_seconds):
            return
        self._refreshed = now
        if self._live is not None:
            self._guard(self._live.refresh)
        elif not self.is_live:
            self._printed_line = self.line()
            self.message(self._printed_line)

    def message(self, text: str) -> None:
        """Print lines that stay, above the table."""
        self._guard(lambda: self.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def print(self, renderable: RenderableType) -> None:
        """Print a table that stays, above the live one."""
        self._guard(lambda: self.console.print(renderable))
