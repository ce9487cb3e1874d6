"""Configuration to objects: the only reader of a configuration's values."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtrl_cli import hardware, signatures
from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.agents.agent import Agent
from mtrl_cli.checkpoint import CheckpointStore
from mtrl_cli.diagnostics import Diagnostics
from mtrl_cli.envs.pack import Pack, TaskPack
from mtrl_cli.errors import UserError
from mtrl_cli.evaluator import Evaluator
from mtrl_cli.frame_stack import FrameStack
from mtrl_cli.learner import Learner
from mtrl_cli.loop import Loop
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.replay import Replay, ReplaySpec
from mtrl_cli.schema import KINDS
from mtrl_cli.stats import EpisodeStatistics
from mtrl_cli.task_weights.base import Tasks

Config = dict[str, Any]

# `replay.capacity=auto` takes at most this many transitions per task (Mnih et al. 2015), this share of the free memory,
# and, where checkpoints hold the replay, this share of the free disk.
_LARGEST_CAPACITY, _MEMORY_SHARE, _DISK_SHARE = 1_000_000, 0.5, 0.5
# A capacity that the user chose leaves this much for the network and the emulators.
_LARGEST_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Intervals:
    """When things happen, in steps per task; 0: only at the end."""

    total: int
    log: int
    evaluate: int
    checkpoint: int


@dataclass
class Run:
    """Everything that a training run is made of, before its emulators are started."""

    pack: Pack
    agent: Agent
    replay: Replay
    learner: Learner
    evaluator: Evaluator
    diagnostics: Diagnostics
    intervals: Intervals
    device: torch.device
    seed: int
    compiled: bool
    open_loop: Callable[[], Loop]


def _class_of(config: Config, group: str) -> tuple[type, dict[str, Any]]:
    """The class that a group's section of the configuration names, and the section's keys for it.

    Raises:
        UserError: what it names is not a class of the group's kind.
    """
    node = config
    for part in group.split("/"):
        node = node[part]
    below = {name.removeprefix(f"{group}/") for name in KINDS if name.startswith(f"{group}/")}
    target = node["_target_"]
    # The schema has looked at the source alone; this looks at what was really imported.
    ours = signatures.is_trusted(target, ["mtrl_cli", *config["trusted_packages"]])
    found = signatures.import_class(target) if ours else object
    if found.__module__ != target.rpartition(".")[0] or not issubclass(found, signatures.import_class(KINDS[group])):
        raise UserError(f"{group}._target_={target} is not a class of the kind that {group} holds ({KINDS[group].rpartition('.')[2]})")
    return found, {key: value for key, value in node.items() if key != "_target_" and key not in below}


def make(config: Config, group: str, *args: Any) -> Any:
    """The object that a group's section of the configuration names, given `args` and the section's keys.

    Raises:
        UserError: what it names is not a class of the group's kind, or refuses its values.
    """
    found, values = _class_of(config, group)
    try:
        return found(*args, **values)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_store(config: Config, folder: Path) -> CheckpointStore:
    """The checkpoints of a run, in `folder`."""
    return CheckpointStore(folder, keep=config["checkpoint"]["keep"], with_replay=config["checkpoint"]["replay"])


def derived_seed(seed: int, label: str) -> int:
    """An independent seed for one purpose of a run, 63 bits."""
    return int.from_bytes(hashlib.blake2b(f"{label}/{seed}".encode(), digest_size=8).digest(), "big") >> 1


# -- what only the machine can decide ---------------------------------------------------------------------------------------


def settle(config: Config, pack: Pack, say: Callable[[str], None]) -> Config:
    """A configuration in which every `auto` is what this machine makes of it. One that is settled already is only checked.

    Raises:
        UserError: a device or a compiler that is not there, a replay that does not fit.
    """
    device = hardware.resolve_device(config["device"])
    settled = config | {"device": str(device)}
    image = pack.observation_kind == "image"
    if config["threads"] == "auto":
        # The products of a small vector network are over before a second thread has begun.
        settled["threads"] = hardware.cores() if image else 1
    if config["precision"] == "auto":
        fast = image and (hardware.cpu_has_bf16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported())
        settled["precision"] = "bf16" if fast else "fp32"
    if config["compile"] in ("auto", True):
        missing = hardware.missing_for_compile()
        if missing and config["compile"] is True:
            raise UserError(f"compile=true cannot work here: {missing}; a run with compile=false needs none")
        if missing and image:
            say(f"compile: off, about two times slower on a CPU: {missing}")
        # Small vector networks gain too little to pay for compiling.
        settled["compile"] = (config["compile"] is True or image) and not missing
    settled["replay"] = config["replay"] | {"capacity": _settle_capacity(settled, pack, device, say)}
    if device.type == "cpu" and settled["threads"] > hardware.cores():
        say(f"threads={settled['threads']} is more than the {hardware.cores()} cores here: they will wait for each other")
    return settled


def _settle_capacity(config: Config, pack: Pack, device: torch.device, say: Callable[[str], None]) -> int:
    spec = _replay_spec(config, pack, device)
    each = _bytes_per_transition(config, spec) * spec.num_tasks
    free = hardware.memory_available() if device.type == "cpu" else hardware.device_memory(device)[0]
    capacity = config["replay"]["capacity"]
    if capacity == "auto":
        room, of_what = free * _MEMORY_SHARE, "memory"
        disk = _free_disk(config["run_dir"]) * _DISK_SHARE
        if config["checkpoint"]["replay"] and disk < room:
            room, of_what = disk, "disk, where checkpoints hold the replay (checkpoint.replay=false: they do not)"
        wanted, fits = min(_LARGEST_CAPACITY, config["steps_per_task"]), int(room // each)
        if fits < wanted:
            say(f"replay: {fits:,} transitions per task rather than {wanted:,}, for half of the free {of_what}")
        return max(min(wanted, fits), (spec.n_step + spec.stack + 1) * spec.num_envs)
    if capacity * each > free * _LARGEST_MEMORY_SHARE:
        raise UserError(
            f"replay.capacity={capacity} needs {capacity * each / 2**30:.1f} GiB for {spec.num_tasks} tasks "
            f"and {free / 2**30:.1f} GiB are free; at most {int(free * _LARGEST_MEMORY_SHARE // each)} fit, or replay.capacity=auto"
        )
    return capacity


def _bytes_per_transition(config: Config, spec: ReplaySpec) -> int:
    found, _ = _class_of(config, "replay")
    assert issubclass(found, Replay)
    return found.bytes_per_transition(spec)


def _free_disk(run_dir: str | None) -> int:
    folder = Path(run_dir or ".").expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def describe(config: Config, pack: Pack) -> list[str]:
    """What a settled configuration is about to take, in lines for a person."""
    env, replay = config["env"], config["replay"]
    spec = _replay_spec(config, pack, torch.device(config["device"]))
    each = _bytes_per_transition(config, spec)
    taken = replay["capacity"] * each * spec.num_tasks
    size = f"{taken / 2**30:.2f} GiB" if taken >= 2**30 else f"{taken / 2**20:.1f} MiB"
    tasks = ", ".join(task.name for task in pack.tasks[:8]) + (f" and {len(pack.tasks) - 8} more" if len(pack.tasks) > 8 else "")
    return [
        f"tasks: {tasks} ({env['name']}, {env['num_envs']} environments each)",
        f"machine: {config['device']}, {config['precision']}, {'compiled' if config['compile'] else 'eager'}, threads={config['threads']}",
        f"replay: {replay['capacity']:,} transitions per task, {size} in all ({each:,} bytes each)",
    ]


# -- objects ------------------------------------------------------------------------------------------------------------------


def make_pack(config: Config) -> Pack:
    """The tasks. Packages that the user trusts are imported first, so that environments which they register can be named.

    Raises:
        UserError: such a package is not installed, or the tasks do not make a pack.
    """
    for package in config["trusted_packages"]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"trusted_packages: {package} cannot be imported: {error}") from error
    return make(config, "env")


def make_network(config: Config, pack: Pack, device: torch.device) -> MultiTaskNetwork:
    """The network, initialised from the run's seed.

    Raises:
        UserError: a torso for another kind of observation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config["seed"], "network"))
        torso = make(config, "network")
        if torso.observation_kind != pack.observation_kind:
            raise UserError(
                f"network={type(torso).__name__} reads {torso.observation_kind} observations; "
                f"those of env={config['env']['name']} are {pack.observation_kind}s: choose a network for these (mtrl ls network)"
            )
        # Stacked frames are stacked channels. Where frames are stacked, tasks' own channels would not lie side by side.
        shapes = [task.observation_shape if pack.stack == 1 else _stacked(pack) for task in pack.tasks]
        num_actions = [task.num_actions for task in pack.tasks]
        try:
            sharing = make(config, "network/sharing", torso, shapes)
        except RuntimeError as error:  # torch: an image too small for the convolutions
            raise UserError(
                f"network={type(torso).__name__} cannot read observations of shape {shapes[0]}: {error}".split("\n")[0]
            ) from error
        head = make(config, "network/head", sharing.num_features, num_actions)
    autocast = torch.bfloat16 if config["precision"] == "bf16" else None
    return MultiTaskNetwork(sharing, head, pack.observation_scale, autocast).to(device)


