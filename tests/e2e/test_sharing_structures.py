"""Every sharing structure trains with several weightings, through the command's entry point; some in separate processes."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pytest

from mtrl_cli.machine.hardware import missing_for_compile
from tests.helpers.command import ROOT, Mtrl, MtrlHere
from tests.helpers.short_runs import SMALL
from tests.helpers.tiny_runs import TASKS

STRUCTURES = sorted(path.stem for path in (ROOT / "conf" / "network" / "sharing").glob("*.yaml"))
WEIGHTS = ["uniform", "pcgrad", "graddrop", "famo"]
"""Weightings that use a single loss, inner products, gradient rows, and a second evaluation of the batch."""
LITTLE = ["steps_per_task=72"]
KEYS = {"soft_modular": ["network.sharing.module_size=16", "network.sharing.routing_size=16"]}


def last_row(run: Path) -> dict[str, float]:
    """Return a run's last row with updates; assert that all metrics of all rows are finite."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    row: dict[str, float] = [row for row in rows if "grad/norm" in row][-1]
    return row


def test_all_published_structures_exist() -> None:
    published = "care cross_stitch film hard independent input_adapters mmoe moore mtan paco ple soft_modular soft_moe task_embedding"
    assert set(published.split()) <= set(STRUCTURES)


@pytest.mark.parametrize(("structure", "weights"), list(product(STRUCTURES, WEIGHTS)))
def test_every_structure_trains_with_every_kind_of_weighting(structure: str, weights: str, here: MtrlHere) -> None:
    keys = KEYS.get(structure, [])
    printed = here("train", *SMALL, *LITTLE, *keys, f"network/sharing={structure}", f"task_weights={weights}", "run_dir=run").stdout
    last = last_row(here.folder / "run")
    assert last["step"] == 72
    assert last["updates"] == (72 - 4 - 40) * 2 // 16
    of_gradients = weights in ("pcgrad", "graddrop")
    uniform_by_design = structure == "independent" and of_gradients
    assert ("equals uniform" in printed) == uniform_by_design
    if uniform_by_design or weights == "uniform":
        assert [last[f"weight/{task}"] for task in TASKS] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("structure", "weights", "more"),
    [
        ("moore", "mgda", ["network/head=hl_gauss", "agent/value_scale=return_norm"]),
        ("soft_modular", "score_gap", ["agent/value_scale=popart"]),
        ("film", "nash_mtl", ["network/head=quantile", "replay=prioritized"]),
    ],
)
def test_structure_trains_and_evaluates_in_separate_processes(structure: str, weights: str, more: list[str], mtrl: Mtrl) -> None:
    """The saved run is evaluated by another process."""
    mtrl("train", *SMALL, *LITTLE, f"network/sharing={structure}", f"task_weights={weights}", *more, "run_dir=run")
    step = int(last_row(mtrl.folder / "run")["step"])
    printed = mtrl("eval", "run", "eval.episodes=1", "eval.max_steps=10").stdout
    assert "CartPole-v1" in printed
    assert (mtrl.folder / "run" / "eval" / f"{step}.json").exists()


@pytest.mark.skipif(missing_for_compile() is not None, reason=f"torch.compile cannot work here: {missing_for_compile()}")
def test_compiled_structure_without_stacking_makes_one_backward_pass_per_task(mtrl: Mtrl) -> None:
    """Compiled code frees its buffers in the first backward pass unless they are retained."""
    small = ["steps_per_task=80", "network.hidden=[8,8]", "log.diagnostics=0"]
    mtrl("train", *SMALL, *small, "compile=true", "network/sharing=mmoe", "network.sharing.experts=2", "task_weights=pcgrad", "run_dir=run")
    last_row(mtrl.folder / "run")
    compiling = [json.loads(line) for line in (mtrl.folder / "run" / "metrics.jsonl").read_text().splitlines() if "seconds/compile" in line]
    assert [row["step"] for row in compiling] == [0]
    assert compiling[0]["perf/seconds/compile"] > 0
