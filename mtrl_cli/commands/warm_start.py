"""`init_from=RUN`: initialise a new run from a checkpoint of a trained run, and print the loaded parts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType

from mtrl_cli.agents.value_scale import RewardStream, ValueScale
from mtrl_cli.build import network as build_network
from mtrl_cli.build import run as build_run
from mtrl_cli.build.instantiate import Config, class_of, make
from mtrl_cli.checkpoints.replay_segments import ReplayRows
from mtrl_cli.checkpoints.store import CheckpointStore, parse_which
from mtrl_cli.config import compose
from mtrl_cli.config.introspection import class_name
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import UserError, show
from mtrl_cli.networks.matching import Loaded, Outcome, Source, load_matching
from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.runs import terminal
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.terminal import console, print_line

# Keys that may differ between two compatible torsos. A parameter budget is compared by the resulting widths; dropout has no parameters.
_NOT_COMPARED = ("sharing", "head", "parameters", "dropout")
_LONGEST_NAMES = 60


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint of another run.

    Attributes:
        path: absolute, `RUN/checkpoints/<step>`.
        step: of the checkpoint, per task.
        config: of the other run.
        state: of the checkpoint.
        store: checkpoints of the other run.
    """

    path: Path
    step: int
    config: Config
    state: dict[str, Any]
    store: CheckpointStore


def find_source(config: Config) -> tuple[RunFolder, int | str | None]:
    """Return the run in `init_from`, and the checkpoint in the path (None: the latest).

    Raises:
        UserError: there is no such run.
    """
    try:
        return RunFolder.open(Path(config["init_from"]))
    except UserError as error:
        raise UserError(f"init_from={config['init_from']}: {error}") from None


def read_source(config: Config, ranks: Ranks) -> Checkpoint:
    """Load the checkpoint in `init_from`; for a run, the latest one.

    Raises:
        UserError: the checkpoint is missing, damaged or has another format version.
    """
    path, (folder, which) = Path(config["init_from"]), find_source(config)
    try:
        source = compose.load(folder.config, trusted=config["trusted_packages"])
        replay = config["transfer"]["replay"]
        if replay and source["ranks"] != ranks.size:
            raise UserError(
                f"transfer.replay=true: the source has ranks={source['ranks']}, this run has ranks={ranks.size}. Use the same value"
            )
        store = CheckpointStore(folder.checkpoints, keep=1, with_replay=replay, ranks=ranks)
        step, state = store.load(parse_which("latest" if which is None else which), warn=print_line)
    except UserError as error:
        raise UserError(f"init_from={path}: {error}") from None
    return Checkpoint(Path(folder.checkpoints.resolve() / str(step)), step, source, state, store)


def may_resolve_to(given: Path, resolved: Path) -> bool:
    """Return whether `init_from=given` may have been resolved to the checkpoint `resolved` (`RUN/checkpoints/<step>`)."""
    given = given.resolve()
    return resolved.is_relative_to(given) or (given.name in ("latest", "best") and resolved.parent == given.parent)


