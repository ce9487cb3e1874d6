"""`mtrl ls`: the groups, and the options of one, with a line each; of a part of a network, with the size of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtrl_cli.config import compose, options
from mtrl_cli.errors import UserError, unknown
from mtrl_cli.runs.terminal import as_text, table

SIZED = ("network", "network/sharing", "network/head")
"""The groups whose options are listed with their sizes, which takes building them."""

LONGEST_REASON = 100


def list_words(words: Sequence[str]) -> str:
    """What `mtrl ls` prints for its words: at most one group, and overrides: those of a run for the groups that are listed with sizes,
    else only folders of the user's own.

    Raises:
        UserError: there is no such group or folder, a word is something else, or with these overrides no option can be built.
    """
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"mtrl ls {' '.join(names)}: expected one group")
    group = names[0].replace(".", "/").strip("/") if names else None
    stranger = next((word for word in overrides if not word.startswith("hydra.searchpath=")), None)
    if stranger is not None and group not in SIZED:
        raise UserError(f"mtrl ls {stranger}: expected a group, or hydra.searchpath=[file:///home/me/conf]")
    folders = compose.search_path(overrides)
    if group is None:
        return list_groups(folders)
    return list_sizes(group, folders, overrides) if group in SIZED else list_options(group, folders)


def list_groups(folders: Sequence[Path]) -> str:
    """All groups, what each is by default, and what else it can be."""
    defaults = options.default_choices()
    names = options.groups(folders, None)
    lines = []
    for name in names:
        default = defaults.get(name)
        others = [option for option in options.options(name, folders) if option != default]
        lines.append((name, f"{default or '-'}", ", ".join(others)))
    return (
        as_text(table(lines, ("group", "default", "or")))
        + "\n\nmtrl ls GROUP describes the options of one, mtrl train GROUP=OPTION takes one (launcher: mtrl sweep)."
    )


def list_options(group: str, folders: Sequence[Path]) -> str:
    """The options of a group, each with the first comment of its file; the default is marked by a star.

    Raises:
        UserError: there is no such group.
    """
    names = options.groups(folders, None)
    if group not in names:
        raise UserError(unknown("group", group, names))
    rows = [(_starred(group, name), options.description(file)) for name, file in options.options(group, folders).items()]
    return as_text(table(rows, ("", ""), show_header=False)) + _within(group, folders)


def list_sizes(group: str, folders: Sequence[Path], overrides: Sequence[str]) -> str:
    """The same, each with the parameters and the multiply-adds of a network that has it: by default, or with a run's overrides.

    Each torso is counted with the pack that goes with it. An option that cannot be built, for want of a package or because it does not go
    with the overrides, says why.

    Raises:
        UserError: none can be built.
    """
    for word in overrides:
        if word.partition("=")[0] == group:
            raise UserError(f"mtrl ls {group} {word}: expected no choice of {group}, as all of its options are listed")
    size, reasons = _sizes(), []
    header = ("  ", "parameters", "shared", "each task's own", "multiply-adds", "counted with", "")
    rows: list[tuple[str, ...]] = []
    for name, file in options.options(group, folders).items():
        env = () if any(word.startswith(("env=", "experiment=")) for word in overrides) else (f"env={_pack_for(group, name, folders)}",)
        description = options.description(file)
        try:
            rows.append((_starred(group, name), *size([*env, *overrides, f"{group}={name}"]), description))
        except (ValueError, RuntimeError) as error:  # what torch cannot build is a RuntimeError
            reasons.append(_in_a_few_words(error))
            rows.append((_starred(group, name), *["-"] * 4, "", f"{description} (not counted: {reasons[-1]})"))
    if len(reasons) == len(rows):
        raise UserError(f"mtrl ls {group}: {reasons[0]}")
    note = (
        "\n\nNumbers are of the whole network, multiply-adds of a forward per observation."
        f"\nWith another pack or width: mtrl ls {group} env=minatar_pack network.parameters=300k"
    )
    return as_text(table(rows, header)) + note + _within(group, folders)


def _sizes() -> Callable[[list[str]], tuple[str, ...]]:
    """What tells, for a run's overrides: parameters in all, shared, each task's own, multiply-adds, and the pack. It imports torch."""
    from mtrl_cli.build import network as build_network
    from mtrl_cli.build import resolve_auto
    from mtrl_cli.build import run as build_run

    packs: dict[str, Any] = {}

    def size(overrides: list[str]) -> tuple[str, ...]:
        composed = compose.compose_training(overrides)
        env = repr(composed["env"])
        if env not in packs:
            packs[env] = build_run.make_pack(composed)
        fitted = resolve_auto.fit_network(composed, packs[env])
        counts, multiply_adds = build_network.measure(fitted, packs[env])
        return (
            f"{counts.total:,}",
            f"{counts.shared:,}",
            resolve_auto.own(counts),
            resolve_auto.in_short(multiply_adds),
            composed["env"]["name"],
        )

    return size


def _pack_for(group: str, option: str, folders: Sequence[Path]) -> str | None:
    """The pack with which an option is counted: for a torso the first that chooses it by default, else the default."""
    default = options.default_choices()["env"]
    if group == "network":
        names = sorted(options.options("env", folders), key=lambda name: name != default)
        return next((name for name in names if options.chosen_by("env", name, "network", folders) == option), default)
    return default


def _in_a_few_words(error: Exception) -> str:
    """What went wrong, without the advice that follows its colon where it is long."""
    words = " ".join((str(error) or type(error).__name__).split())
    while len(words) > LONGEST_REASON and ": " in words:
        words = words.rpartition(": ")[0]
    return words[:LONGEST_REASON]


def _starred(group: str, option: str) -> str:
    return ("* " if option == options.default_choices().get(group) else "  ") + option


def _within(group: str, folders: Sequence[Path]) -> str:
    within = [name for name in options.groups(folders) if name.startswith(f"{group}/")]
    return f"\n\nwithin it: {', '.join(within)}" if within else ""
