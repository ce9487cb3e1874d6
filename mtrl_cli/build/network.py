"""Configuration to a network, and what is known of it before it is trained."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from mtrl_cli.build.instantiate import Config, derived_seed, make
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import UserError
from mtrl_cli.networks.cost import multiply_adds
from mtrl_cli.networks.lora import add_adapters
from mtrl_cli.networks.network import MultiTaskNetwork, ParameterCounts
from mtrl_cli.networks.parts import tagged
from mtrl_cli.task_weights.tape import Tape, tape_for


def make_network(config: Config, pack: Pack, device: torch.device) -> MultiTaskNetwork:
    """The network, initialised from the run's seed.

    Raises:
        UserError: a torso for another kind of observation.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the seed is given to GPUs, too
        torch.manual_seed(derived_seed(config["seed"], "network"))
        network = _assemble(config, pack, torch.bfloat16 if config["precision"] == "bf16" else None).to(device)
    # Tensor cores read images channel by channel within a pixel; a CPU's compiled code chooses for itself.
    if device.type == "cuda" and pack.observation_kind == "image":
        torch.nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


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
        sharing = make(config, "network/sharing", tagged(torso), shapes)
    except RuntimeError as error:  # torch: an image too small for the convolutions
        raise UserError(f"network={type(torso).__name__} cannot read observations of shape {shapes[0]}: {error}".split("\n")[0]) from error
    rank = config["transfer"]["rank"]
    try:
        head = make(config, "network/head", sharing.num_features, num_actions)
        if config["transfer"]["adapters"] == "lora":  # after all else, so that the rest is what it would be without
            add_adapters(sharing, rank)
    except ValueError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:  # torch: more memory than there is
        raise UserError(f"network/head or transfer.rank={rank} makes too large a network: {error}".split("\n")[0][:300]) from error
    return MultiTaskNetwork(sharing, head, pack.observation_scale, autocast)


def make_tape(config: Config, network: MultiTaskNetwork, pack: Pack, device: torch.device) -> Tape | None:
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
