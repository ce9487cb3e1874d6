"""Build networks from a configuration, and measure their size without training."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mtrl_cli.build.instantiate import Config, derived_seed, make, refusals
from mtrl_cli.config.cross_checks import check_observations
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import RunError, UserError, first_line
from mtrl_cli.machine import rng
from mtrl_cli.networks.cost import multiply_adds
from mtrl_cli.networks.lora import add_adapters
from mtrl_cli.networks.network import MultiTaskNetwork, ParameterCounts
from mtrl_cli.networks.parts import tagged
from mtrl_cli.task_weights.tape import Tape, tape_for


def make_network(config: Config, pack: Pack, device: torch.device) -> MultiTaskNetwork:
    """Build the network, initialized from the seed of the run.

    Raises:
        UserError: the torso requires other observations than those of the pack.
    """
    with rng.kept(device):  # manual_seed also seeds GPUs
        torch.manual_seed(derived_seed(config["seed"], "network"))
        network = _assemble(config, pack, torch.bfloat16 if config["precision"] == "bf16" else None).to(device)
    # Tensor cores prefer channels last; on a CPU the compiler chooses the layout.
    if device.type == "cuda" and pack.observation_kind == "image":
        torch.nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def empty_network(config: Config, pack: Pack) -> MultiTaskNetwork:
    """Build the network on the meta device, without memory, to count its parameters.

    Raises:
        UserError: as `make_network`.
    """
    with torch.device("meta"):
        return _assemble(config, pack, None)


def measure(config: Config, pack: Pack) -> tuple[ParameterCounts, int]:
    """Return the parameter counts of the network, and the multiply-adds of a forward pass per observation.

    Raises:
        UserError: as `make_network`.
    """
    network = empty_network(config, pack)
    return network.parameter_counts(), multiply_adds(network, _stacked(pack))


def _assemble(config: Config, pack: Pack, autocast: torch.dtype | None) -> MultiTaskNetwork:
    torso = make(config, "network")
    check_observations(config, torso.observation_kind, pack.observation_kind)
    # Stacked frames are stacked channels. With a stack, all tasks use the padded shape, because unpadded channels would not be contiguous.
    shapes = [task.observation_shape if pack.stack == 1 else _stacked(pack) for task in pack.tasks]
    num_actions = [task.num_actions for task in pack.tasks]
    try:
        sharing = make(config, "network/sharing", tagged(torso), shapes)
    except RuntimeError as error:  # torch: an image too small for the convolutions
        raise UserError(
            f"network={type(torso).__name__} does not accept observations of shape {shapes[0]}: {error}".split("\n")[0]
        ) from error
    rank = config["transfer"]["rank"]
    try:
        head = make(config, "network/head", sharing.num_features, num_actions)
        if config["transfer"]["adapters"] == "lora":  # last, so that all other parameters are initialized as without adapters
            with refusals():
                add_adapters(sharing, rank)
    except RuntimeError as error:  # torch: out of memory
        raise UserError(f"network/head or transfer.rank={rank} makes the network too large: {error}".split("\n")[0][:300]) from error
    return MultiTaskNetwork(sharing, head, pack.observation_scale, autocast)


def make_tape(config: Config, network: MultiTaskNetwork, pack: Pack, device: torch.device) -> Tape | None:
    """Return the tape for fast per-task gradients, or None if the network does not support tapes."""
    random = torch.Generator().manual_seed(0)
    sample = torch.zeros((len(pack.tasks), 2, pack.stack, *pack.observation_shape))
    for own, task in zip(sample, pack.tasks, strict=True):
        noise = torch.rand((2, pack.stack, *task.observation_shape), generator=random)
        own[:, :, *(slice(size) for size in task.observation_shape)] = noise * pack.observation_scale
    observation = sample.flatten(2, 3).to(device, torch.uint8 if pack.observation_kind == "image" else torch.float32)
    tape = tape_for(network, network.shared_parameters(), network.own_parameters(), observation)
    if tape is None and config["compile"]:
        # Per-task backward passes reuse the graph. Compiled code would otherwise free the buffers of the graph in the first pass.
        compiled: Any = importlib.import_module("torch._functorch.config")
        compiled.donated_buffer = False
    return tape


def _stacked(pack: Pack) -> tuple[int, ...]:
    return (pack.stack * pack.observation_shape[0], *pack.observation_shape[1:])


@contextmanager
def must_fit(what: str) -> Iterator[None]:
    """Convert errors of loading the state of a checkpoint into a UserError.

    Raises:
        UserError: the state does not fit its configuration; the message begins with `what`.
    """
    try:
        yield
    except (RunError, UserError):
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} does not fit its configuration: {type(error).__name__}: {first_line(error)}") from error


def load_weights(network: MultiTaskNetwork, state: dict[str, Any], what: str) -> None:
    """Load the "model" of a checkpoint.

    Raises:
        UserError: the checkpoint is of another network; the message begins with `what`.
    """
    try:
        network.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or ["no model"])[-1][:200].rstrip(".")
        raise UserError(f"{what} does not fit its configuration: {reason}. Use another checkpoint") from error
