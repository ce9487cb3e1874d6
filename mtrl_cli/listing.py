"""`mtrl ls`: the groups, and the options of one, with a line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtrl_cli import catalogue, config
from mtrl_cli.errors import UserError


def list_words(words: Sequence[str]) -> str:
    """What `mtrl ls` prints for its words: at most one group, and overrides that name folders of the user's own.

    Raises:
        UserError: there is no such group or folder, or a word is something else.
    """
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"mtrl ls {' '.join(names)}: expected one group")
    stranger = next((word for word in overrides if not word.startswith("hydra.searchpath=")), None)
    if stranger is not None:
        raise UserError(f"mtrl ls {stranger}: expected a group, or hydra.searchpath=[file:///home/me/conf]")
    folders = config.search_path(overrides)
    return list_options(names[0], folders) if names else list_groups(folders)


def list_groups(folders: Sequence[Path]) -> str:
    """All groups, what each is by default, and what else it can be."""
    defaults = catalogue.default_choices()
    names = catalogue.groups(folders)
    lines = []
    for name in names:
        default = defaults.get(name)
        others = [option for option in catalogue.options(name, folders) if option != default]
        lines.append((name, f"{default or '-'}", ", ".join(others)))
    return (
        _table([("group", "default", "or"), *lines]) + "\n\nmtrl ls GROUP describes the options of one, mtrl train GROUP=OPTION takes one."
    )


def list_options(group: str, folders: Sequence[Path]) -> str:
    """The options of a group, each with the first comment of its file; the default is marked by a star.

    Raises:
        UserError: there is no such group.
    """
    names = catalogue.groups(folders)
    group = group.replace(".", "/").strip("/")
    if group not in names:
        raise UserError(f"mtrl ls {group}: there is no such group; {catalogue.did_you_mean(group, names)}")
    default = catalogue.default_choices().get(group)
    rows = [
        (("* " if name == default else "  ") + name, catalogue.description(file))
        for name, file in catalogue.options(group, folders).items()
    ]
    within = [name for name in names if name.startswith(f"{group}/")]
    return _table(rows) + (f"\n\nwithin it: {', '.join(within)}" if within else "")


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
