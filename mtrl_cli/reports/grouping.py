"""Runs put together by configuration: those that differ in their seeds alone are one group, which is called by what sets it apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mtrl_cli.config import introspection
from mtrl_cli.config import options as catalogue
from mtrl_cli.errors import UserError
from mtrl_cli.reports import run_data
from mtrl_cli.reports.run_data import Group, Run

KEPT = ("run_dir", "trusted_packages", "checkpoint.", "log.")
"""Keys that say how a run is kept and told of, or end with a dot: sections of such. They count where a sweep varies them."""
MACHINES = ("device", "threads", "compile", "precision", "groups", "ranks")
"""Keys that say how a machine works on a run: they change its speed. They count where a sweep varies them."""
SETTLED = ("agent.batch_size", "agent.target_period", "agent.overlap", "replay.capacity")
"""Keys whose `auto` is what a machine makes of it, as are all that a run has yet to settle. They count where somebody has set one."""
FRACTION = re.compile(r"-?\d*\.\d{4,}(?:e[-+]?\d{1,3})?", re.IGNORECASE)
ABSENT = "-"
FROM_SCRATCH = "from scratch"
SIZE = "network.parameters"
LONGEST = 60  # letters of one value in a label


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration, in the order of the first run of each; those whose configuration is not known are in none."""
    known = [run for run in runs if run.config]
    if not known:
        return []
    counted = counting(known)
    keys = sorted({key for run in known for key in counted(run)})
    together: dict[tuple[str, ...], list[Run]] = {}
    for run in known:
        own = counted(run)
        together.setdefault(tuple(own.get(key, "") for key in keys), []).append(run)
    together = _of_one_network(together, keys)
    firsts = [Group("", {}, tuple(own)).first for own in together.values()]
    values = _told_apart(firsts, [dict(zip(keys, of_group, strict=True)) for of_group in together])
    labels = _labels(values, firsts)
    groups = zip(labels, values, together.values(), strict=True)
    return [Group(label, told, tuple(sorted(own, key=lambda run: run.seed))) for label, told, own in groups]


def _of_one_network(together: Mapping[tuple[str, ...], list[Run]], keys: Sequence[str]) -> dict[tuple[str, ...], list[Run]]:
    """Groups put together where `network.parameters` came to the very widths that others were given, and all else is the same."""
    merged: dict[tuple[str, ...], list[Run]] = {}
    seen: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for values, own in together.items():
        first = Group("", {}, tuple(own)).first
        total = first.parameters.get("total")  # told by a run whose network is made, and its widths settled
        of_size = {SIZE, *widths(first)}
        network = tuple(sorted((key, repr(first.config.get(key))) for key in of_size - {SIZE}))
        same = (total, network, tuple(value for key, value in zip(keys, values, strict=True) if key not in of_size))
        known_as = values if total is None else seen.setdefault(same, values)
        merged.setdefault(known_as, []).extend(own)
    return merged


def counting(runs: Sequence[Run]) -> Callable[[Run], dict[str, str]]:
    """What tells, of each of these runs, its values by key, as words, but those of its seed and those that a machine has decided on."""
    varied = {word.partition("=")[0].replace("/", ".") for run in runs for word in run.overrides}
    given = [word.partition("=") for command in {run.command for run in runs} for word in command.split()]
    set_by_someone = varied | {key for key, _, value in given if value != "auto"}
    settled = {*SETTLED, *(key for run in runs for key, value in run.config.items() if value == "auto")}
    sections = tuple(name for name in KEPT if name.endswith("."))

    def counts(run: Run, key: str) -> bool:
        if key in varied:
            return key != "seed"
        if key in ("seed", *KEPT, *MACHINES) or key.startswith(sections):
            return False
        if key in settled:
            return key in set_by_someone
        return not (run.config.get(SIZE) is not None and key in widths(run))

    return lambda run: {key: repr(value) for key, value in run.config.items() if counts(run, key)}


