"""Build the objects of a run from its configuration."""

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
from mtrl_cli.build.instantiate import Config, derived_seed, make, refusals
from mtrl_cli.build.network import make_network, make_tape
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import UserError, show
from mtrl_cli.machine import hardware, rng
from mtrl_cli.machine.cuda_graphs import CudaGraphs, generators_of
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import parts_of
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.networks.regularised import dropout_generator
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.replay.buffers import Replay, ReplaySpec
from mtrl_cli.task_weights.base import Tasks, TaskWeights
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.task_weights.tape import Tape
from mtrl_cli.training.callbacks import Callback, DropoutState, SpectralNorm
from mtrl_cli.training.diagnostics import Diagnostics
from mtrl_cli.training.early_stopping import EarlyStopping
from mtrl_cli.training.env_group import make_group
from mtrl_cli.training.episode_statistics import EpisodeStatistics
from mtrl_cli.training.evaluator import Evaluator, metric_names
from mtrl_cli.training.freezing import Freezing
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.loop import Loop
from mtrl_cli.training.resets import Resets


@dataclass
class Run:
    """All objects of a training run, before its emulators are started."""

    pack: Pack
    agent: Agent
    replay: Replay
    learner: Learner
    freezing: Freezing
    evaluator: Evaluator
    tester: Evaluator | None
    early_stopping: EarlyStopping
    diagnostics: Diagnostics
    device: torch.device
    open_loop: Callable[[], Loop]


def make_store(config: Config, folder: Path, ranks: Ranks = ALONE) -> CheckpointStore:
    """Make the checkpoint store of a run in `folder`."""
    return CheckpointStore(folder, keep=config["checkpoint"]["keep"], with_replay=config["checkpoint"]["replay"], ranks=ranks)


def make_pack(config: Config) -> Pack:
    """Make the tasks. Trusted packages are imported first, because packages may register environments.

    Raises:
        UserError: a trusted package is not installed, or the tasks do not form a pack.
    """
    for package in config["trusted_packages"]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"trusted_packages: {package} cannot be imported ({error}). Install {package}, or remove {package} from trusted_packages"
            ) from error
    return make(config, "env")


def set_up_torch(config: Config, device: torch.device) -> None:
    """Set the global state of torch: threads, compiler, current GPU and precision of float32 products."""
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
    """Make the evaluator of validation episodes."""
    keys = {key: config["eval"][key] for key in ("episodes", "max_steps", "epsilon", "seed")}
    return Evaluator(pack, **keys, num_threads=hardware.cores(), device=device)


def make_tester(config: Config, pack: Pack, device: torch.device) -> Evaluator | None:
    """Make the evaluator of the final test, with other seeds than validation; None if there is no test."""
    keys = config["eval"]
    episodes = keys["episodes"] if keys["test_episodes"] is None else keys["test_episodes"]
    return make_evaluator({"eval": keys | {"episodes": episodes, "seed": keys["test_seed"]}}, pack, device) if episodes else None


def make_early_stopping(config: Config, pack: Pack) -> EarlyStopping:
    """Make the early stopping of a run.

    Raises:
        UserError: evaluations of these tasks do not have the metric.
    """
    section, names = config["early_stopping"], metric_names(pack)
    if section["metric"] not in (None, *names):
        raise UserError(f"early_stopping.metric must be one of {', '.join(names)}, got {show(section['metric'])}")
    return EarlyStopping(**section)


def make_task_weights(config: Config, tasks: Tasks, network: MultiTaskNetwork, log: Callable[[str], None]) -> TaskWeights:
    """Make the task weights: uniform weights if gradients are required and the tasks share no parameters.

    Raises:
        UserError: invalid values, or a solver that is not installed.
    """
    task_weights: TaskWeights = make(config, "task_weights", tasks)
    if task_weights.needs not in ("losses", "gram", "rows"):
        raise UserError(f"{type(task_weights).__name__}.needs must be losses, gram or rows, got {task_weights.needs!r}")
    if task_weights.needs != "losses" and not network.shared_parameters():
        log(f"task weights: the tasks share no parameters, so {type(task_weights).__name__} equals uniform")
        return Uniform(tasks)
    return task_weights


