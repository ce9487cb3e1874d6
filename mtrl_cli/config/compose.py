"""Compose, write and load configurations: plain dictionaries, validated except by `compose_unchecked`.

Overrides and configuration folders come from the user: Hydra's grammar, interpolations resolved. Run folders may come from untrusted
sources: plain YAML of bounded size, no aliases, no interpolations, and no influence on which packages are trusted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtrl_cli.config import introspection, merge, options, safe_yaml, schema, validation
from mtrl_cli.config.overrides import Override, hydra_quoted, parse
from mtrl_cli.errors import UserError, first_line, quoted, show, unknown
from mtrl_cli.parallel import torchrun

RESUMABLE = ("steps_per_task", "device", "trusted_packages")
"""Keys that may change when a run is resumed."""


def compose_training(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration of `mtrl train`. `auto` values are kept; torchrun sets `ranks`.

    Raises:
        UserError: an override is malformed, or names an unknown group, option, key, value, task or class.
    """
    config, folders, trusted = _compose("train", overrides)
    checked = validation.validate(config, trusted=trusted)
    _check_known_tasks(checked["env"], folders)
    for key in ("run_dir", "init_from"):
        if checked[key] is not None:
            checked[key] = os.path.expanduser(checked[key])
    size = torchrun.place().size
    if checked["ranks"] not in (1, size):
        raise UserError(f"ranks must be set by torchrun, got {checked['ranks']}. Use: {torchrun.command(checked['ranks'], 'train …')}")
    return checked | {"ranks": size}