def _stacked(pack: Pack) -> tuple[int, ...]:
    return (pack.stack * pack.observation_shape[0], *pack.observation_shape[1:])


def make_evaluator(config: Config, pack: Pack, device: torch.device) -> Evaluator:
    """What plays the evaluation games."""
    games = config["eval"]
    return Evaluator(
        pack,
        episodes=games["episodes"],
        max_steps=games["max_steps"],
        epsilon=games["epsilon"],
        seed=games["seed"],
        num_threads=hardware.cores(),
        device=device,
    )


def make_run(config: Config, pack: Pack) -> Run:
    """All parts of a training run. Nothing is written, and no emulator started.

    Raises:
        UserError: parts that do not fit together.
    """
    device = torch.device(config["device"])
    torch.set_num_threads(config["threads"])
    if config["compile"] and (compiler := hardware.compiler()):
        os.environ.setdefault("CXX", compiler)  # torch looks for $CXX and g++, and would not find clang++
    names = [task.name for task in pack.tasks]
    network = make_network(config, pack, device)
    compile_with = (lambda function: torch.compile(function, dynamic=False)) if config["compile"] else (lambda function: function)
    agent = make(config, "agent", network, make(config, "agent/value_scale"), names, compile_with)
    replay = make(config, "replay", _replay_spec(config, pack, device))
    optimizer = make(config, "optimizer", list(network.parameters()))
    tasks = Tasks(
        names=tuple(names),
        random_scores=tuple(task.random_score for task in pack.tasks),
        reference_scores=tuple(task.reference_score for task in pack.tasks),
        seed=derived_seed(config["seed"], "task weights"),
        device=device,
    )
    augmentation, task_weights = make(config, "augmentation"), make(config, "task_weights", tasks)
    learner = Learner(agent, replay, augmentation, task_weights, optimizer, names)

    def open_loop() -> Loop:
        seed, num_envs = config["seed"], pack.num_envs
        envs = TaskPack(pack, num_envs=num_envs, seed=seed, num_threads=hardware.cores(), training=True, stream="train")
        actor = EpsilonGreedy(network, [task.num_actions for task in pack.tasks], device, derived_seed(seed, "exploration"))
        frames = FrameStack(len(names), num_envs, pack.stack, pack.observation_shape, replay.spec.dtype, device)
        return Loop(envs, actor, replay, learner, frames, EpisodeStatistics(names, num_envs), device)

    return Run(
        pack=pack,
        agent=agent,
        replay=replay,
        learner=learner,
        evaluator=make_evaluator(config, pack, device),
        diagnostics=Diagnostics(agent, replay, names, every=config["log"]["diagnostics"], seed=derived_seed(config["seed"], "diagnostics")),
        intervals=Intervals(config["steps_per_task"], config["log"]["every"], config["eval"]["every"], config["checkpoint"]["every"]),
        device=device,
        seed=config["seed"],
        compiled=bool(config["compile"]),
        open_loop=open_loop,
    )


