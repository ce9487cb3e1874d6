"""Configuration to objects: the only reader of a configuration's values."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtrl_cli import hardware, signatures
from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.agents.agent import Agent
from mtrl_cli.agents.value_scale import RewardStream
from mtrl_cli.capture import CudaGraphs, generators_of
from mtrl_cli.checkpoint import CheckpointStore
from mtrl_cli.diagnostics import Diagnostics
from mtrl_cli.distributed import ALONE, Ranks
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import UserError
from mtrl_cli.evaluator import Evaluator
from mtrl_cli.group import make_group
from mtrl_cli.learner import Learner
from mtrl_cli.loop import Loop
from mtrl_cli.networks.cost import multiply_adds
from mtrl_cli.networks.network import MultiTaskNetwork, ParameterCounts
from mtrl_cli.replay import Replay, ReplaySpec
from mtrl_cli.schema import NOT_THE_CLASSES
from mtrl_cli.signatures import KINDS
from mtrl_cli.stats import EpisodeStatistics
from mtrl_cli.task_weights.base import Tasks, TaskWeights
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.task_weights.tape import Tape, tape_for

Config = dict[str, Any]


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


def class_of(config: Config, group: str) -> tuple[type, dict[str, Any]]:
    """The class that a group's section of the configuration names, and the section's keys for it.

    Raises:
        UserError: what it names is not a class of the group's kind.
    """
    node = config
    for part in group.split("/"):
        node = node[part]
    below = {name.removeprefix(f"{group}/") for name in KINDS if name.startswith(f"{group}/")} | NOT_THE_CLASSES.get(group, set())
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
    found, values = class_of(config, group)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{group.replace('/', '.')}._target_={found.__module__}.{found.__name__} does not define {', '.join(missing)}")
    try:
        return found(*args, **values)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_store(config: Config, folder: Path, ranks: Ranks = ALONE) -> CheckpointStore:
    """The checkpoints of a run, in `folder`."""
    return CheckpointStore(folder, keep=config["checkpoint"]["keep"], with_replay=config["checkpoint"]["replay"], ranks=ranks)


def derived_seed(seed: int, label: str) -> int:
    """An independent seed for one purpose of a run, 63 bits."""
    return int.from_bytes(hashlib.blake2b(f"{label}/{seed}".encode(), digest_size=8).digest(), "big") >> 1


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
        network = _assemble(config, pack, torch.bfloat16 if config["precision"] == "bf16" else None).to(device)
    # Tensor cores read images channel by channel within a pixel; a CPU's compiled code chooses for itself.
    if device.type == "cuda" and pack.observation_kind == "image":
        torch.nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def set_up_torch(config: Config, device: torch.device) -> None:
    """What torch keeps for the whole process: threads, the current GPU, and in what precision that multiplies float32."""
    torch.set_num_threads(config["threads"])
    if device.type == "cpu":
        hardware.keep_freed_memory()
        return
    torch.cuda.set_device(device)
    in_tf32 = config["precision"] in ("tf32", "bf16")
    torch.set_float32_matmul_precision("high" if in_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = in_tf32


def empty_network(config: Config, pack: Pack) -> MultiTaskNetwork:
    """The network without any memory or values, to be counted.

    Raises:
        UserError: as `make_network`.
    """
    with torch.device("meta"):
        return _assemble(config, pack, None)


def measure(config: Config, pack: Pack) -> tuple[ParameterCounts, int]:
    """The network's numbers of parameters, and the multiply-adds of a forward per observation.

    Raises:
        UserError: as `make_network`.
    """
    network = empty_network(config, pack)
    return network.parameter_counts(), multiply_adds(network, _stacked(pack))


def _assemble(config: Config, pack: Pack, autocast: torch.dtype | None) -> MultiTaskNetwork:
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
        raise UserError(f"network={type(torso).__name__} cannot read observations of shape {shapes[0]}: {error}".split("\n")[0]) from error
    head = make(config, "network/head", sharing.num_features, num_actions)
    return MultiTaskNetwork(sharing, head, pack.observation_scale, autocast)


def _make_tape(config: Config, network: MultiTaskNetwork, pack: Pack, device: torch.device) -> Tape | None:
    """The quick way to the gradients of tasks, where the network has one."""
    random = torch.Generator().manual_seed(0)
    sample = torch.zeros((len(pack.tasks), 2, pack.stack, *pack.observation_shape))
    for own, task in zip(sample, pack.tasks, strict=True):
        noise = torch.rand((2, pack.stack, *task.observation_shape), generator=random)
        own[:, :, *(slice(size) for size in task.observation_shape)] = noise * pack.observation_scale
    observation = sample.flatten(2, 3).to(device, torch.uint8 if pack.observation_kind == "image" else torch.float32)
    tape = tape_for(network, network.shared_parameters(), network.own_parameters(), observation)
    if tape is None and config["compile"]:
        # A backward pass for each task needs the graph again, which compiled code would otherwise take apart in the first.
        compiled: Any = importlib.import_module("torch._functorch.config")
        compiled.donated_buffer = False
    return tape


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


def make_task_weights(config: Config, tasks: Tasks, network: MultiTaskNetwork, say: Callable[[str], None]) -> TaskWeights:
    """How the tasks' losses become one gradient.

    Raises:
        UserError: values that it refuses, or a solver that is not installed.
    """
    task_weights: TaskWeights = make(config, "task_weights", tasks)
    if task_weights.needs not in ("losses", "gram", "rows"):
        raise UserError(f"task_weights: {type(task_weights).__name__}.needs={task_weights.needs!r}: expected losses, gram or rows")
    if task_weights.needs != "losses" and not network.shared_parameters():
        say(f"task weights: the tasks share no parameters, so {type(task_weights).__name__} equals uniform")
        return Uniform(tasks)
    return task_weights


def make_run(config: Config, pack: Pack, say: Callable[[str], None], ranks: Ranks = ALONE) -> Run:
    """All parts of a training run; of several ranks, this one's. Nothing is written, and no emulator started. What the user should
    know is told by `say`.

    Raises:
        UserError: parts that do not fit together.
    """
    device = device_of(config, ranks)
    num_envs = ranks.share("env.num_envs", pack.num_envs)
    set_up_torch(config, device)
    if config["compile"]:
        hardware.keep_compiled()
        if compiler := hardware.compiler():
            os.environ.setdefault("CXX", compiler)  # torch looks for $CXX and g++, and would not find clang++
    names = [task.name for task in pack.tasks]
    network = make_network(config, pack, device)
    compile_with = (lambda function: torch.compile(function, dynamic=False)) if config["compile"] else (lambda function: function)
    value_scale = make(config, "agent/value_scale", RewardStream(len(names), pack.num_envs, config["agent"]["gamma"], device, ranks))
    agent = make(config, "agent", network, value_scale, names, compile_with)
    replay = _make_replay(config, replay_spec(config, pack, device), num_envs, ranks)
    learner = _make_learner(config, pack, agent, replay, ranks, say)

    def open_loop() -> Loop:
        exploration = derived_seed(config["seed"], ranks.label("exploration"))
        actor = EpsilonGreedy(network, [task.num_actions for task in pack.tasks], device, exploration)
        threads, size = max(1, hardware.cores() // ranks.place.local_size), num_envs // config["groups"]
        firsts = range(ranks.rank * num_envs, (ranks.rank + 1) * num_envs, size)
        groups = [make_group(pack, actor, agent, first, size, config["seed"], threads, device) for first in firsts]
        # The last hundred episodes of each task are those of all ranks.
        statistics = EpisodeStatistics(names, num_envs, window=max(1, 100 // ranks.size))
        return Loop(groups, actor, replay, learner, statistics, overlapped=device.type == "cuda", ranks=ranks)

    return Run(
        pack=pack,
        agent=agent,
        replay=replay,
        learner=learner,
        evaluator=make_evaluator(config, pack, device),
        diagnostics=Diagnostics(
            agent,
            replay,
            names,
            every=config["log"]["diagnostics"],
            seed=derived_seed(config["seed"], "diagnostics"),
            steps_per_tick=pack.num_envs,
        ),
        intervals=Intervals(config["steps_per_task"], config["log"]["every"], config["eval"]["every"], config["checkpoint"]["every"]),
        device=device,
        seed=config["seed"],
        compiled=bool(config["compile"]),
        open_loop=open_loop,
    )


def _make_learner(config: Config, pack: Pack, agent: Agent, replay: Replay, ranks: Ranks, say: Callable[[str], None]) -> Learner:
    """What trains the agent's network from the replay."""
    device, network, names = replay.spec.device, agent.network, [task.name for task in pack.tasks]
    optimizer = make(config, "optimizer", list(network.parameters()))
    tasks = Tasks(
        names=tuple(names),
        random_scores=tuple(task.random_score for task in pack.tasks),
        reference_scores=tuple(task.reference_score for task in pack.tasks),
        seed=derived_seed(config["seed"], "task weights"),
        device=device,
    )
    augmentation, task_weights = make(config, "augmentation"), make_task_weights(config, tasks, network, say)
    tape = _make_tape(config, network, pack, device) if task_weights.needs != "losses" else None
    # Exchanges between ranks are made one at a time.
    recorded = device.type == "cuda" and ranks.size == 1
    recorder = (lambda: CudaGraphs(device, generators_of(replay, task_weights, augmentation))) if recorded else None
    return Learner(agent, replay, augmentation, task_weights, optimizer, names, tape=tape, recorder=recorder, ranks=ranks)


