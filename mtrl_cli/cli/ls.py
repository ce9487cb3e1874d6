"""`mtrl ls`: list the configuration groups, or the options of one group, with network sizes where they apply."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtrl_cli.config import compose, options
from mtrl_cli.errors import UserError, unknown
from mtrl_cli.runs.terminal import as_text, table

SIZED = ("network", "network/sharing", "network/head")
"""Groups whose options are listed with the size of the network, for which each network is built."""

MAX_REASON_LENGTH = 300


def run(arguments: Sequence[str]) -> str:
    """Return the list to print.

    Args:
        arguments: at most one group, and overrides: those of a run for the groups in `SIZED`, else only hydra.searchpath.

    Raises:
        UserError: unknown group or folder, invalid argument, or no option can be built with these overrides.
    """
    overrides = [each for each in arguments if "=" in each]
    names = [each for each in arguments if "=" not in each]
    if len(names) > 1:
        raise UserError(f"mtrl ls accepts one group, got {' '.join(names)}")
    group = names[0].replace(".", "/").strip("/") if names else None
    refused = [override for override in overrides if not override.startswith("hydra.searchpath=")]
    if refused and group not in SIZED:
        raise UserError(f"mtrl ls: expected a group or hydra.searchpath=[file:///home/me/conf], got {refused[0]}")
    folders = compose.search_path(overrides)
    if group is None:
        return list_groups(folders)
    return list_sizes(group, folders, overrides) if group in SIZED else list_options(group, folders)


def list_groups(folders: Sequence[Path]) -> str:
    """List all groups with their default and their other options."""
    defaults = options.default_choices()
    lines = []
    for name in options.groups(folders, None):
        others = [option for option in options.options(name, folders) if option != defaults.get(name)]
        lines.append((name, defaults.get(name) or "-", ", ".join(others)))
    return (
        as_text(table(lines, ("group", "default", "other options")))
        + "\n\nmtrl ls GROUP describes the options of a group. mtrl train GROUP=OPTION selects one (launcher: mtrl sweep)."
    )


def list_options(group: str, folders: Sequence[Path]) -> str:
    """List the options of a group, each with the first comment of its file. A star marks the default.

    Raises:
        UserError: unknown group.
    """
    names = options.groups(folders, None)
    if group not in names:
        raise UserError(unknown("group", group, names))
    rows = [(_starred(group, name), options.description(file)) for name, file in options.options(group, folders).items()]
    return as_text(table(rows, ("", ""), show_header=False)) + _within(group, folders)


def list_sizes(group: str, folders: Sequence[Path], overrides: Sequence[str]) -> str:
    """List the options of a group with the parameters and the multiply-adds of a network that uses the option.

    Each torso is counted with the first pack that has it as default. An option that cannot be built is listed with the reason.

    Raises:
        UserError: no option can be built.
    """
    for override in overrides:
        if override.partition("=")[0] == group:
            raise UserError(f"mtrl ls {group} lists all options of {group}. Remove {override}")
    packs: dict[str, Any] = {}
    reasons: list[str] = []
    header = ("  ", "parameters", "shared", "per task", "multiply-adds", "counted with", "")
    rows: list[tuple[str, ...]] = []
    for name, file in options.options(group, folders).items():
        names_env = any(override.startswith(("env=", "experiment=")) for override in overrides)
        env = () if names_env else (f"env={_pack_for(group, name, folders)}",)
        description = options.description(file)
        try:
            rows.append((_starred(group, name), *_size([*env, *overrides, f"{group}={name}"], packs), description))
        except (ValueError, RuntimeError) as error:  # torch raises RuntimeError
            reasons.append(_short_message(error))
            rows.append((_starred(group, name), *["-"] * 4, "", f"{description} (not counted: {reasons[-1]})"))
    if len(reasons) == len(rows):
        raise UserError(f"mtrl ls {group}: {reasons[0]}")
    note = (
        "\n\nCounts are for the complete network; multiply-adds are per observation in the forward pass."
        f"\nFor another pack or size: mtrl ls {group} env=minatar_pack network.parameters=300k"
    )
    return as_text(table(rows, header)) + note + _within(group, folders)


def _size(overrides: list[str], packs: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells total, shared and per-task parameters, multiply-adds and pack. Imports torch.

    Args:
        overrides: of the run.
        packs: cache of packs by their section of the configuration.
    """
    from mtrl_cli.build import network as build_network
    from mtrl_cli.build import resolve_auto
    from mtrl_cli.build import run as build_run

    composed = compose.compose_training(overrides)
    env = repr(composed["env"])
    if env not in packs:
        packs[env] = build_run.make_pack(composed)
    fitted = resolve_auto.fit_network(composed, packs[env])
    counts, multiply_adds = build_network.measure(fitted, packs[env])
    per_task, cost = resolve_auto.own(counts), resolve_auto.in_short(multiply_adds)
    return (f"{counts.total:,}", f"{counts.shared:,}", per_task, cost, composed["env"]["name"])


def _pack_for(group: str, option: str, folders: Sequence[Path]) -> str | None:
    """Return the pack to count an option with: for a torso the first pack that has it as default, else the default pack."""
    default = options.default_choices()["env"]
    if group == "network":
        names = sorted(options.options("env", folders), key=lambda name: name != default)
        return next((name for name in names if options.chosen_by("env", name, "network", folders) == option), default)
    return default


def _short_message(error: Exception) -> str:
    """Return the message on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, MAX_REASON_LENGTH, placeholder=" …")


def _starred(group: str, option: str) -> str:
    return ("* " if option == options.default_choices().get(group) else "  ") + option


def _within(group: str, folders: Sequence[Path]) -> str:
    within = [name for name in options.groups(folders) if name.startswith(f"{group}/")]
    return f"\n\nsubgroups: {', '.join(within)}" if within else ""
