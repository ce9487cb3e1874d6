"""What there is to choose: the configuration's folders, their groups, and the options of each. Reads files, composes nothing."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtrl_cli.errors import UserError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML built without libyaml has only the slow one

TASKS_OF_ANY_NAME: None = None

NAMES_ON_DISK = {"mtrl_cli.envs.atari.AtariPack": ("ale_py", "roms", "*.bin")}
"""Packs whose tasks are files of another package, which tell their names before it is imported: package, folder, files."""


def conf_folder() -> Path:
    """Where our own configuration lies: in the package as a wheel installs it, else beside it in the checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(
        f"The configuration is missing: neither {package / 'conf'} nor {package.parent / 'conf'} holds train.yaml; install mtrl_cli again"
    )


NOT_CHOSEN = {"tuned"}
"""Groups whose option follows from other choices: from a pack and an agent."""


OF_SWEEPS = {"launcher"}
"""Groups that `mtrl sweep` chooses from, and no run."""


def groups(folders: Sequence[Path], command: str | None = "train") -> list[str]:
    """The names of the groups that `train` or `sweep` chooses from (None: of all), nested ones as `network/sharing`, in the order of
    train.yaml, users' own last."""
    names = {file.parent.relative_to(folder).as_posix() for folder in folders for file in folder.rglob("*.yaml") if file.parent != folder}
    names -= NOT_CHOSEN
    if command is not None:
        names = names & OF_SWEEPS if command == "sweep" else names - OF_SWEEPS
    order = list(default_choices())
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def options(group: str, folders: Sequence[Path]) -> dict[str, Path]:
    """The options of a group by name, each with its file.

    Raises:
        UserError: two folders hold an option of the same name (Hydra would silently take the first).
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted((folder / group).glob("*.yaml")):
            if file.stem in found:
                raise UserError(f"{group}={file.stem} is both {found[file.stem]} and {file}: rename your own")
            found[file.stem] = file
    return found


def default_choices() -> dict[str, str | None]:
    """The defaults lists of train.yaml and sweep.yaml: group to option."""
    entries = [entry for name in ("train.yaml", "sweep.yaml") for entry in read_yaml(conf_folder() / name)["defaults"]]
    return {group: option for entry in entries if isinstance(entry, Mapping) for group, option in entry.items()}


def chosen_by(group: str, option: str, other: str, folders: Sequence[Path]) -> str | None:
    """What an option's own defaults list chooses for another group (`override /network: mlp`), if it does."""
    entries = read_yaml(options(group, folders)[option]).get("defaults") or []
    return next((entry[f"override /{other}"] for entry in entries if isinstance(entry, Mapping) and f"override /{other}" in entry), None)


def description(file: Path) -> str:
    """The first comment line of an option that is not a header (`# @package _global_`), without its `#`; empty if there is none."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if text and not text.startswith("@"):
            return text
    return ""


def read_yaml(file: Path) -> dict[str, Any]:
    """One file of the configuration as it stands, with nothing merged or interpolated."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{file}: expected keys and values")
    return content or {}


def known_tasks(target: str, folders: Sequence[Path]) -> set[str] | None:
    """The names of all tasks that the options of group `env` give to the pack class `target`, and those in `NAMES_ON_DISK`.

    None (`TASKS_OF_ANY_NAME`) where one of its options names no task: such a pack takes any, and says itself which it does not know.
    """
    files = options("env", folders)
    known: set[str] = set()
    for file in files.values():
        env = _env_section(file, files)
        if env.get("_target_") == target:
            if not env.get("tasks"):
                return TASKS_OF_ANY_NAME
            known.update(str(name) for name in env["tasks"])
    if target in NAMES_ON_DISK:
        package, folder, pattern = NAMES_ON_DISK[target]
        found = importlib.util.find_spec(package)
        known.update(
            file.stem for place in (found and found.submodule_search_locations) or [] for file in Path(place, folder).glob(pattern)
        )
    return known


def _env_section(file: Path, files: Mapping[str, Path], depth: int = 0) -> dict[str, Any]:
    """An option's `env`, over those of the options that its defaults list builds on."""
    content = read_yaml(file)
    merged: dict[str, Any] = {}
    for entry in content.get("defaults") or []:
        if isinstance(entry, str) and entry in files and entry != file.stem and depth < 8:
            merged.update(_env_section(files[entry], files, depth + 1))
    env = content.get("env")
    return {**merged, **(env if isinstance(env, dict) else {})}


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that was probably meant, or None. Case does not matter; of equally near ones the shortest."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates, key=len, reverse=True)}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str], otherwise: str | None = None) -> str:
    """`did you mean X?`, or else `expected one of …` (or the given words)."""
    candidates = list(candidates)
    near = nearest(word, candidates)
    return f"did you mean {near}?" if near else otherwise or "expected one of: " + ", ".join(candidates)
