"""Configuration folders, groups and options. Reads files and composes nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtrl_cli.errors import UserError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML without libyaml has only the slow loader

ATARI = "mtrl_cli.envs.atari.AtariPack"
"""Pack whose tasks are the ROM files of ale_py, which are listed without importing ale_py."""

NOT_CHOSEN = {"tuned"}
"""Groups whose option is determined by the pack and the agent."""

SWEEP_GROUPS = {"launcher"}
"""Groups of `mtrl sweep`, not of runs."""


def conf_folder() -> Path:
    """Return the folder of the built-in configuration: inside an installed package, or next to the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no configuration: neither {package / 'conf'} nor {package.parent / 'conf'} contains train.yaml. Reinstall mtrl_cli")


def groups(folders: Sequence[Path], command: str | None = "train") -> list[str]:
    """List the groups of `train` or `sweep` (None: of both) in the order of train.yaml, then the groups of user folders.

    Nested groups have names such as `network/sharing`.
    """
    names = {file.parent.relative_to(folder).as_posix() for folder in folders for file in folder.rglob("*.yaml") if file.parent != folder}
    names -= NOT_CHOSEN
    if command is not None:
        names = names & SWEEP_GROUPS if command == "sweep" else names - SWEEP_GROUPS
    order = list(default_choices())
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def options(group: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Return the options of a group by name, each with its file.

    Raises:
        UserError: two folders contain an option of the same name (Hydra would silently take the first).
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted((folder / group).glob("*.yaml")):
            if file.stem in found:
                raise UserError(f"{group}={file.stem} is defined by both {found[file.stem]} and {file}. Rename your file")
            found[file.stem] = file
    return found


def default_choices() -> dict[str, str | None]:
    """Return the defaults lists of train.yaml and sweep.yaml as a dict from group to option."""
    entries = [entry for name in ("train.yaml", "sweep.yaml") for entry in read_yaml(conf_folder() / name)["defaults"]]
    return {group: option for entry in entries if isinstance(entry, Mapping) for group, option in entry.items()}


def chosen_by(group: str, option: str, other: str, folders: Sequence[Path]) -> str | None:
    """Return the option of group `other` that the defaults list of an option chooses (`override /network: mlp`), or None."""
    entries = read_yaml(options(group, folders)[option]).get("defaults") or []
    return next((entry[f"override /{other}"] for entry in entries if isinstance(entry, Mapping) and f"override /{other}" in entry), None)


def description(file: Path) -> str:
    """Return the first comment line of an option, without `#`; empty if there is no comment.

    Headers (`# @package _global_`) are skipped.
    """
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if text and not text.startswith("@"):
            return text
    return ""


def read_yaml(file: Path) -> dict[str, Any]:
    """Read one configuration file, without merging or interpolation."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{file} must contain keys and values")
    return content or {}


def known_tasks(target: str, folders: Sequence[Path]) -> set[str] | None:
    """Return all task names in the options of the pack class `target`, and for Atari also the names of all ROM files.

    Returns None if an option names no tasks: such a pack accepts any name and checks the names when the pack is built.
    """
    files = options("env", folders)
    known: set[str] = set()
    for file in files.values():
        env = _env_section(file, files)
        if env.get("_target_") == target:
            if not env.get("tasks"):
                return None
            known.update(str(name) for name in env["tasks"])
    if target == ATARI and (package := importlib.util.find_spec("ale_py")):
        known.update(file.stem for place in package.submodule_search_locations or [] for file in Path(place, "roms").glob("*.bin"))
    return known


def _env_section(file: Path, files: Mapping[str, Path], depth: int = 0) -> dict[str, Any]:
    """Return the `env` section of an option, merged over the sections of the options in its defaults list."""
    content = read_yaml(file)
    merged: dict[str, Any] = {}
    for entry in content.get("defaults") or []:
        if isinstance(entry, str) and entry in files and entry != file.stem and depth < 8:
            merged.update(_env_section(files[entry], files, depth + 1))
    env = content.get("env")
    return {**merged, **(env if isinstance(env, dict) else {})}
