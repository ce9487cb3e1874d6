"""Composing, writing and loading configurations. What leaves this module is a plain dictionary that `schema.validate` has let through.

Composing is for the user's own words and folders: Hydra's grammar, interpolations resolved. Loading is for run folders, which may come from
a stranger: plain YAML of bounded size, no aliases, no interpolation, and no say in which packages are trusted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtrl_cli.config import introspection, merge, options, safe_yaml, validation
from mtrl_cli.config import schema as sections
from mtrl_cli.config.overrides import Override, parse, quoted
from mtrl_cli.errors import UserError
from mtrl_cli.parallel import torchrun

RESUMABLE = ("steps_per_task", "device", "trusted_packages")
"""What may be changed when a run is resumed."""


def compose_training(overrides: Sequence[str]) -> dict[str, Any]:
    """What `mtrl train` is to run: conf/train.yaml with the overrides, resolved and checked; `auto` stays, and torchrun has its say.

    Raises:
        UserError: an override cannot be read, or names a group, option, key, value, game or class that there is not.
    """
    config, folders, trusted = _compose("train", overrides)
    checked = validation.validate(config, trusted=trusted)
    _check_known_tasks(checked["env"], folders)
    for key in ("run_dir", "init_from"):
        if checked[key] is not None:
            checked[key] = os.path.expanduser(checked[key])
    here = torchrun.place()
    if checked["ranks"] not in (1, here.size):
        raise UserError(
            f"ranks={checked['ranks']}: how many train together is for torchrun to say: {torchrun.command(checked['ranks'], 'train …')}"
        )
    return checked | {"ranks": here.size}


def compose_evaluation(overrides: Sequence[str]) -> dict[str, Any]:
    """What `mtrl eval` is to play: conf/eval.yaml with the overrides, checked; null means as the run has it.

    Raises:
        UserError: an override cannot be read, or names a key or value that there is not.
    """
    of_training = {*introspection.KINDS, *sections.keys_of(sections.Trainer), *sections.SECTIONS["train"], "experiment"}
    of_training -= {*sections.keys_of(sections.Evaluation), *sections.SECTIONS["eval"]}
    for text in overrides:
        top = re.split(r"[./=@]", text.lstrip("+~"), maxsplit=1)[0]
        if top in of_training:
            raise UserError(
                f"{text}: mtrl eval takes a run's {top} as it was trained\n"
                "It can be told eval.episodes, eval.max_steps, eval.epsilon, eval.seed, checkpoint, video, device and trusted_packages"
            )
    config, _, trusted = _compose("eval", overrides)
    return validation.validate(config, command="eval", trusted=trusted)


def compose_sweep(overrides: Sequence[str]) -> dict[str, Any]:
    """What `mtrl sweep` is told besides the words of its runs: conf/sweep.yaml with the overrides, checked.

    Raises:
        UserError: an override cannot be read, or names a launcher, key or value that there is not.
    """
    config, _, trusted = _compose("sweep", overrides)
    checked = validation.validate(config, command="sweep", trusted=trusted)
    return checked | {"run_dir": None if checked["run_dir"] is None else os.path.expanduser(checked["run_dir"])}


def compose_unchecked(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What `train`, `eval` or `sweep` would be given, resolved but not checked: for whoever asks what there is to set.

    Raises:
        UserError: an override cannot be read, or names a group or option that there is not.
    """
    return _compose(command, overrides)[0]


