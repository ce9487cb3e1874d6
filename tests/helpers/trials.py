"""Plans and trial storages of small sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrl_cli.sweeps.plan import Choices, NumberRange, Plan, Value
from mtrl_cli.sweeps.trial_storage import TrialStorage

SEARCH: dict[str, Any] = {"sampler": "tpe", "trials": 4, "pruner": "none", "storage": None, "metric": None, "retries": 2, "seed": 0}
AXES: dict[str, Choices | NumberRange] = {
    "optimizer.lr": NumberRange(1e-5, 1e-1, log=True),
    "agent.n_step": NumberRange(1, 9, is_integer=True),
    "network/sharing": Choices(("hard", "film", "null")),
}
GRID: tuple[Mapping[str, Value], ...] = tuple(
    {"network/sharing": word, "seed": seed} for word in ("hard", "film") for seed in ("0", "1", "2")
)


def plan(axes: Mapping[str, Choices | NumberRange] = AXES, points: tuple[Mapping[str, Value], ...] | None = None, **search: Any) -> Plan:
    """A plan, by default of four trials."""
    return Plan(
        shared=("env=classic_pack",),
        axes=axes,
        points=points,
        search={**SEARCH, **search},
        launcher={},
        trusted_packages=(),
        env="classic_pack",
        steps_per_task=900,
        run_dir=None,
    )


def grid() -> Plan:
    """A plan of six points."""
    return plan({"network/sharing": Choices(("hard", "film")), "seed": Choices(("0", "1", "2"))}, GRID, sampler="grid", trials=None)


def storage_in(folder: Path, plan: Plan, first: int = 100) -> TrialStorage:
    """The trial storage of a sweep; creates the folder."""
    folder.mkdir(exist_ok=True)
    return TrialStorage(folder, plan, first=first)
