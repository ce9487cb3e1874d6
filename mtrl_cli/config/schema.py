"""Keys and types of configuration sections without a class. The files in conf/ set the values. Numbers of steps are per task."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import Field

from mtrl_cli.config.introspection import Key
from mtrl_cli.types import Auto, Fraction, NonNegativeFloat, NonNegativeInt, Parameters, PositiveInt

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<index>")]

Freeze = Annotated[
    str, Field(pattern=r"^(none|torso|torso:[1-9]\d{0,3}|all_but_heads)$", description="none, torso, torso:N (N layers) or all_but_heads")
]


class Trainer:
    """Top-level keys of a training configuration. `ranks` is set by torchrun."""

    steps_per_task: PositiveInt
    seed: NonNegativeInt
    device: Device
    precision: Literal["auto", "fp32", "tf32", "bf16"]
    compile: bool | Auto
    threads: PositiveInt | Auto
    run_dir: str | None
    trusted_packages: list[str]
    groups: PositiveInt | Auto
    ranks: PositiveInt
    init_from: str | None


class Transfer:
    """Use of the parameters from `init_from`."""

    freeze: Freeze
    unfreeze_at: PositiveInt | None
    adapters: Literal["none", "lora"]
    rank: PositiveInt
    replay: bool


class TrainingEvaluation:
    """Evaluations of a run. `every` 0: only at the end. `test_episodes` None: same as `episodes`; 0: no test."""

    every: NonNegativeInt
    episodes: PositiveInt
    max_steps: PositiveInt
    epsilon: Fraction
    seed: NonNegativeInt
    at_start: bool
    test_seed: NonNegativeInt
    test_episodes: NonNegativeInt | None


class EarlyStopping:
    """Early stopping by an evaluation metric. `metric` None: no early stopping."""

    metric: str | None
    patience: PositiveInt
    min_delta: NonNegativeFloat


class Checkpointing:
    """Checkpoints of a run. `every` 0: only at the end."""

    every: NonNegativeInt
    keep: PositiveInt
    replay: bool


class Logging:
    """Intervals of metrics and of diagnostics. `diagnostics` 0: never."""

    every: PositiveInt
    diagnostics: NonNegativeInt


class Resets:
    """Periodic resets of network parts towards fresh parameters. `every` 0: never."""

    every: NonNegativeInt
    shrink: Fraction
    parts: list[Literal["torso", "sharing", "heads"]]
    until: Fraction


class Evaluation:
    """Top-level keys of `mtrl eval`. None: the value of the run."""

    checkpoint: Literal["latest", "best"] | NonNegativeInt
    video: bool
    device: Device | None
    trusted_packages: list[str]


class EvaluationEpisodes:
    """Episodes of `mtrl eval`. None: the value of the run."""

    episodes: PositiveInt | None
    max_steps: PositiveInt | None
    epsilon: Fraction | None
    seed: NonNegativeInt | None


class Sweep:
    """Top-level keys of a sweep; the configurations of its runs are overrides of `mtrl train`."""

    run_dir: str | None
    trusted_packages: list[str]


class Search:
    """Trials of a sweep and their objective.

    Attributes:
        sampler: name of the sampler; auto: grid, or tpe where a value is an interval.
        trials: number of trials; None: the whole grid.
        pruner: name of the rule that ends unpromising trials early.
        storage: URL of an Optuna storage, or env:NAME for a URL in an environment variable; None: a journal in the sweep's folder.
        metric: evaluation metric to maximize; None: the metric that selects the best checkpoint.
        retries: number of times that a trial is resumed after its process died.
        seed: seed of the sampler.
    """

    sampler: Literal["auto", "grid", "random", "tpe", "cmaes", "gp"]
    trials: PositiveInt | None
    pruner: Literal["none", "median", "hyperband", "halving"]
    storage: str | None
    metric: str | None
    retries: NonNegativeInt
    seed: NonNegativeInt


SECTIONS: dict[str, dict[str, type]] = {
    "train": {
        "": Trainer,
        "eval": TrainingEvaluation,
        "early_stopping": EarlyStopping,
        "checkpoint": Checkpointing,
        "log": Logging,
        "transfer": Transfer,
        "resets": Resets,
    },
    "eval": {"": Evaluation, "eval": EvaluationEpisodes},
    "sweep": {"": Sweep, "sweep": Search},
}
"""Sections without a class, by command and path."""

OWN_KEYS = {
    "env": {"name": Key(Annotated[str, Field(pattern=r"^\w[\w.-]*$", description="letters, digits, '_', '.' and '-'")])},
    "network": {"parameters": Key(Parameters | None, None)},
}
"""Keys of a group that its classes do not have. `env.name` names the folder of runs; `network.parameters` sets the network's width."""


def keys_of(section: type) -> dict[str, Key]:
    """Return the keys of a section without a class."""
    annotations: dict[str, Any] = typing.get_type_hints(section, include_extras=True)
    return {name: Key(annotation) for name, annotation in annotations.items()}
