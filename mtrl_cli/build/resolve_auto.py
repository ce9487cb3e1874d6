"""Resolve every `auto` of a configuration, and the network width for `network.parameters`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mtrl_cli.build import augmentation as build_augmentation
from mtrl_cli.build import network as build_network
from mtrl_cli.build import parameter_budget
from mtrl_cli.build import run as build_run
from mtrl_cli.build.instantiate import Config, class_of
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import UserError
from mtrl_cli.machine import hardware
from mtrl_cli.networks.network import ParameterCounts
from mtrl_cli.parallel.distributed import ALONE, Ranks

# Limits of `replay.capacity=auto`: transitions per task (Mnih et al. 2015), fraction of the free memory, and, where checkpoints contain
# the replay, fraction of the free disk.
_LARGEST_CAPACITY, _MEMORY_SHARE, _DISK_SHARE = 1_000_000, 0.5, 0.5
# `agent.batch_size=auto`: minimum number of samples per update over all tasks, because small operations are dominated by overhead. Networks
# for whole images are large. A GPU requires more samples.
_SAMPLES_OF_LARGE, _SAMPLES_OF_SMALL, _SAMPLES_ON_GPU = 128, 640, 256
_LARGE_NETWORK = 1_000_000  # multiply-adds of a forward pass
_SMALLEST_BATCH = 32  # per task (Mnih et al. 2015)
_SAMPLES_PER_TARGET = 64_000  # `agent.target_period=auto`: samples per task between copies: 2,000 updates of 32
# Largest fraction of the free memory for a capacity set by the user. The network and the emulators use the rest.
_LARGEST_MEMORY_SHARE = 0.9


def resolve(config: Config, pack: Pack, log: Callable[[str], None], ranks: Ranks = ALONE) -> Config:
    """Return the configuration with every `auto` resolved for this machine. A resolved configuration is only checked.

    The first rank resolves the configuration for all ranks.

    Raises:
        UserError: a device or a compiler is missing, the replay does not fit into memory, no width gives the number of parameters, or the
            ranks cannot share a number evenly.
    """
    device = hardware.resolve_device(config["device"])
    _check_ranks(config, device, ranks)
    if config["network"]["parameters"] is not None:
        parameter_budget.check_memory(config["network"]["parameters"], _free_memory(device) * _LARGEST_MEMORY_SHARE)
    # Each rank uses the GPU of its local rank, so several ranks share the device type only.
    resolved = fit_network(config, pack) | {"device": str(device) if ranks.size == 1 else device.type}
    resolved["augmentation"] = build_augmentation.resolve(config, pack)
    image = pack.observation_kind == "image"
    if config["threads"] == "auto":
        # Matrix products of a small vector network end before a second thread has started.
        resolved["threads"] = max(1, hardware.cores() // ranks.place.local_size) if image else 1
    if config["precision"] == "auto":
        fast = image and (hardware.cpu_has_bf16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported())
        resolved["precision"] = "bf16" if fast else "tf32" if device.type == "cuda" else "fp32"
    if resolved["precision"] == "tf32" and device.type == "cpu":
        log("precision: TF32 requires a GPU; using fp32")  # a run from a GPU may be resumed on a CPU
        resolved["precision"] = "fp32"
    resolved["groups"] = _resolve_groups(config["groups"], pack.num_envs // ranks.size, device)
    if config["compile"] in ("auto", True):
        missing = hardware.missing_for_compile()
        if missing and config["compile"] is True:
            raise UserError(f"compile=true is impossible: {missing}. Use compile=false")
        if missing and image:
            log(f"compile: off (about two times slower on a CPU): {missing}")
        # Small vector networks gain less than compilation costs.
        resolved["compile"] = (config["compile"] is True or image) and not missing
    agent = resolved["agent"] = dict(config["agent"])
    if agent.get("batch_size") == "auto":
        agent["batch_size"] = _resolve_batch(resolved, pack, device, ranks)
    if agent.get("target_period") == "auto":
        agent["target_period"] = max(1, _SAMPLES_PER_TARGET // agent["batch_size"])
    if agent.get("overlap") == "auto":
        agent["overlap"] = device.type == "cuda"  # on a CPU, the network would use the cores of the emulators
    if "capacity" in config["replay"]:
        resolved["replay"] = config["replay"] | {"capacity": _resolve_capacity(resolved, pack, device, log, ranks)}
    if device.type == "cpu" and resolved["threads"] > hardware.cores():
        log(f"threads={resolved['threads']} exceeds the {hardware.cores()} cores of this machine: threads will wait for each other")
    return resolved


def _resolve_groups(groups: int | str, num_envs: int, device: torch.device) -> int:
    """Resolve the number of environment groups: two on a GPU, which acts for one group while the CPU steps the other; else one."""
    if groups == "auto":
        return 2 if device.type == "cuda" and num_envs % 2 == 0 else 1
    if num_envs % int(groups):
        raise UserError(f"groups must divide the {num_envs} environments of a task, got {groups}")
    return int(groups)


def _resolve_batch(config: Config, pack: Pack, device: torch.device, ranks: Ranks) -> int:
    """Resolve the batch size per task: few large updates instead of many small ones, with the same number of samples per step."""
    large = build_network.measure(config, pack)[1] >= _LARGE_NETWORK
    wanted = _SAMPLES_ON_GPU if device.type == "cuda" and large else _SAMPLES_OF_LARGE if large else _SAMPLES_OF_SMALL
    each = -(-wanted // len(pack.tasks))
    each = max(_SMALLEST_BATCH, 1 << (each - 1).bit_length())
    return -(-each // ranks.size) * ranks.size


def _check_ranks(config: Config, device: torch.device, ranks: Ranks) -> None:
    ranks.share("env.num_envs", config["env"]["num_envs"])
    if ranks.size == 1 or device.type == "cpu":
        return
    here, devices = ranks.place.local_size, torch.cuda.device_count()
    if config["device"] not in ("auto", "cuda"):
        raise UserError(f"device must be auto, cuda or cpu for {ranks.size} ranks, which use one GPU each, got {config['device']}")
    if here > devices:
        raise UserError(f"{here} ranks on this machine require {here} GPUs, got {devices}. Start fewer ranks, or use device=cpu")


def fit_network(config: Config, pack: Pack) -> Config:
    """Return the configuration with the network width that gives `network.parameters`; unchanged if `network.parameters` is null or met.

    Raises:
        UserError: no width gives the number of parameters.
    """
    network, given = config["network"], _widths(config)
    if network["parameters"] is None:
        return config
    if not given:
        raise UserError(f"network.parameters must be null for {network['_target_']}, which has one width, got {network['parameters']}")
    build_network.empty_network(config, pack)  # raises UserError where no width can be built

    def count(widths: Config) -> int:
        try:
            return build_network.empty_network(_with(config, widths), pack).parameter_counts().total
        except UserError:  # the sharing structure refuses this width
            return 0

    return _with(config, parameter_budget.fit(given, network["parameters"], count))


def scaled_keys(config: Config) -> list[str]:
    """Return the keys that `network.parameters` sets, such as network.features; none if `network.parameters` is null."""
    return list(_widths(config)) if config["network"]["parameters"] is not None else []


def _widths(config: Config) -> Config:
    """Return the values that set the width of the torso and the sharing structure, by dotted key."""
    torso, of_torso = class_of(config, "network")
    sharing, of_sharing = class_of(config, "network/sharing")
    return {f"network.{key}": of_torso[key] for key in torso.scaled_keys if key in of_torso} | {
        f"network.sharing.{key}": of_sharing[key] for key in sharing.scaled_keys if key in of_sharing
    }


def _with(config: Config, widths: Config) -> Config:
    """Return the configuration with other values of the dotted keys `network.KEY` and `network.sharing.KEY`."""
    network = config["network"] | {"sharing": dict(config["network"]["sharing"])}
    for dotted, value in widths.items():
        *section, key = dotted.split(".")[1:]
        (network["sharing"] if section else network)[key] = value
    return config | {"network": network}


def _resolve_capacity(config: Config, pack: Pack, device: torch.device, log: Callable[[str], None], ranks: Ranks) -> int:
    spec = build_run.replay_spec(config, pack, device)
    each = class_of(config, "replay")[0].bytes_per_transition(spec) * spec.num_tasks
    # The replay is divided among ranks. Each rank stores its part in the memory of its GPU; without GPUs, ranks share the machine's memory.
    free = _free_memory(device) * ranks.size // (ranks.place.local_size if device.type == "cpu" else 1)
    capacity = config["replay"]["capacity"]
    if capacity == "auto":
        room, resource = free * _MEMORY_SHARE, "memory"
        disk = _free_disk(config["run_dir"]) * _DISK_SHARE
        if config["checkpoint"]["replay"] and disk < room:
            room, resource = disk, "disk, because checkpoints contain the replay (to use the memory: checkpoint.replay=false)"
        wanted, fits = min(_LARGEST_CAPACITY, config["steps_per_task"]), int(room // each)
        if fits < wanted:
            log(f"replay: {fits:,} transitions per task instead of {wanted:,}, limited to half of the free {resource}")
        return max(min(wanted, fits), (spec.n_step + spec.stack + 1) * spec.num_envs)
    if capacity * each > free * _LARGEST_MEMORY_SHARE:
        raise UserError(
            f"replay.capacity must be at most {int(free * _LARGEST_MEMORY_SHARE // each)} or auto, got {capacity}: "
            f"{spec.num_tasks} tasks would need {capacity * each / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    return capacity


def _free_memory(device: torch.device) -> int:
    return hardware.memory_available() if device.type == "cpu" else hardware.device_memory(device)[0]


def _free_disk(run_dir: str | None) -> int:
    folder = Path(run_dir or ".").expanduser().absolute()
    return hardware.disk_free(next(each for each in (folder, *folder.parents) if each.exists()))


def describe(config: Config, pack: Pack) -> list[str]:
    """Describe a resolved configuration and its sizes, in lines for the terminal."""
    env, agent, replay, evaluation = config["env"], config["agent"], config["replay"], config["eval"]
    spec = build_run.replay_spec(config, pack, torch.device(config["device"]))
    replay_class = class_of(config, "replay")[0]
    each = replay_class.bytes_per_transition(spec)
    capacity = replay.get("capacity") or replay_class.fixed_capacity(spec)
    total = capacity * each * spec.num_tasks
    size = f"{total / 2**30:.2f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"
    tasks = ", ".join(task.name for task in pack.tasks[:8]) + (f" and {len(pack.tasks) - 8} more" if len(pack.tasks) > 8 else "")
    counts, multiply_adds = build_network.measure(config, pack)
    budget, widths = config["network"]["parameters"], [f"{key}={value}" for key, value in _widths(config).items()]
    budgeted = "" if budget is None else f"; network.parameters={budget} gives {', '.join(widths)}"
    lines = [
        f"tasks: {tasks} ({env['name']}, {env['num_envs']} environments each)",
        f"machine: {config['device']}, {config['precision']}, {'compiled' if config['compile'] else 'eager'}, threads={config['threads']}",
        f"{'replay' if 'capacity' in replay else 'rollouts'}: {capacity:,} transitions per task, {size} in total ({each:,} bytes each)",
    ]
    if "batch_size" in agent and "samples_per_step" in agent:
        every = agent["batch_size"] / agent["samples_per_step"]
        lines.append(f"updates: {agent['batch_size']} samples per task, one update every {every:g} steps per task")
    lines += [
        f"network: {counts.total:,} parameters, {counts.shared:,} shared and {own(counts)} per task{budgeted}",
        f"forward: {in_short(multiply_adds)} multiply-adds per observation",
    ]
    if config["ranks"] > 1:
        lines.append(f"ranks: {config['ranks']}, each with {env['num_envs'] // config['ranks']} environments per task")
    if config["early_stopping"]["metric"] is not None:
        patience = config["early_stopping"]["patience"]
        evaluations = -(-config["steps_per_task"] // evaluation["every"]) + evaluation["at_start"]
        if patience >= evaluations:
            lines.append(f"early stopping: never, because patience={patience} is not below the {evaluations} evaluations")
    return lines


def own(counts: ParameterCounts) -> str:
    """Format the range of parameters per task."""
    least, most = min(counts.per_task), max(counts.per_task)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def in_short(number: int) -> str:
    """Format a large number with three digits: 9.34M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return str(number)