@dataclass(frozen=True)
class Chosen:
    """What a group's runs are compared by.

    Attributes:
        runs: the completed ones that tell their returns in all tasks, one for each seed, in order of these.
        untold: completed ones without.
        again: of a seed of which another run counts.
    """

    runs: tuple[Run, ...]
    untold: tuple[Run, ...]
    again: tuple[Run, ...]


def chosen(group: Group, tasks: Sequence[str]) -> Chosen:
    """Which of a group's runs count; of several of one seed, the last."""
    completed = [run for run in group.runs if run.status == "completed"]
    told = [bool(tasks) and set(tasks) <= set(run.final_returns) for run in completed]
    last = {run.seed: index for index, run in enumerate(completed) if told[index]}
    return Chosen(
        runs=tuple(completed[index] for index in last.values()),
        untold=tuple(run for index, run in enumerate(completed) if not told[index]),
        again=tuple(run for index, run in enumerate(completed) if told[index] and last[run.seed] != index),
    )


def widths(run: Run) -> frozenset[str]:
    """The keys that `network.parameters` decides on: another width for another structure is no choice of its own."""
    return _scaled("network", str(run.config.get("network._target_"))) | _scaled(
        "network/sharing", str(run.config.get("network.sharing._target_"))
    )


@cache
def _scaled(group: str, target: str) -> frozenset[str]:
    try:
        names = introspection.read(group, target, introspection.KINDS[group], (), None).attributes.get("scaled_keys", ())
    except UserError:  # of a package of the user's, which is not imported for this
        return frozenset()
    return frozenset(f"{group.replace('/', '.')}.{name}" for name in names)


# -- what groups are called -----------------------------------------------------------------------------------------------------