def initialise(config: Config, run: build_run.Run, source: Checkpoint, ranks: Ranks) -> None:
    """Copy matching parameters and value statistics from a source into a new run, freeze them as configured, and print a table.

    Raises:
        UserError: the source does not fit the run.
    """
    what = f"init_from={source.path}"
    check_torso(config, source.config, what)
    pack = build_run.make_pack(source.config)
    build_run.check_tasks(source.state.get("tasks"), pack, source.path)
    network = build_network.make_network(build_run.for_evaluation(source.config, "cpu"), pack, torch.device("cpu"))
    build_network.load_weights(network, source.state, what)
    mine, theirs = [task.name for task in run.pack.tasks], [task.name for task in pack.tasks]
    same_pack = config["env"]["_target_"] == source.config["env"]["_target_"]
    known = [task for task in mine if same_pack and task in theirs]
    given = Source(network, theirs, known, _same_heads(config, source.config, run.pack, pack, known))
    scale = _scale_of(source, pack, what)
    converted = _convert(scale, run.agent.value_scale, given)
    taken = load_matching(given, run.agent.network, mine)
    if not taken.loads("torso"):
        raise UserError(
            f"{what}: no layer of the torso can be loaded from {class_name(source.config['network']['sharing'])} into "
            f"{class_name(config['network']['sharing'])}. Use the same network/sharing, or one with the layers of the torso (hard, film)"
        )
    if not converted:
        run.agent.value_scale.copy_from(scale, [(mine.index(task), theirs.index(task)) for task in taken.heads])
    run.agent.sync_target()
    run.freezing.freeze(taken.rows)
    if run.freezing.is_active:
        run.learner.rebuild()
    if ranks.is_first:
        print_line(f"From {source.path}")
        console(sys.stdout).print(_table(taken))
    for line in _lines(taken, scale, converted, run):
        print_line(line)


def check_torso(config: Config, source: Config, what: str) -> None:
    """Raise UserError if the torso of a run and the torso of its source differ in class or size."""
    mine, theirs = ({key: value for key, value in each["network"].items() if key not in _NOT_COMPARED} for each in (config, source))
    if mine == theirs:
        return
    different = [key for key in dict.fromkeys([*mine, *theirs]) if mine.get(key) != theirs.get(key)]
    name = class_name(source["network"])
    if "_target_" in different:
        raise UserError(f"{what}: the torso of the source is {name}, got {class_name(config['network'])}. Use the same network")
    there, here = (", ".join(f"network.{key}={show(each.get(key))}" for key in different) for each in (theirs, mine))
    raise UserError(f"{what}: the torso of the source ({name}) has {there}, got {here}. Use the same values")


def _same_heads(config: Config, source: Config, mine: Pack, theirs: Pack, known: list[str]) -> list[str]:
    """Return the common tasks with compatible heads: same class of head, same actions, same reward factor."""
    if config["network"]["head"] != source["network"]["head"]:
        return []
    actions = [{task.name: (task.num_actions, task.action_meanings) for task in pack.tasks} for pack in (mine, theirs)]
    factors = [each["agent"].get("reward_factors", {}) for each in (config, source)]
    return [task for task in known if actions[0][task] == actions[1][task] and factors[0].get(task, 1) == factors[1].get(task, 1)]


def _scale_of(source: Checkpoint, pack: Pack, what: str) -> ValueScale:
    """Load the value scale of the source."""
    with build_network.must_fit(what):
        stream = RewardStream(len(pack.tasks), pack.num_envs, source.config["agent"]["gamma"], torch.device("cpu"))
        scale: ValueScale = make(source.config, "agent/value_scale", stream)
        scale.load_state_dict(source.state["agent"].get("value_scale", {}))
    return scale


def _convert(scale: ValueScale, mine: ValueScale, given: Source) -> bool:
    """Convert the heads of the source to unscaled rewards if the value scales are incompatible. Returns whether they are."""
    if mine.is_compatible(scale):
        return False
    if not given.network.head.bounded:
        given.network.head.rescale(*scale.in_rewards())
    return True


def _lines(taken: Loaded, scale: ValueScale, converted: bool, run: build_run.Run) -> Iterable[str]:
    """Describe the value scale, frozen parameters and task weights after a warm start."""
    if converted and taken.heads:
        there, here = type(scale).__name__, type(run.agent.value_scale).__name__
        bounded = run.agent.network.head.bounded
        yield f"value scale  {there} in the source, {here} in this run: heads " + (
            "keep their units" if bounded else "converted to unscaled rewards"
        )
    freezing, task_weights = run.freezing, run.learner.task_weights
    if freezing.is_active:
        until = "" if freezing.unfreeze_at is None else f" until step {freezing.unfreeze_at:,}"
        yield f"frozen       {freezing.count:,} parameters{until}"
        if task_weights.needs != "losses" and not run.agent.network.shared_parameters():
            yield f"task weights: the tasks share no trained parameters{until}, so {type(task_weights).__name__} equals uniform"
    elif freezing.is_requested:
        yield "frozen       nothing: no parameters selected by transfer.freeze were loaded"


