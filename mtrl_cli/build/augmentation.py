"""Configuration to augmentations."""

from __future__ import annotations

import torch

from mtrl_cli.agents.agent import Agent
from mtrl_cli.augmentation.base import ObservationSpec, Pipeline
from mtrl_cli.augmentation.geometry import auto_pad
from mtrl_cli.build.instantiate import Config, derived_seed, make
from mtrl_cli.envs.pack import Pack
from mtrl_cli.parallel.distributed import Ranks


def settle(config: Config, pack: Pack) -> Config:
    """The augmentations' section, in which every `auto` is what this pack's images make of it."""
    return {
        name: section | ({"pad": auto_pad(pack.observation_shape)} if section.get("pad") == "auto" and _of_images(pack) else {})
        for name, section in config["augmentation"].items()
    }


def make_augmentation(config: Config, pack: Pack, agent: Agent, device: torch.device, ranks: Ranks) -> Pipeline:
    """All augmentations as one, each with draws of its own, which differ from rank to rank.

    Raises:
        UserError: one cannot change what this pack shows, or refuses its values.
    """

    def seen(name: str) -> ObservationSpec:
        return ObservationSpec(
            kind=pack.observation_kind,
            frame_shape=pack.observation_shape,
            own_sizes=tuple(task.observation_shape[0] for task in pack.tasks),
            largest=pack.observation_scale,
            task_names=tuple(task.name for task in pack.tasks),
            actions=tuple(task.action_meanings for task in pack.tasks),
            symmetric=tuple(task.symmetric for task in pack.tasks),
            device=device,
            seed=derived_seed(config["seed"], ranks.label(f"augmentation {name}")),
        )

    parts = {name: make(config, f"augmentation/{name}", seen(name)) for name in config["augmentation"]}
    return Pipeline(parts, loss_draws=agent.loss_draws, target_draws=agent.target_draws)


def _of_images(pack: Pack) -> bool:
    return pack.observation_kind == "image"