def make_run(config: Config, pack: Pack, log: Callable[[str], None], ranks: Ranks = ALONE) -> Run:
    """Make all objects of a training run on this rank, without writing files or starting emulators.

    Args:
        log: function that prints a line.

    Raises:
        UserError: incompatible parts.
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
    with refusals():
        freezing = Freezing(network, freeze=config["transfer"]["freeze"], unfreeze_at=config["transfer"]["unfreeze_at"])
    learner = _make_learner(config, pack, agent, replay, freezing, ranks, log)

    def open_loop() -> Loop:
        exploration = derived_seed(config["seed"], ranks.label("exploration"))
        actor = EpsilonGreedy(network, [task.num_actions for task in pack.tasks], device, exploration)
        threads, size = max(1, hardware.cores() // ranks.place.local_size), num_envs // config["groups"]
        firsts = range(ranks.rank * num_envs, (ranks.rank + 1) * num_envs, size)
        groups = [make_group(pack, actor, agent, first, size, config["seed"], threads, device) for first in firsts]
        # Recent means are over about 100 episodes of each task on all ranks.
        statistics = EpisodeStatistics(names, num_envs, window=max(1, 100 // ranks.size))
        return Loop(groups, actor, replay, learner, statistics, overlapped=device.type == "cuda", ranks=ranks)

    return Run(
        pack=pack,
        agent=agent,
        replay=replay,
        learner=learner,
        freezing=freezing,
        evaluator=make_evaluator(config, pack, device),
        tester=make_tester(config, pack, device),
        early_stopping=make_early_stopping(config, pack),
        diagnostics=Diagnostics(agent, replay, names, seed=derived_seed(config["seed"], "diagnostics")),
        device=device,
        open_loop=open_loop,
    )


def _make_learner(
    config: Config, pack: Pack, agent: Agent, replay: Replay, freezing: Freezing, ranks: Ranks, log: Callable[[str], None]
) -> Learner:
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
    task_weights = make_task_weights(config, tasks, network, log)
    if network.has_dropout and task_weights.uses_losses_after_step:
        raise UserError(
            f"network.dropout must be 0 with task_weights={type(task_weights).__name__}, which compares the losses of a batch before and "
            f"after an update, got {config['network'].get('dropout')}"
        )

    def tape_of_trained_parameters() -> Tape | None:
        if config["compile"]:
            torch.compiler.reset()  # every set of trained parameters is compiled separately, and the number of compiled variants is limited
        if task_weights.needs == "losses" or not network.shared_parameters():
            return None
        with rng.kept(device):  # keeps the generator of dropout
            return make_tape(config, network, pack, device)

    # Exchanges between ranks are not recorded.
    recorded = device.type == "cuda" and ranks.size == 1
    recorder = (lambda: CudaGraphs(device, generators_of(replay, task_weights, *augmentation.parts.values()))) if recorded else None
    return Learner(
        agent,
        replay,
        augmentation,
        task_weights,
        optimizer,
        names,
        callbacks=_make_callbacks(config, pack, network, freezing, device, ranks),
        make_tape=tape_of_trained_parameters,
        recorder=recorder,
        ranks=ranks,
    )


def _make_callbacks(
    config: Config, pack: Pack, network: MultiTaskNetwork, freezing: Freezing, device: torch.device, ranks: Ranks
) -> list[Callback]:
    """Make the callbacks of the learner. Freezing is last, to revert the changes of spectral normalization to frozen rows."""
    callbacks: list[Callback] = []
    if layers := spectral_layers(network):
        callbacks.append(SpectralNorm(layers))
    callbacks.append(freezing)
    if config["resets"]["every"]:
        callbacks.append(_make_resets(config, pack, device))
    if network.has_dropout:
        callbacks.append(DropoutState(dropout_generator(device, derived_seed(config["seed"], ranks.label("dropout")))))
    return callbacks


def _make_resets(config: Config, pack: Pack, device: torch.device) -> Resets:
    """Make the resets of the network. New parameters depend on the seed of the run and the number of the reset."""
    resets = config["resets"]

    def fresh(number: int) -> MultiTaskNetwork:
        return make_network(config | {"seed": derived_seed(config["seed"], f"reset {number}")}, pack, device)

    last_step = resets["until"] * config["steps_per_task"]
    return Resets(every=resets["every"], shrink=resets["shrink"], parts=resets["parts"], last_step=last_step, fresh=fresh)


def _make_replay(config: Config, spec: ReplaySpec, num_envs: int, ranks: Ranks) -> Replay:
    """Make the replay of a rank."""
    spec = replace(spec, num_envs=num_envs, seed=derived_seed(config["seed"], ranks.label("replay")))
    capacity = config["replay"].get("capacity")
    part = config["replay"] | ({} if capacity is None else {"capacity": capacity // ranks.size})
    try:
        replay: Replay = make(config | {"replay": part}, "replay", spec)
        return replay
    except UserError as error:
        raise UserError(str(error) if ranks.size == 1 else f"on each of {ranks.size} ranks: {error}") from error


def device_of(config: Config, ranks: Ranks) -> torch.device:
    """Return the device of a rank: with `device=cuda` and several ranks, the GPU of its local rank.

    Raises:
        UserError: there is no such device.
    """
    named = config["device"]
    return hardware.resolve_device(f"cuda:{ranks.place.local_rank}" if named == "cuda" and ranks.size > 1 else named)


def check_tasks(saved: Any, pack: Pack, run: Path) -> None:
    """Check that a checkpoint was trained on the tasks of a configuration.

    Raises:
        UserError: the tasks differ; the message names the added or omitted tasks.
    """
    names = [task.name for task in pack.tasks]
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise UserError(f"the checkpoint of {run} has no list of tasks")
    if saved != names:
        added, missing = [name for name in names if name not in saved], [name for name in saved if name not in names]
        change = f"adds {', '.join(added)}" if added else f"omits {', '.join(missing)}" if missing else "lists the tasks in another order"
        raise UserError(f"{run} was trained on {', '.join(saved)}, but its config.yaml {change}. Restore the tasks of the run")


def for_evaluation(config: Config, device: str | None) -> Config:
    """Adapt the configuration of a run to its evaluation on this machine.

    Args:
        device: device to use; None: the device of the run if this machine has that device, else any device.
    """
    try:
        resolved = hardware.resolve_device(device or config["device"])
    except UserError:
        if device is not None:
            raise
        resolved = hardware.resolve_device("auto")  # such as a run on a GPU, evaluated on a laptop
    return config | {
        "device": str(resolved),
        "precision": config["precision"] if config["device"] in (str(resolved), resolved.type) else "fp32",
    }


def make_evaluation(config: Config) -> tuple[Pack, MultiTaskNetwork, Evaluator]:
    """Make the tasks, a network to load weights into, and the evaluator."""
    device = torch.device(config["device"])
    torch.set_num_threads(min(config["threads"], hardware.cores()))
    pack = make_pack(config)
    return pack, make_network(config, pack, device), make_evaluator(config, pack, device)


def replay_spec(config: Config, pack: Pack, device: torch.device) -> ReplaySpec:
    """Return the sizes of a run's replay."""
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