def compose_evaluation(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration of `mtrl eval`; null means the value of the run.

    Raises:
        UserError: an override is malformed, or names an unknown key or value.
    """
    fixed = {*introspection.KINDS, *schema.keys_of(schema.Trainer), *schema.SECTIONS["train"], "experiment"}
    fixed -= {*schema.keys_of(schema.Evaluation), *schema.SECTIONS["eval"]}
    for text in overrides:
        top = re.split(r"[./=@]", text.lstrip("+~"), maxsplit=1)[0]
        if top in fixed:
            raise UserError(
                f"{text}: mtrl eval uses the {top} of the run. Set only eval.episodes, eval.max_steps, eval.epsilon, eval.seed, "
                "checkpoint, video, device or trusted_packages"
            )
    config, _, trusted = _compose("eval", overrides)
    return validation.validate(config, command="eval", trusted=trusted)


def compose_sweep(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration of `mtrl sweep` itself, without the overrides of the runs.

    Raises:
        UserError: an override is malformed, or names an unknown launcher, key or value.
    """
    config, _, trusted = _compose("sweep", overrides)
    checked = validation.validate(config, command="sweep", trusted=trusted)
    return checked | {"run_dir": None if checked["run_dir"] is None else os.path.expanduser(checked["run_dir"])}


def compose_unchecked(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration of `train`, `eval` or `sweep` without validation, to list its keys.

    Raises:
        UserError: an override is malformed, or names an unknown group or option.
    """
    return _compose(command, overrides)[0]


def load_run(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the configuration of a run folder, with the changes that a resume allows.

    Args:
        run: the run folder.
        overrides: `steps_per_task=…` (no less than before), `device=…` and `trusted_packages=[…]`.

    Raises:
        UserError: the folder is not a run, its configuration is invalid, or an override is not allowed.
    """
    given = [parse(text) for text in overrides]
    for each, text in zip(given, overrides, strict=True):
        if each.key not in RESUMABLE or text.startswith("~"):
            raise UserError(f"{text}: a resumed run keeps its configuration. Change only {', '.join(RESUMABLE[:-1])} or {RESUMABLE[-1]}")
    config = load(run / "config.yaml", trusted=trusted_packages(overrides))
    changes = {each.key: each.value for each in given if each.key != "trusted_packages"}
    if not changes:
        return config
    changed = validation.validate({**config, **changes}, trusted=config["trusted_packages"])
    if changed["steps_per_task"] < config["steps_per_task"]:
        raise UserError(
            f"steps_per_task must be at least {config['steps_per_task']}, the budget of the run, got {changed['steps_per_task']}"
        )
    return changed


def load(path: Path, *, trusted: Sequence[str] | None = None) -> dict[str, Any]:
    """Read and validate config.yaml of a run folder. Named classes are imported only from packages that the user trusts.

    Args:
        path: path of config.yaml.
        trusted: packages that the user trusts, instead of the packages listed in the file; None: the packages in the user's settings.

    Raises:
        UserError: the file is missing, too large, not plain YAML, or not a valid configuration.
    """
    content = safe_yaml.read(path)
    trusted = list(trusted_packages() if trusted is None else trusted)
    try:
        return validation.validate({**content, "trusted_packages": trusted}, trusted=trusted)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def dump(config: dict[str, Any]) -> str:
    """Format a configuration as YAML in the order of its keys. `load` returns the same configuration."""
    return safe_yaml.dump(config)


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a configuration by dotted key (`agent.n_step`)."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def settings_file() -> Path:
    """Return the path of the user's settings: `$XDG_CONFIG_HOME/mtrl/settings.yaml`, by default under ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mtrl" / "settings.yaml"


def trusted_packages(overrides: Sequence[str] = ()) -> list[str]:
    """Return the packages that the user trusts: from MTRL_TRUSTED_PACKAGES (comma-separated), the user's settings and the overrides.

    Raises:
        UserError: the override or the settings are not a list of package names.
    """
    named = [name.strip() for name in os.environ.get("MTRL_TRUSTED_PACKAGES", "").split(",") if name.strip()]
    path = settings_file()
    if path.is_file():
        settings = options.read_yaml(path)
        for key in settings:
            if key != "trusted_packages":
                raise UserError(f"{path}: {unknown('key', key, ['trusted_packages'])}")
        named += validation.check_value(f"{path}: trusted_packages", settings.get("trusted_packages", []), list[str])
    for each in (parse(text) for text in overrides if "trusted_packages" in text):
        if each.key == "trusted_packages":
            named += validation.check_value("trusted_packages", each.value, list[str])
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"trusted_packages must contain dotted package names, got {quoted(name)}")
    return list(dict.fromkeys(named))


def trusting(packages: Sequence[str]) -> list[str]:
    """Return the override `trusted_packages=[…]`, or no override without packages."""
    return [f"trusted_packages=[{','.join(packages)}]"] if packages else []


def search_path(overrides: Sequence[str] = ()) -> list[Path]:
    """Return the built-in configuration folder and the user's folders of `hydra.searchpath=[file:///home/me/conf]`.

    Raises:
        UserError: an entry is not a folder.
    """
    folders = [options.conf_folder()]
    for each in (parse(text) for text in overrides if "hydra.searchpath" in text):
        entries = [each.value] if isinstance(each.value, str) else each.value
        for entry in validation.check_value("hydra.searchpath", entries, list[str]):
            folder = Path(entry.removeprefix("file://")).expanduser().absolute()
            if "://" in entry.removeprefix("file://") or not folder.is_dir():
                raise UserError(f"hydra.searchpath must list folders, such as [file:///home/me/conf], got {show(entry)}")
            folders.append(folder)
    return folders


def _compose(name: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Path], list[str]]:
    """Return the composed and resolved configuration, its folders, and the packages that the user trusts."""
    folders = search_path(overrides)
    trusted = trusted_packages(overrides)
    given = [each for each in (parse(text, name) for text in overrides) if each.key != "hydra.searchpath"]
    known = [] if name == "eval" else options.groups(folders, name)
    if name != "sweep":
        _refuse_sweep_keys(given)
    for_hydra = [_checked(each, known, folders) for each in given]
    try:
        content = _merged(name, folders, given, for_hydra)
    except merge.NeedsHydra:
        content = _composed_by_hydra(name, folders, for_hydra)
    content = {str(key): value for key, value in content.items()} | {"trusted_packages": trusted}
    if "${" in str(content):
        raise UserError("the configuration contains '${' after interpolations were resolved. Replace each interpolation by a value")
    _drop_inapplicable_keys(content, [each.key for each in given], trusted)
    return content, folders, trusted


def _merged(name: str, folders: Sequence[Path], given: Sequence[Override], for_hydra: Sequence[str]) -> dict[str, Any]:
    """Compose without Hydra. Overrides that start with `++` set values, all other overrides choose options."""
    if len(folders) > 1 or any(text.startswith("~") for text in for_hydra):
        raise merge.NeedsHydra
    pairs = list(zip(given, for_hydra, strict=True))
    choices = {each.key: "none" if each.value == [] else each.value for each, text in pairs if not text.startswith("++")}
    return merge.compose(name, choices, [each for each, text in pairs if text.startswith("++")])


def _composed_by_hydra(name: str, folders: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Compose with Hydra, which also reports mistakes in users' own configuration files."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    searched = f"hydra.searchpath=[{','.join(hydra_quoted(f'file://{folder}') for folder in folders[1:])}]"
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3", job_name="mtrl"):
            content = OmegaConf.to_container(compose(name, overrides=[*overrides, searched]), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"the configuration cannot be composed: {show(first_line(error))}") from None
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _drop_inapplicable_keys(content: dict[str, Any], given: Sequence[str], trusted: Sequence[str]) -> None:
    """Remove `network.layer_norm` (set by pqn) and `optimizer.eps` (set by packs) if the chosen class has no such key.

    Keys given by the user are kept, so that validation refuses them.
    """
    for group, name in (("network", "layer_norm"), ("optimizer", "eps")):
        node = content.get(group)
        if not isinstance(node, dict) or name not in node or f"{group}.{name}" in given:
            continue
        with suppress(UserError):  # validation reports a class that cannot be read
            known = introspection.read(f"{group}._target_", node.get("_target_"), introspection.KINDS[group], trusted).keys
            if name not in known:
                del node[name]


def _refuse_sweep_keys(given: Sequence[Override]) -> None:
    for each in given:
        top = re.split(r"[./]", each.key, maxsplit=1)[0]
        if top in ("launcher", "sweep"):
            raise UserError(f"{each.key} is a key of mtrl sweep, which starts several runs. Remove {each.key}, or use mtrl sweep")


def _checked(override: Override, known: Sequence[str], folders: Sequence[Path]) -> str:
    """Check the group or option of an override and return its text for Hydra.

    Keys are added (`++`) whether or not they exist, because the error message of validation is better than Hydra's.
    """
    key, for_hydra = override.key, override.for_hydra
    if key == "hydra" or key.startswith("hydra."):
        raise UserError(f"{key} is not supported. Use only hydra.searchpath=[file:///home/me/conf] of Hydra's settings")
    if key in options.NOT_CHOSEN:
        raise UserError(f"{key} cannot be chosen, because env and agent determine {key}. Set single values, such as agent.gamma=0.9")
    if for_hydra.startswith("~"):
        return for_hydra
    if key in known:
        if key == "experiment" and override.value is None:
            return for_hydra
        _check_chosen(override, options.options(key, folders))
        return for_hydra if override.value != [] else f"{key}=none"
    if "/" in key:
        raise UserError(unknown("group", key, known))
    if key.replace(".", "/") in known and not isinstance(override.value, dict):
        raise UserError(f"{key} is a group. Choose an option with {key.replace('.', '/')}={show(override.value)}")
    return f"++{for_hydra}"


def _check_chosen(override: Override, choices: Mapping[str, Path]) -> None:
    """Refuse unknown options. In a group that takes several options, also refuse duplicates, and `none` together with another option."""
    key, several = override.key, override.key in introspection.SEVERAL and isinstance(override.value, list)
    chosen = override.value if several else [override.value]
    for each in chosen:
        if each not in list(choices):
            raise UserError(unknown("option", show(each), choices, prefix=f"{key}="))
        if chosen.count(each) > 1:
            raise UserError(f"{key} contains {show(each)} twice. List each option once")
        if each == "none" and len(chosen) > 1:
            raise UserError(f"{key} contains none and other options. Remove either none or the other options")


def _check_known_tasks(env: dict[str, Any], folders: Sequence[Path]) -> None:
    known = options.known_tasks(env["_target_"], folders)
    for name in env.get("tasks", []):
        if known is not None and name not in known:
            where = f" of {env['name']} in env.tasks"
            raise UserError(
                unknown("task", name, sorted(known), where=where, otherwise=f"See {options.conf_folder() / 'env'} for known tasks")
            )