def check_tasks(saved: Any, pack: Pack, run: Path) -> None:
    """Refuse a checkpoint that was trained on other tasks than a configuration names.

    Raises:
        UserError: names the tasks.
    """
    names = [task.name for task in pack.tasks]
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise UserError(f"the checkpoint of {run} does not tell its tasks: no run of ours")
    if saved != names:
        added, missing = [name for name in names if name not in saved], [name for name in saved if name not in names]
        what = f"adds {', '.join(added)}" if added else f"leaves out {', '.join(missing)}" if missing else "has them in another order"
        raise UserError(f"{run} was trained on {', '.join(saved)}, and its config.yaml {what}: tasks of a run cannot be changed")


def load_weights(network: MultiTaskNetwork, state: dict[str, Any], what: str) -> None:
    """Take a checkpoint's "model".

    Raises:
        UserError: it is of another network; `what` names it.
    """
    try:
        network.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{what} does not fit its configuration: {(lines or ['no model'])[-1][:200]}") from error


def for_evaluation(config: Config, device: str | None) -> Config:
    """A run's configuration as this machine evaluates it: on `device` (None: the run's own, where it is here)."""
    try:
        resolved = hardware.resolve_device(device or config["device"])
    except UserError:
        if device is not None:
            raise
        resolved = hardware.resolve_device("auto")  # a run from a GPU, looked at on a laptop
    return config | {"device": str(resolved), "precision": config["precision"] if str(resolved) == config["device"] else "fp32"}


def make_evaluation(config: Config) -> tuple[Pack, MultiTaskNetwork, Evaluator]:
    """The parts of an evaluation: the tasks, a network to load weights into, and what plays."""
    device = torch.device(config["device"])
    torch.set_num_threads(hardware.cores())
    pack = make_pack(config)
    return pack, make_network(config, pack, device), make_evaluator(config, pack, device)


def _replay_spec(config: Config, pack: Pack, device: torch.device) -> ReplaySpec:
    return ReplaySpec(
        num_tasks=len(pack.tasks),
        num_envs=pack.num_envs,
        frame_shape=pack.observation_shape,
        dtype=torch.from_numpy(np.empty(0, pack.observation_dtype)).dtype,
        stack=pack.stack,
        n_step=config["agent"]["n_step"],
        device=device,
        seed=derived_seed(config["seed"], "replay"),
        total_steps=config["steps_per_task"],
    )
