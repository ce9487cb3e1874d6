"""Configuration to the objects of a run. Beside it `instances`, `build_network`, `build_augmentation` and `settling` read its values."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.agents.agent import Agent
from mtrl_cli.agents.value_scale import RewardStream
from mtrl_cli.build.augmentation import make_augmentation
from mtrl_cli.build.instantiate import Config, derived_seed, make
from mtrl_cli.build.network import make_network, make_tape
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import UserError, show
from mtrl_cli.machine import hardware
from mtrl_cli.machine.cuda_graphs import CudaGraphs, generators_of
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import parts_of
from mtrl_cli.networks.regularised import dropout_generator
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.replay.buffers import Replay, ReplaySpec
from mtrl_cli.task_weights.base import Tasks, TaskWeights
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.task_weights.tape import Tape
from mtrl_cli.training.diagnostics import Diagnostics
from mtrl_cli.training.early_stopping import EarlyStopping
from mtrl_cli.training.env_group import make_group
from mtrl_cli.training.episode_statistics import EpisodeStatistics
from mtrl_cli.training.evaluator import Evaluator, metric_names
from mtrl_cli.training.freezing import Freezing
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.loop import Loop
from mtrl_cli.training.resets import Resets


@dataclass(frozen=True)
class Intervals:
    """When things happen, in steps per task; 0: only at the end. `evaluate_at_start`: also before the first step."""

    total: int
    log: int
    evaluate: int
    checkpoint: int
    evaluate_at_start: bool


@dataclass
class Run:
    """Everything that a training run is made of, before its emulators are started."""

    pack: Pack
    agent: Agent
    replay: Replay
    learner: Learner
    evaluator: Evaluator
    tester: Evaluator | None
    early_stopping: EarlyStopping
    diagnostics: Diagnostics
    intervals: Intervals
    device: torch.device
    seed: int
    compiled: bool
    open_loop: Callable[[], Loop]


def make_store(config: Config, folder: Path, ranks: Ranks = ALONE) -> CheckpointStore:
    """The checkpoints of a run, in `folder`."""
    return CheckpointStore(folder, keep=config["checkpoint"]["keep"], with_replay=config["checkpoint"]["replay"], ranks=ranks)


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


def set_up_torch(config: Config, device: torch.device) -> None:
    """What torch keeps for the whole process: threads, the compiler, the current GPU, and in what precision that multiplies float32."""
    torch.set_num_threads(config["threads"])
    if config["compile"]:
        hardware.keep_compiled()
        if compiler := hardware.compiler():
            os.environ.setdefault("CXX", compiler)  # torch looks for $CXX and g++, and would not find clang++
    if device.type == "cpu":
        hardware.keep_freed_memory()
        return
    torch.cuda.set_device(device)
    in_tf32 = config["precision"] in ("tf32", "bf16")
    torch.set_float32_matmul_precision("high" if in_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = in_tf32


def make_evaluator(config: Config, pack: Pack, device: torch.device) -> Evaluator:
    """What plays the evaluation games."""
    return _make_player(config["eval"], pack, device)


def make_tester(config: Config, pack: Pack, device: torch.device) -> Evaluator | None:
    """What plays the test games at the end: as many, unless it is told otherwise, with seeds of their own. None: there is no test."""
    games = config["eval"]
    episodes = games["episodes"] if games["test_episodes"] is None else games["test_episodes"]
    return _make_player(games | {"episodes": episodes, "seed": games["test_seed"]}, pack, device) if episodes else None


def _make_player(games: Config, pack: Pack, device: torch.device) -> Evaluator:
    return Evaluator(
        pack,
        episodes=games["episodes"],
        max_steps=games["max_steps"],
        epsilon=games["epsilon"],
        seed=games["seed"],
        num_threads=hardware.cores(),
        device=device,
    )


def make_early_stopping(config: Config, pack: Pack) -> EarlyStopping:
    """What stops a run whose evaluations no longer improve.

    Raises:
        UserError: its metric is none that an evaluation of these tasks has.
    """
    section, names = config["early_stopping"], metric_names(pack)
    if section["metric"] not in (None, *names):
        raise UserError(f"early_stopping.metric={show(section['metric'])}: an evaluation of these tasks has {', '.join(names)}")
    return EarlyStopping(**section)


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
        tester=make_tester(config, pack, device),
        early_stopping=make_early_stopping(config, pack),
        diagnostics=_make_diagnostics(config, pack, agent, replay),
        intervals=Intervals(
            config["steps_per_task"],
            config["log"]["every"],
            config["eval"]["every"],
            config["checkpoint"]["every"],
            config["eval"]["at_start"],
        ),
        device=device,
        seed=config["seed"],
        compiled=bool(config["compile"]),
        open_loop=open_loop,
    )


def _make_diagnostics(config: Config, pack: Pack, agent: Agent, replay: Replay) -> Diagnostics:
    every, seed = config["log"]["diagnostics"], derived_seed(config["seed"], "diagnostics")
    return Diagnostics(agent, replay, [task.name for task in pack.tasks], every=every, seed=seed, steps_per_tick=pack.num_envs)


def _make_learner(config: Config, pack: Pack, agent: Agent, replay: Replay, ranks: Ranks, say: Callable[[str], None]) -> Learner:
    """What trains the agent's network from the replay."""
    device, network, names = replay.spec.device, agent.network, [task.name for task in pack.tasks]
    optimizer = make(config, "optimizer", list(network.parameters()), [part.kind for part in parts_of(network).values()])
    tasks = Tasks(
        names=tuple(names),
        random_scores=tuple(task.random_score for task in pack.tasks),
        reference_scores=tuple(task.reference_score for task in pack.tasks),
        seed=derived_seed(config["seed"], "task weights"),
        device=device,
    )
    augmentation = make_augmentation(config, pack, agent, device, ranks)
    task_weights = make_task_weights(config, tasks, network, say)
    if network.has_dropout and task_weights.looks_back:
        raise UserError(
            f"network.dropout={config['network'].get('dropout')}: {type(task_weights).__name__} compares a batch's losses before and after "
            "an update, which dropout would change as well: choose other task_weights, or network.dropout=0"
        )

    def tape_of_trained() -> Tape | None:
        return make_tape(config, network, pack, device) if task_weights.needs != "losses" and network.shared_parameters() else None

    def anew() -> Tape | None:
        if config["compile"]:
            torch.compiler.reset()  # each set of trained parameters is code of its own, and only so many are kept
        return tape_of_trained()

    # Exchanges between ranks are made one at a time.
    recorded = device.type == "cuda" and ranks.size == 1
    recorder = (lambda: CudaGraphs(device, generators_of(replay, task_weights, *augmentation.parts.values()))) if recorded else None
    return Learner(
        agent,
        replay,
        augmentation,
        task_weights,
        optimizer,
        names,
        tape=tape_of_trained(),
        recorder=recorder,
        ranks=ranks,
        resets=_make_resets(config, pack, device),
        dropout=dropout_generator(device, derived_seed(config["seed"], ranks.label("dropout"))) if network.has_dropout else None,
        freezing=_make_freezing(config, network),
        make_tape=anew,
    )


def _make_freezing(config: Config, network: MultiTaskNetwork) -> Freezing:
    keys = config["transfer"]
    try:
        return Freezing(network, freeze=keys["freeze"], unfreeze_at=keys["unfreeze_at"], gradual=keys["gradual"])
    except ValueError as error:
        raise UserError(str(error)) from error


def _make_resets(config: Config, pack: Pack, device: torch.device) -> Resets | None:
    """Resets of the network, whose new parameters are drawn from the run's seed and the number of the reset."""
    resets = config["resets"]
    if not resets["every"]:
        return None

    def fresh(number: int) -> MultiTaskNetwork:
        return make_network(config | {"seed": derived_seed(config["seed"], f"reset {number}")}, pack, device)

    last_step = resets["until"] * config["steps_per_task"]
    return Resets(every=resets["every"], shrink=resets["shrink"], parts=resets["parts"], last_step=last_step, fresh=fresh)


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
