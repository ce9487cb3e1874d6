"""The sections of a configuration that hold no class, as dataclasses: their keys, what each may be, and the defaults of older runs."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Literal

from pydantic import Field

from mtrl_cli.config.introspection import MISSING, Key
from mtrl_cli.types import Auto, Fraction, NonNegativeFloat, NonNegativeInt, Parameters, PositiveInt

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<index>")]

Freeze = Annotated[
    str, Field(pattern=r"^(none|torso|torso:[1-9]\d{0,3}|all_but_heads)$", description="none, torso, torso:N (N layers) or all_but_heads")
]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The keys at the top of a training configuration. Counts of steps are per task. `ranks` is what torchrun says, written down."""

    steps_per_task: PositiveInt
    seed: NonNegativeInt
    device: Device
    precision: Literal["auto", "fp32", "tf32", "bf16"]
    compile: bool | Auto
    threads: PositiveInt | Auto
    run_dir: str | None
    trusted_packages: list[str]
    groups: PositiveInt | Auto = 1
    ranks: PositiveInt = 1
    init_from: str | None = None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What becomes of the parameters that `init_from` brings. Counts of steps are per task."""

    freeze: Freeze = "none"
    unfreeze_at: PositiveInt | None = None
    adapters: Literal["none", "lora"] = "none"
    rank: PositiveInt = 4
    replay: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingEvaluation:
    """When and how a run is evaluated. `every` 0: only at the end. `test_episodes` None: as `episodes`; 0: no test."""

    every: NonNegativeInt
    episodes: PositiveInt
    max_steps: PositiveInt
    epsilon: Fraction
    seed: NonNegativeInt
    at_start: bool = False
    test_seed: NonNegativeInt = 2000003
    test_episodes: NonNegativeInt | None = None


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """By which metric of its evaluations a run is stopped before its budget is used up. `metric` None: by none."""

    metric: str | None = None
    patience: PositiveInt = 5
    min_delta: NonNegativeFloat = 0.0


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written, how many are kept, and whether with the replay. `every` 0: only at the end."""

    every: NonNegativeInt
    keep: PositiveInt
    replay: bool


@dataclasses.dataclass(frozen=True)
class Logging:
    """How often metrics are written, and how often the network is looked at for those of its sharing (0: never)."""

    every: PositiveInt
    diagnostics: NonNegativeInt = 0


@dataclasses.dataclass(frozen=True)
class Resets:
    """When parts of the network are brought back towards fresh parameters, and how far. `every` 0: never."""

    every: NonNegativeInt = 0
    shrink: Fraction = 0.5
    parts: list[Literal["torso", "sharing", "heads"]] = dataclasses.field(default_factory=lambda: ["torso", "sharing", "heads"])
    until: Fraction = 0.8


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The keys at the top of `mtrl eval`'s configuration. None: as the run has it."""

    checkpoint: Literal["latest", "best"] | NonNegativeInt
    video: bool
    device: Device | None
    trusted_packages: list[str]


@dataclasses.dataclass(frozen=True)
class EvaluationGames:
    """How `mtrl eval` plays. None: as the run has it."""

    episodes: PositiveInt | None
    max_steps: PositiveInt | None
    epsilon: Fraction | None
    seed: NonNegativeInt | None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The keys at the top of a sweep's configuration; what its runs share and differ in are words of `mtrl train`."""

    run_dir: str | None
    trusted_packages: list[str]


@dataclasses.dataclass(frozen=True)
class Search:
    """Which trials a sweep has, and by what they are judged.

    Attributes:
        sampler: auto: grid, or tpe where there are intervals.
        trials: how many; None: all of a grid.
        pruner: by which a trial is ended that promises nothing.
        storage: an Optuna storage's URL, or env:NAME for one that an environment variable holds; None: a journal in the sweep's folder.
        metric: of the evaluations, the higher the better; None: what the best checkpoint is chosen by.
        retries: how often a trial whose process died is gone on with.
        seed: of the sampler.
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
    "eval": {"": Evaluation, "eval": EvaluationGames},
    "sweep": {"": Sweep, "sweep": Search},
}
"""The sections without a class, of each command's configuration."""

OWN_KEYS = {
    "env": {"name": Key(Annotated[str, Field(pattern=r"^\w[\w.-]*$", description="letters, digits, '_', '.' and '-'")])},
    "network": {"parameters": Key(Parameters | None, None)},
}
"""Keys that a group has beyond what its class says of them: a pack's name is also that of the folder that its runs lie in,
a network's number of parameters decides on the width of whatever torso, sharing structure and head it is made of."""


def keys_of(section: type) -> dict[str, Key]:
    """The keys of a dataclass, and the defaults that it has for configurations from before there was such a key."""
    annotations = typing.get_type_hints(section, include_extras=True)
    fields = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(section)
    }
    return {name: Key(annotations[name], MISSING if default is dataclasses.MISSING else default) for name, default in fields.items()}