def _make_replay(config: Config, spec: ReplaySpec, num_envs: int, ranks: Ranks) -> Replay:
    """A rank's part of the replay."""
    spec = replace(spec, num_envs=num_envs, seed=derived_seed(config["seed"], ranks.label("replay")))
    capacity = config["replay"].get("capacity")
    part = config["replay"] | ({} if capacity is None else {"capacity": capacity // ranks.size})
    try:
        replay: Replay = make(config | {"replay": part}, "replay", spec)
        return replay
    except UserError as error:
        raise UserError(str(error) if ranks.size == 1 else f"of each of {ranks.size} ranks: {error}") from error


def device_of(config: Config, ranks: Ranks) -> torch.device:
    """Where a rank trains: on the GPU of its number on this machine, where the configuration says `cuda` for all.

    Raises:
        UserError: it is not there.
    """
    named = config["device"]
    return hardware.resolve_device(f"cuda:{ranks.place.local_rank}" if named == "cuda" and ranks.size > 1 else named)


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
    return config | {
        "device": str(resolved),
        "precision": config["precision"] if config["device"] in (str(resolved), resolved.type) else "fp32",
    }


def make_evaluation(config: Config) -> tuple[Pack, MultiTaskNetwork, Evaluator]:
    """The parts of an evaluation: the tasks, a network to load weights into, and what plays."""
    device = torch.device(config["device"])
    torch.set_num_threads(min(config["threads"], hardware.cores()))
    pack = make_pack(config)
    return pack, make_network(config, pack, device), make_evaluator(config, pack, device)


def replay_spec(config: Config, pack: Pack, device: torch.device) -> ReplaySpec:
    """What a run's replay holds, and of how many."""
    return ReplaySpec(
        num_tasks=len(pack.tasks),
        num_envs=pack.num_envs,
        frame_shape=pack.observation_shape,
        dtype=torch.from_numpy(np.empty(0, pack.observation_dtype)).dtype,
        stack=pack.stack,
        n_step=config["agent"].get("n_step", 1),
        device=device,
        seed=derived_seed(config["seed"], "replay"),
        total_steps=config["steps_per_task"],
        rollout_length=config["agent"].get("rollout_length", 0),
    )