def load_run(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a run folder, with what may be changed when it is resumed.

    Args:
        run: the run folder.
        overrides: `steps_per_task=…` (no less than before), `device=…` and `trusted_packages=[…]`.

    Raises:
        UserError: the folder is no run, its configuration is not acceptable, or an override is none of these.
    """
    given = [parse(text) for text in overrides]
    for each, text in zip(given, overrides, strict=True):
        if each.key not in RESUMABLE or text.startswith("~"):
            raise UserError(
                f"{text}: a run is resumed as it was started; only {', '.join(RESUMABLE[:-1])} and {RESUMABLE[-1]} can be given"
            )
    config = load(run / "config.yaml", trusted=trusted_packages(overrides))
    changes = {each.key: each.value for each in given if each.key != "trusted_packages"}
    if not changes:
        return config
    changed = validation.validate({**config, **changes}, trusted=config["trusted_packages"])
    if changed["steps_per_task"] < config["steps_per_task"]:
        raise UserError(
            f"steps_per_task={changed['steps_per_task']}: the run was started with {config['steps_per_task']}, "
            "and its budget can only be raised"
        )
    return changed


def load(path: Path, *, trusted: Sequence[str] | None = None) -> dict[str, Any]:
    """Read and check a run folder's config.yaml. Nothing that it names is imported, unless the user trusts its package.

    Args:
        path: the file.
        trusted: packages that the user named; None: those of the user's settings. The file's own list does not count: this replaces it.

    Raises:
        UserError: it is no such file, too large, no plain YAML, or no valid configuration.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}")
    content = safe_yaml.read(path)
    trusted = list(trusted_packages() if trusted is None else trusted)
    try:
        return validation.validate({**content, "trusted_packages": trusted}, trusted=trusted)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def dump(config: dict[str, Any]) -> str:
    """A configuration as YAML, in the order of its keys; `load` gives the same back."""
    return safe_yaml.dump(config)


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration's values by dotted key: `agent.n_step`."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def settings_file() -> Path:
    """The user's own settings: `$XDG_CONFIG_HOME/mtrl/settings.yaml`, by default under ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mtrl" / "settings.yaml"


def trusted_packages(overrides: Sequence[str] = ()) -> list[str]:
    """The packages whose classes may be named beside ours: from the overrides, MTRL_TRUSTED_PACKAGES (by commas) and the user's settings.

    Raises:
        UserError: the override or the settings are not a list of dotted names.
    """
    named = [name.strip() for name in os.environ.get("MTRL_TRUSTED_PACKAGES", "").split(",") if name.strip()]
    path = settings_file()
    if path.is_file():
        settings = options.read_yaml(path)
        for key in settings:
            if key != "trusted_packages":
                raise UserError(f"{path}: {validation.show(key)}: there is no such key; expected trusted_packages")
        named += validation.check_value(f"{path}: trusted_packages", settings.get("trusted_packages", []), list[str])
    for each in (parse(text) for text in overrides if "trusted_packages" in text):
        if each.key == "trusted_packages":
            named += validation.check_value("trusted_packages", each.value, list[str])
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"trusted_packages: {validation.show(name)}: expected the dotted name of a package")
    return list(dict.fromkeys(named))


def search_path(overrides: Sequence[str] = ()) -> list[Path]:
    """Our configuration's folder, then the user's own, from `hydra.searchpath=[file:///home/me/conf]`.

    Raises:
        UserError: one of them is no folder.
    """
    folders = [options.conf_folder()]
    for each in (parse(text) for text in overrides if "hydra.searchpath" in text):
        entries = [each.value] if isinstance(each.value, str) else each.value
        for entry in validation.check_value("hydra.searchpath", entries, list[str]):
            folder = Path(entry.removeprefix("file://")).expanduser().absolute()
            if "://" in entry.removeprefix("file://") or not folder.is_dir():
                raise UserError(
                    f"hydra.searchpath: {validation.show(entry)} is no folder: expected such as hydra.searchpath=[file:///home/me/conf]"
                )
            folders.append(folder)
    return folders


def _compose(name: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Path], list[str]]:
    """The composed and resolved content, the folders that it came from, and the packages that the user trusts."""
    folders = search_path(overrides)
    trusted = trusted_packages(overrides)
    given = [parse(text, name) for text in overrides]
    known = [] if name == "eval" else options.groups(folders, name)
    if name != "sweep":
        _refuse_words_of_sweeps(given)
    given = [each for each in given if each.key != "hydra.searchpath"]
    for_hydra = [_checked(each, known, folders) for each in given]
    try:
        content = _merged(name, folders, given, for_hydra)
    except merge.NeedsHydra:
        content = _composed_by_hydra(name, folders, for_hydra)
    content = {str(key): value for key, value in content.items()} | {"trusted_packages": trusted}
    if "${" in str(content):
        raise UserError("The configuration holds '${' after resolving: write the value itself")
    _leave_out_unknown(content, [each.key for each in given], trusted)
    return content, folders, trusted


def _merged(name: str, folders: Sequence[Path], given: Sequence[Override], for_hydra: Sequence[str]) -> dict[str, Any]:
    """Compose without Hydra; overrides that start with `++` set values, the others choose options."""
    if any(text.startswith("~") for text in for_hydra):
        raise merge.NeedsHydra("a deletion")
    values = [(each.key, each.value) for each, text in zip(given, for_hydra, strict=True) if text.startswith("++")]
    choices = {each.key: each.value for each, text in zip(given, for_hydra, strict=True) if not text.startswith("++")}
    return merge.compose(name, folders, {group: "none" if option == [] else option for group, option in choices.items()}, values)


def _composed_by_hydra(name: str, folders: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Compose with Hydra, which also reports mistakes in users' own configuration files."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    searched = ["hydra.searchpath=[" + ",".join(quoted(f"file://{folder}") for folder in folders[1:]) + "]"] if len(folders) > 1 else []
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3", job_name="mtrl"):
            content = OmegaConf.to_container(compose(name, overrides=[*overrides, *searched]), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError("The configuration cannot be composed: " + _first_line(error)) from None
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _leave_out_unknown(content: dict[str, Any], given: Sequence[str], trusted: Sequence[str]) -> None:
    """Take out what is set for every class of a group, and not by the user, where the one chosen does not know it: the LayerNorm that
    an agent asks of the network (pqn), the eps that suits a pack with the optimizers that have one."""
    for group, name in (("network", "layer_norm"), ("optimizer", "eps")):
        node = content.get(group)
        if not isinstance(node, dict) or name not in node or f"{group}.{name}" in given:
            continue
        with suppress(UserError):  # of a class that cannot be read the schema will tell
            known = introspection.read(f"{group}._target_", node.get("_target_"), introspection.KINDS[group], trusted, None).keys
            if name not in known:
                del node[name]


def _refuse_words_of_sweeps(given: Sequence[Override]) -> None:
    """Say whose a word is that is none of a run's."""
    for each in given:
        top = re.split(r"[./]", each.key, maxsplit=1)[0]
        if top in ("launcher", "sweep"):
            raise UserError(
                f"{each.key}: {top} is of mtrl sweep, which starts many runs; leave it out, or write mtrl sweep for this command"
            )


