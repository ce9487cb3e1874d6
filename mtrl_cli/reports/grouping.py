"""Groups of runs that differ only in their seeds, and short labels that distinguish the groups of a report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mtrl_cli.config import introspection
from mtrl_cli.config import options as catalogue
from mtrl_cli.errors import UserError
from mtrl_cli.reports.run_data import RunData, RunGroup, first_completed, short
from mtrl_cli.reports.wording import clipped, word

KEPT = ("run_dir", "trusted_packages", "checkpoint.", "log.")
"""Keys, and sections ending with a dot, that affect only how a run is saved and logged. They count where a sweep varies them."""
MACHINES = ("device", "threads", "compile", "precision", "groups", "ranks")
"""Keys that affect only the speed of a run. They count where a sweep varies them."""
RESOLVED_BY_MACHINE = ("agent.batch_size", "agent.target_period", "agent.overlap", "replay.capacity")
"""Keys whose `auto` depends on the machine. They, and keys that are still `auto` in some run, count only where a user has set them."""
FRACTION = re.compile(r"-?\d*\.\d{4,}(?:e[-+]?\d{1,3})?", re.IGNORECASE)
ABSENT = "-"
FROM_SCRATCH = "from scratch"
SIZE = "network.parameters"
MAX_LENGTH = 60  # characters of one value in a label


def grouped(runs: Sequence[RunData]) -> list[RunGroup]:
    """Group runs by configuration, in the order of the first run of each. Runs without a readable configuration are in no group."""
    known = [run for run in runs if run.config]
    if not known:
        return []
    counted = counting(known)
    keys = sorted({key for run in known for key in counted(run)})
    together: dict[tuple[str, ...], list[RunData]] = {}
    for run in known:
        own = counted(run)
        together.setdefault(tuple(own.get(key, "") for key in keys), []).append(run)
    together = _merge_equal_networks(together, keys)
    firsts = [first_completed(own) for own in together.values()]
    values = _distinguishing(firsts, [dict(zip(keys, of_group, strict=True)) for of_group in together])
    groups = zip(_labels(values, firsts), values, together.values(), strict=True)
    return [RunGroup(label, of_group, tuple(sorted(own, key=lambda run: run.seed))) for label, of_group, own in groups]


def _merge_equal_networks(together: Mapping[tuple[str, ...], list[RunData]], keys: Sequence[str]) -> dict[tuple[str, ...], list[RunData]]:
    """Merge groups that are equal except that one gives `network.parameters` and the other the widths that follow from it."""
    merged: dict[tuple[str, ...], list[RunData]] = {}
    seen: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for values, own in together.items():
        first = first_completed(own)
        total = first.parameters.get("total")  # known once the network is built and its widths are resolved
        of_size = widths(first)
        network = tuple((key, repr(first.config.get(key))) for key in sorted(of_size))
        same = (total, network, tuple(value for key, value in zip(keys, values, strict=True) if key not in (SIZE, *of_size)))
        known_as = values if total is None else seen.setdefault(same, values)
        merged.setdefault(known_as, []).extend(own)
    return merged


def counting(runs: Sequence[RunData]) -> Callable[[RunData], dict[str, str]]:
    """Return a function that gives a run's values by key, as text, without the seed and keys that depend on the machine."""
    varied = {override.partition("=")[0].replace("/", ".") for run in runs for override in run.overrides}
    given = [argument.partition("=") for command in {run.command for run in runs} for argument in command.split()]
    set_by_user = varied | {key for key, _, value in given if value != "auto"}
    resolved = {*RESOLVED_BY_MACHINE, *(key for run in runs for key, value in run.config.items() if value == "auto")}
    sections = tuple(name for name in KEPT if name.endswith("."))

    def counts(run: RunData, key: str) -> bool:
        if key in varied:
            return key != "seed"
        if key in ("seed", *KEPT, *MACHINES) or key.startswith(sections):
            return False
        if key in resolved:
            return key in set_by_user
        return not (run.config.get(SIZE) is not None and key in widths(run))

    return lambda run: {key: repr(value) for key, value in run.config.items() if counts(run, key)}


def widths(run: RunData) -> frozenset[str]:
    """Return the keys that `network.parameters` determines. They differ between structures without a choice of the user."""
    return frozenset(name for group in ("network", "network/sharing") for name in _scaled(group, str(run.config.get(target_key(group)))))


def target_key(group: str) -> str:
    """Return the key of the class of a group: `network.sharing._target_`."""
    return f"{group.replace('/', '.')}._target_"


@cache
def _scaled(group: str, target: str) -> frozenset[str]:
    try:
        names = introspection.read(group, target, introspection.KINDS[group], (), None).attributes.get("scaled_keys", ())
    except UserError:  # a class of the user's package, which reports do not import
        return frozenset()
    return frozenset(f"{group.replace('/', '.')}.{name}" for name in names)


# -- labels -------------------------------------------------------------------------------------------------------------------


