"""`mtrl transfer`: fine-tune a trained network on other tasks, and compare with training from scratch on the same budget."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrl_cli.build import run as build_run
from mtrl_cli.build.instantiate import class_of
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.commands import warm_start
from mtrl_cli.config import compose
from mtrl_cli.errors import UserError, show
from mtrl_cli.reports import grouping
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.studies import engine
from mtrl_cli.studies.engine import Study
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Axes, Choices, Value
from mtrl_cli.sweeps.search_space import SplitOverrides, as_text, key_of

SOURCE = "init_from"
PARTS = {"network": "torso", "network/sharing": "sharing", "network/head": "head"}


def make(run_path: Path, overrides: Sequence[str]) -> Study:
    """Plan the study of `mtrl transfer` from its arguments.

    Each seed has one run from scratch, and one fine-tuned run for each combination of the given `transfer.*`.

    Args:
        run_path: the source, or one of its checkpoints.
        overrides: of the runs on the new tasks and of the sweep, and `seeds`.

    Raises:
        UserError: an override or the source is wrong.
    """
    others, split, seeds = engine.parse(overrides)
    source, which = RunFolder.open(run_path)
    given = {key_of(override) for override in others}
    _check_given(given)
    trained = compose.load(source.config, trusted=compose.trusted_packages(split.sweep))
    base = engine.first_trial(split)
    scratch = compose.compose_training([override for override in base if not _is_transfer(key_of(override))])
    _check(scratch, trained, given)
    name = os.path.basename(os.path.abspath(source.path))
    path = _checkpoint(source, "latest" if which is None else which, split, f"transfer_{name}_to_{scratch['env']['name']}")
    base.append(f"{SOURCE}={path}")
    network, line = _network_of(trained, base, given, split)
    tuned = compose.compose_training([*base, *network])
    if tuned["network"].get("parameters") is None:
        warm_start.check_torso(tuned, trained, f"{SOURCE}={path}")

    values = {key: engine.values_of(split, key) for key in sorted(given) if _is_transfer(key)}
    defaults = {key: as_text(scratch["transfer"].get(key.partition(".")[2])) for key in values}
    as_choice = path if re.fullmatch(r"[\w./+-]+", path) else as_text(path)
    axes = [f"{SOURCE}=choice({as_choice},null)"]
    axes += [f"{key}={','.join(dict.fromkeys([*own, defaults[key]]))}" for key, own in values.items()]
    rest = [override for override in others if not _is_transfer(key_of(override))] + network
    intervals = ["eval.at_start=true", *engine.evaluation_overrides(scratch, given, ("eval.every",))]
    rest += [override for override in intervals if key_of(override) not in given]
    plan = engine.plan([*axes, *rest, *seeds], lambda found: _points(found, values, defaults), f"transfer_{name}_to_{{env}}")
    return Study(plan, (f"transfer from {path} to {plan.env}: {engine.extent(plan)}", line))


# -- checks ---------------------------------------------------------------------------------------------------------------------


def _check_given(given: set[str]) -> None:
    if "env" not in given:
        raise UserError("env is missing; name the tasks to transfer to, such as env=minatar_pack (mtrl ls env)")
    if SOURCE in given:
        raise UserError(f"{SOURCE}: mtrl transfer starts from the network of RUN. Omit {SOURCE}")


def _check(config: Mapping[str, Any], trained: dict[str, Any], given: set[str]) -> None:
    """Raise UserError for runs that cannot be compared, and for a source whose torso cannot read the new tasks' observations."""
    engine.refuse_early_stopping(config)
    if config["eval"]["test_episodes"] == 0:
        raise UserError("eval.test_episodes=0: final scores need test episodes. Give another number, or omit eval.test_episodes")
    if "eval.at_start" in given and not config["eval"]["at_start"]:
        raise UserError("eval.at_start=false: zero-shot scores need an evaluation before the first step. Omit eval.at_start")
    torso, pack = class_of(trained, "network")[0], build_run.make_pack(dict(config))
    reads, shown = getattr(torso, "observation_kind", None), pack.observation_kind
    if reads != shown and "network" not in given:
        raise UserError(f"the source's network reads {reads}s, but env={config['env']['name']} has {shown}s: nothing can be transferred")


def _is_transfer(key: str) -> bool:
    return key.startswith("transfer.")


# -- the source -----------------------------------------------------------------------------------------------------------------


def _checkpoint(source: RunFolder, which: int | str, split: SplitOverrides, folder: str) -> str:
    """Return the path of the source's checkpoint. A resumed study keeps its checkpoint, even if the source was trained further."""
    checkpoints = Path(os.path.abspath(source.checkpoints))
    given = next(iter(engine.values_in(split.sweep, "run_dir")), f"runs/studies/{folder}")
    study = Path(given).expanduser()
    if not isinstance(which, int) and os.path.lexists(study / sweep_plan.RECORD):
        axis = sweep_plan.read(study).axes.get(SOURCE)
        path = str(axis.values[0]).strip("'") if isinstance(axis, Choices) else ""
        if warm_start.may_resolve_to(checkpoints / which, Path(path)):
            return path
    step, _ = CheckpointStore(source.checkpoints, keep=1, with_replay=False).load(which, warn=print_line)  # type: ignore[arg-type]
    return str(checkpoints / str(step))


def _network_of(trained: dict[str, Any], base: Sequence[str], given: set[str], split: SplitOverrides) -> tuple[list[str], str]:
    """Return overrides with the source's torso, sharing structure and head except those that the user gave, and a line about them."""
    kept = [group for group in PARTS if group not in given]
    config = dict(compose.flat(trained))
    folders = tuple(compose.search_path(split.sweep)[1:])
    names = {group: grouping.option_of(group, config, folders) for group in kept}
    if None in names.values():
        group = next(group for group, name in names.items() if name is None)
        target = config[grouping.target_key(group)]
        raise UserError(f"{group}: no option has the source's class {show(target)}. Give hydra.searchpath as for the source")
    overrides = [f"{group}={name}" for group, name in names.items()]
    composed = dict(compose.flat(compose.compose_training([*base, *overrides])))
    config["network.parameters"] = None  # the widths are those of the source's parameters
    for key, value in config.items():
        part = next((group for group in reversed(PARTS) if key.startswith(f"{group.replace('/', '.')}.")), None)
        if part in kept and key not in given and composed.get(key) != value:
            overrides.append(f"{key}={as_text(value)}")
    chosen = [f"{group} as given" for group in PARTS if group not in kept]
    as_source = [f"{', '.join(PARTS[group] for group in kept)} as in the source"] if kept else []
    return overrides, f"network: {'; '.join([*as_source, *chosen])}"


# -- trials ---------------------------------------------------------------------------------------------------------------------


def _points(axes: Axes, values: Mapping[str, Sequence[str]], defaults: Mapping[str, str]) -> list[dict[str, Value]]:
    """Return the trials: for each seed and other value, fine-tuned runs with all combinations of `transfer.*`, and one from scratch."""
    source = axes[SOURCE]
    assert isinstance(source, Choices)
    points: list[dict[str, Value]] = []
    for rest in engine.combinations(axes, without=(SOURCE, *values)):
        for own in itertools.product(*values.values()):
            points.append({SOURCE: source.values[0], **dict(zip(values, own, strict=True)), **rest})
        points.append({SOURCE: "null", **defaults, **rest})
    return points