def _told_apart(firsts: Sequence[Run], own: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The fewest keys that tell the groups apart, each with the group's value: choices first, and no key that follows from others."""
    told: list[dict[str, str]] = [{} for _ in firsts]
    seen: list[tuple[str, ...]] = [() for _ in firsts]
    for name, values in _candidates(firsts, own):
        extended = [(*before, value) for before, value in zip(seen, values, strict=True)]
        if len(set(extended)) == len(set(seen)):
            continue  # it is the same wherever those before it are
        seen = extended
        for of_group, value in zip(told, values, strict=True):
            of_group[name] = value
        if len(set(seen)) == len(firsts):
            break
    return told


def _candidates(firsts: Sequence[Run], own: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Keys with each group's value in words, the ones that say most first: what a sweep varies, chosen classes, all others."""
    words = [dict(word.partition("=")[::2] for word in run.overrides) for run in firsts]
    for key in words[0]:
        if key != "seed" and all(key in of_group for of_group in words):
            yield (
                key,
                [
                    option(key, run) if key == "init_from" else _rounded(_clipped(of_group[key]))
                    for run, of_group in zip(firsts, words, strict=True)
                ],
            )
    yield "env", [_clipped(run.env) for run in firsts]
    yield "init_from", [initialisation(run) for run in firsts]
    for group in introspection.KINDS:
        key = f"{group.replace('/', '.')}._target_"
        if group != "env" and any(key in of_group for of_group in own):
            yield group, [option(group, run) for run in firsts]
    if any(key.startswith("augmentation.") for of_group in own for key in of_group):
        yield "augmentation", [_augmentation(run) for run in firsts]
    if any(SIZE in of_group for of_group in own):
        yield SIZE, [_word(run.config.get(SIZE)) for run in firsts]
    for key in dict.fromkeys(key for run in firsts for key in run.config):
        settled = [key in widths(run) and run.config.get(SIZE) is not None for run in firsts]
        values = [of_group.get(key) for of_group, follows in zip(own, settled, strict=True) if not follows]
        if any(key in of_group for of_group in own) and len(set(values)) > 1:
            yield key, [_word(run.config[key]) if key in run.config else ABSENT for run in firsts]
    for key in sorted({key for of_group in own for key in of_group}):  # where two values are the same in few letters
        yield key, [_clipped(of_group.get(key, ABSENT), 10 * LONGEST) for of_group in own]


def option(group: str, run: Run) -> str:
    """Return the name of the option that a run has chosen; for `init_from`, the source of its network."""
    if group == "init_from":
        return initialisation(run)
    target = run.config.get(f"{group.replace('/', '.')}._target_")
    return "none" if target is None else option_of(group, run.config) or _clipped(str(target).rpartition(".")[2])


def option_of(group: str, config: Mapping[str, Any], folders: tuple[Path, ...] = ()) -> str | None:
    """Return the name of the option of a group that a configuration has chosen, or None where no option has its class.

    Of several options with that class it is the one that agrees with the configuration in most values.

    Args:
        group: such as network/sharing.
        config: by dotted key.
        folders: of the user's configuration.
    """
    prefix = group.replace("/", ".")
    options = _options(group, folders).get(str(config.get(f"{prefix}._target_")), {})
    alike = {name: sum(config.get(f"{prefix}.{key}") == value for key, value in own.items()) for name, own in options.items()}
    return max(alike, key=lambda name: alike[name]) if alike else None


def initialisation(run: Run) -> str:
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


def _augmentation(run: Run) -> str:
    names = [key.split(".")[1] for key in run.config if key.startswith("augmentation.") and key.endswith("._target_")]
    return _clipped("+".join(names)) or "none"


def _word(value: Any) -> str:
    """A value as it stands behind `KEY=`, numbers in few digits."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return _clipped("[" + ",".join(map(str, value)) + "]")
    return _clipped(str(value))


def _rounded(word: str) -> str:
    """A word that is a fraction, in four significant digits."""
    return f"{float(word):.4g}" if FRACTION.fullmatch(word) else word


def _clipped(text: str, most: int = LONGEST) -> str:
    text = run_data.short(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _labels(values: Sequence[Mapping[str, str]], firsts: Sequence[Run]) -> list[str]:
    """A choice is its name alone, where it can be nothing else; any other value stands behind its key."""
    if not values[0]:  # one group
        return [option("network/sharing", run) for run in firsts]
    choices = {*introspection.KINDS, "augmentation", "experiment", "init_from"}
    used: dict[str, set[str]] = {}
    for of_group in values:
        for key, value in of_group.items():
            used.setdefault(value, set()).add(key)
    usual = _usual(values) if len(values[0]) > 3 else {}
    shown = [
        {key: value for key, value in of_group.items() if key != SIZE and value not in (ABSENT, usual.get(key))} for of_group in values
    ]
    own = [
        ", ".join(value if key in choices and len(used[value]) == 1 else f"{_last(key)}={value}" for key, value in of_group.items())
        for of_group in shown
    ]
    if SIZE in values[0]:
        own = [label or option("network/sharing", run) for label, run in zip(own, firsts, strict=True)]
        own = sized(own, [run.parameters.get("total") or run.config.get(SIZE) for run in firsts])
    return [label if own.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(own, 1)]


def sized(names: Sequence[str], sizes: Sequence[Any]) -> list[str]:
    """Names that several have, with the number of parameters that tells them apart: `independent (74k)`, or in full where that does not."""
    for words in ([_in_thousands(size) for size in sizes], [f"{size:,}" if isinstance(size, int) else "" for size in sizes]):
        found = [f"{name} ({word})" if names.count(name) > 1 and word else name for name, word in zip(names, words, strict=True)]
        if len(set(found)) == len(found):
            break
    return found


def _in_thousands(size: Any) -> str:
    """A number of parameters in few letters: `74k`, `1.3M`."""
    if not isinstance(size, int):
        return "" if size is None else _clipped(str(size))
    if size < 10_000:
        return f"{size:,}"
    return f"{size / 1000:.0f}k" if size < 1_000_000 else f"{size / 1_000_000:.3g}M"


def _usual(values: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of keys but the first, the value that most groups have: where many keys differ, it goes without saying."""
    most = {}
    for key in list(values[0])[1:]:
        value, times = Counter(of_group[key] for of_group in values).most_common(1)[0]
        if times > len(values) / 2:
            most[key] = value
    return most


def _last(key: str) -> str:
    """The end of a key, which in a label is enough: `lr` of `optimizer.lr`."""
    return key.replace("/", ".").rpartition(".")[2]