def _distinguishing(firsts: Sequence[RunData], own: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return few keys that distinguish all groups, with each group's value: options first, and no key that follows from other keys."""
    found: dict[str, list[str]] = {}
    distinct = 1
    for name, values in _candidates(firsts, own):
        more = len(set(zip(*found.values(), values, strict=True)))
        if more > distinct:
            found[name], distinct = values, more
        if distinct == len(firsts):
            break
    return [{name: values[index] for name, values in found.items()} for index in range(len(firsts))]


def _candidates(firsts: Sequence[RunData], own: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield keys with each group's value as text, the most informative first: axes of a sweep, options, all other keys."""
    overrides = [dict(override.partition("=")[::2] for override in run.overrides) for run in firsts]
    for key in overrides[0]:
        if key != "seed" and all(key in of_group for of_group in overrides):
            given = [_rounded(_clipped(of_group[key])) for of_group in overrides]
            yield key, [initialisation(run) for run in firsts] if key == "init_from" else given
    yield "env", [_clipped(run.env) for run in firsts]
    yield "init_from", [initialisation(run) for run in firsts]
    for group in introspection.KINDS:
        if group != "env" and any(target_key(group) in of_group for of_group in own):
            yield group, [option(group, run) for run in firsts]
    if any(key.startswith("augmentation.") for of_group in own for key in of_group):
        yield "augmentation", [_augmentation(run) for run in firsts]
    if any(SIZE in of_group for of_group in own):
        yield SIZE, [_word(run.config.get(SIZE)) for run in firsts]
    for key in dict.fromkeys(key for run in firsts for key in run.config):
        follows = [key in widths(run) and run.config.get(SIZE) is not None for run in firsts]
        values = [of_group.get(key) for of_group, is_resolved in zip(own, follows, strict=True) if not is_resolved]
        if any(key in of_group for of_group in own) and len(set(values)) > 1:
            yield key, [_word(run.config[key]) if key in run.config else ABSENT for run in firsts]
    for key in sorted({key for of_group in own for key in of_group}):  # where values are equal when shortened
        yield key, [_clipped(of_group.get(key, ABSENT), 10 * MAX_LENGTH) for of_group in own]


def option(group: str, run: RunData) -> str:
    """Return the name of a run's option of a group; for `init_from`, the source of its network."""
    if group == "init_from":
        return initialisation(run)
    target = run.config.get(target_key(group))
    return "none" if target is None else option_of(group, run.config) or _clipped(str(target).rpartition(".")[2])


def option_of(group: str, config: Mapping[str, Any], folders: tuple[Path, ...] = ()) -> str | None:
    """Return the name of a configuration's option of a group, or None where no option has its class.

    Of several options with that class, the option that agrees with the configuration in most values is returned.

    Args:
        group: such as network/sharing.
        config: by dotted key.
        folders: of the user's configuration.
    """
    prefix = group.replace("/", ".")
    options = _options(group, folders).get(str(config.get(target_key(group))), {})
    alike = {name: sum(config.get(f"{prefix}.{key}") == value for key, value in own.items()) for name, own in options.items()}
    return max(alike, key=alike.__getitem__, default=None)


def initialisation(run: RunData) -> str:
    """Return `from scratch`, or `fine-tuned from RUN` with the name of the source's folder."""
    source = run.config.get("init_from")
    if not source:
        return FROM_SCRATCH
    path = Path(str(source))
    return _clipped(f"fine-tuned from {path.parents[1].name if path.parent.name == 'checkpoints' else path.name}")


@cache
def _options(group: str, folders: tuple[Path, ...]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the options of a group by class and name, with the values that they set."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, file in catalogue.options(group, [catalogue.conf_folder(), *folders]).items():
        content = catalogue.read_yaml(file)
        if isinstance(content.get(group), dict):
            content = content[group]
        found.setdefault(str(content.get("_target_")), {})[name] = content
    return found


def _augmentation(run: RunData) -> str:
    names = [key.split(".")[1] for key in run.config if key.startswith("augmentation.") and key.endswith("._target_")]
    return _clipped("+".join(names)) or "none"


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _clipped(word(value))


def _rounded(text: str) -> str:
    """Round text that is a decimal fraction to four significant digits."""
    return f"{float(text):.4g}" if FRACTION.fullmatch(text) else text


def _clipped(text: str, most: int = MAX_LENGTH) -> str:
    return clipped(short(text), most)


def _labels(values: Sequence[Mapping[str, str]], firsts: Sequence[RunData]) -> list[str]:
    """Label each group: an option by its name where that is unambiguous, any other value as KEY=VALUE."""
    if not values[0]:  # one group
        return [option("network/sharing", run) for run in firsts]
    choices = {*introspection.KINDS, "augmentation", "experiment", "init_from"}
    keys_with = Counter(value for _, value in {pair for of_group in values for pair in of_group.items()})
    usual = _usual(values) if len(values[0]) > 3 else {}
    own = [
        ", ".join(
            value if key in choices and keys_with[value] == 1 else f"{re.split('[./]', key)[-1]}={value}"
            for key, value in of_group.items()
            if key != SIZE and value not in (ABSENT, usual.get(key))
        )
        for of_group in values
    ]
    if SIZE in values[0]:
        own = [label or option("network/sharing", run) for label, run in zip(own, firsts, strict=True)]
        own = sized(own, [run.parameters.get("total") or run.config.get(SIZE) for run in firsts])
    return [label if own.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(own, 1)]


def sized(names: Sequence[str], sizes: Sequence[Any]) -> list[str]:
    """Add the parameter count to names that occur several times: `independent (74k)`, or in full where that is ambiguous."""
    for texts in ([_in_thousands(size) for size in sizes], [f"{size:,}" if isinstance(size, int) else "" for size in sizes]):
        found = [f"{name} ({text})" if names.count(name) > 1 and text else name for name, text in zip(names, texts, strict=True)]
        if len(set(found)) == len(found):
            break
    return found


def _in_thousands(size: Any) -> str:
    """Abbreviate a parameter count: `74k`, `1.3M`."""
    if not isinstance(size, int):
        return "" if size is None else _clipped(str(size))
    if size < 10_000:
        return f"{size:,}"
    return f"{size / 1000:.0f}k" if size < 1_000_000 else f"{size / 1_000_000:.3g}M"


def _usual(values: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return, for keys after the first, the value that most groups have; labels omit it where many keys differ."""
    most = {}
    for key in list(values[0])[1:]:
        value, times = Counter(of_group[key] for of_group in values).most_common(1)[0]
        if times > len(values) / 2:
            most[key] = value
    return most