def _table(taken: Loaded) -> RenderableType:
    """Build a table of parts; tasks with the same result share a row."""
    found: dict[tuple[str, str, str], tuple[int, dict[str, None]]] = {}
    order = {"torso": 0, "adapters": 1, "sharing": 2, "heads": 3}
    for outcome in sorted(taken.outcomes, key=lambda each: (each.status == "left", order[each.kind], each.layer or 0)):
        key = (_part(outcome), outcome.status, outcome.reason)
        number, tasks = found.get(key, (0, {}))
        found[key] = number + outcome.number, tasks | ({outcome.task: None} if outcome.task else {})
    rows = []
    for (part, status, reason), (number, tasks) in found.items():
        rows.append((part, _names(list(tasks)), f"{number:,}", f"{status} ({reason})" if reason else status))
    header = ("part", "of", "parameters", "is")
    return terminal.table(rows, header, right=["parameters"], fold=header)


def _part(outcome: Outcome) -> str:
    if outcome.kind == "torso":
        own = f"layer {(outcome.layer or 0) + 1}" if outcome.layer else "stem"
        return f"{own} of {'each' if outcome.task else 'the'} torso" if outcome.task or outcome.status != "loaded" else "torso"
    return {"heads": "head", "sharing": "sharing", "adapters": "adapter"}[outcome.kind]


def _names(tasks: list[str]) -> str:
    names = ", ".join(tasks) or "all tasks"
    return names if len(names) <= _LONGEST_NAMES else f"{len(tasks)} tasks"


class _Rows:
    """A replay with the capacity of the source, which replay segments must match."""

    def __init__(self, replay: ReplayRows, capacity_rows: int):
        self.rows, self.capacity_rows = replay.rows, capacity_rows
        self.import_rows, self.export_rows = replay.import_rows, replay.export_rows


def load_replay(config: Config, run: build_run.Run, source: Checkpoint, ranks: Ranks) -> None:
    """Load the replay of a source: its rows, and its priorities if both replays have priorities. Learning then starts at once.

    Raises:
        UserError: the replay has other tasks or environments, or was not saved.
    """
    what = f"transfer.replay=true with init_from={source.path}"
    if run.replay.from_rollouts or class_of(source.config, "replay")[0].from_rollouts:
        raise UserError(f"{what}: rollouts are not saved. Omit transfer.replay=true")
    theirs, pack, replay = build_run.make_pack(source.config), run.pack, run.replay
    pairs = {
        "env": (source.config["env"]["_target_"], config["env"]["_target_"]),
        "env.tasks": ([task.name for task in theirs.tasks], [task.name for task in pack.tasks]),
        "env.num_envs": (theirs.num_envs, pack.num_envs),
        "the shape of a frame": (theirs.observation_shape, pack.observation_shape),
        "the number of actions": ([task.num_actions for task in theirs.tasks], [task.num_actions for task in pack.tasks]),
    }
    for key, (there, here) in pairs.items():
        if there != here:
            raise UserError(f"{what}: {key} of the source is {there}, got {here}. Use the same value, or omit transfer.replay=true")
    with build_network.must_fit(what):
        kept = (source.state if ranks.is_first else source.state["others"][str(ranks.rank)])["loop"]["replay"]
        if not source.store.load_replay(source.step, _Rows(replay, int(kept["capacity_rows"]))):
            raise UserError(f"{what}: the checkpoint was saved without its replay. Omit transfer.replay=true")
        replay.continue_from(kept)
    run.learner.start_at(0)
    print_line(f"replay       {replay.transitions * ranks.size:,} transitions per task of the source; learning starts at once")