def _checked(override: Override, known: Sequence[str], folders: Sequence[Path]) -> str:
    """The override as Hydra is to have it, once its group, option or section is known to exist.

    A key is always added (`++`), existing or not: the schema's word on a key that does not exist is better than Hydra's.
    """
    key, for_hydra = override.key, override.for_hydra
    if key == "hydra" or key.startswith("hydra."):
        raise UserError(f"{key}: of Hydra's own settings only hydra.searchpath=[file:///home/me/conf] has a meaning here")
    if key in options.NOT_CHOSEN:
        raise UserError(f"{key}: what is tuned follows from env and agent; to change a value give it, such as agent.gamma=0.9")
    if for_hydra.startswith("~"):
        return for_hydra
    if key in known:
        if key == "experiment" and override.value is None:
            return for_hydra
        _check_chosen(override, options.options(key, folders))
        return for_hydra if override.value != [] else f"{key}=none"
    if "/" in key:
        raise UserError(f"{key}: there is no such group; {options.did_you_mean(key, known)}")
    if key.replace(".", "/") in known and not isinstance(override.value, dict):
        raise UserError(f"{for_hydra}: to choose an option write {key.replace('.', '/')}={validation.show(override.value)}")
    return f"++{for_hydra}"


def _check_chosen(override: Override, choices: Mapping[str, Path]) -> None:
    """Refuse an option that there is not; of a group that takes several, also one given twice, or beside `none`."""
    key, several = override.key, override.key in introspection.SEVERAL and isinstance(override.value, list)
    chosen = override.value if several else [override.value]
    for each in chosen:
        word = validation.show(each)
        if each not in list(choices):
            raise UserError(f"{key}={word}: there is no such option; {options.did_you_mean(word, choices)}")
        if chosen.count(each) > 1:
            raise UserError(f"{key} names {word} twice: expected each once")
        if each == "none" and len(chosen) > 1:
            raise UserError(f"{key} names none beside others: expected none alone, or the others")


def _check_known_tasks(env: dict[str, Any], folders: Sequence[Path]) -> None:
    known = options.known_tasks(env["_target_"], folders)
    for name in env.get("tasks", []) if known is not None else []:
        if known is not None and name not in known:
            also = options.did_you_mean(name, sorted(known), f"see {options.conf_folder() / 'env'} for those there are")
            raise UserError(f"env.tasks: {env['name']} has no task {validation.show(name)}; {also}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return validation.show(lines[0])[:300] if lines else type(error).__name__
