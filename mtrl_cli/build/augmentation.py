"""Build augmentations from a configuration."""

from __future__ import annotations

import torch

from mtrl_cli.agents.agent import Agent
from mtrl_cli.augmentation.base import ObservationSpec, Pipeline
from mtrl_cli.augmentation.geometry import auto_pad
from mtrl_cli.build.instantiate import Config, derived_seed, make
from mtrl_cli.envs.pack import Pack
from mtrl_cli.parallel.distributed import Ranks


def resolve(config: Config, pack: Pack) -> Config:
    """Return the augmentation section with every `auto` resolved for the images of the pack."""
    return {
        name: section
        | ({"pad": auto_pad(pack.observation_shape)} if section.get("pad") == "auto" and pack.observation_kind == "image" else {})
        for name, section in config["augmentation"].items()
    }


def make_augmentation(config: Config, pack: Pack, agent: Agent, device: torch.device, ranks: Ranks) -> Pipeline:
    """Build the pipeline of all augmentations. Each augmentation has a separate random stream on every rank.

    Raises:
        UserError: an augmentation does not support the observations of the pack, or refuses its values.
    """

    def observations(name: str) -> ObservationSpec:
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

    parts = {name: make(config, f"augmentation/{name}", observations(name)) for name in config["augmentation"]}
    return Pipeline(parts, loss_draws=agent.loss_draws, target_draws=agent.target_draws)
