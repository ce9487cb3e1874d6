#!/usr/bin/env python3
"""Measure the cost of task weightings: the time of an update relative to an update with `uniform`.

The complete update of `mtrl train` (sampling, targets, backward pass, optimizer), compiled, in the fastest precision: eight tasks, the
Nature network with a plain head, 32 samples per task. For comparison, other implementations of per-task gradients: a loop over tasks,
and TorchJD's `mtl_backward` and `autogram` with PCGrad.

    pip install '.[solvers]'
    python scripts/bench_task_weights.py [--pairs 10] [--tasks 8] [--device cpu] [--busy] [--json] [NAME ...]

Each result is the median over pairs of updates with the method and with `uniform`, in alternation. For methods that solve only every few
updates (`nash_mtl`), a complete period is timed. `--busy` uses one thread and measures its CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from bench_task_weights_peers import PEERS
from mtrl_cli.build import instantiate, resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.config import compose
from mtrl_cli.config import options as catalogue
from mtrl_cli.errors import UserError
from mtrl_cli.replay.buffers import Transition
from mtrl_cli.task_weights.base import TaskWeights
from mtrl_cli.training.learner import Learner

GAMES = ("pong", "breakout", "space_invaders", "seaquest", "beam_rider", "qbert", "enduro", "freeway")
BARS = {"losses": None, "gram": 1.3, "rows": 2.2}
WARM_UPS, ROWS = 3, 40


def make_learner(name: str, options: argparse.Namespace, run_dir: str) -> tuple[Learner, dict[str, Any]]:
    """Return the compiled learner of a run with a replay of noise, and the resolved configuration."""
    overrides = {
        "env": "atari_pack",
        "env.tasks": f"[{','.join(GAMES[: options.tasks])}]",
        "network/head": "plain",
        "agent.batch_size": options.batch,
        "replay.capacity": 4000,
        "task_weights": name,
        "device": options.device,
        "threads": 1 if options.busy else "auto",
        "run_dir": run_dir,
    }
    composed = compose.compose_training([f"{key}={value}" for key, value in overrides.items()])
    pack = build_run.make_pack(composed)

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    settled = resolve_auto.resolve(composed, pack, log)
    learner = build_run.make_run(settled, pack, log).learner
    spec = learner.replay.spec
    random = torch.Generator().manual_seed(0)
    shape = (spec.num_tasks, spec.num_envs)
    never = torch.zeros(shape, dtype=torch.bool)
    for _ in range(ROWS):
        frame = torch.randint(256, (*shape, *spec.frame_shape), dtype=torch.uint8, generator=random)
        reward = torch.rand(shape, generator=random)
        row = (frame, never, torch.zeros(shape, dtype=torch.int64), reward, never, never, never, torch.zeros(shape))
        learner.replay.add(Transition(*(each.to(spec.device) for each in row)))
    learner.warm_up()
    return learner, settled


def settled_every(name: str) -> int:
    """Return the interval in updates at which a method solves for weights."""
    section = catalogue.read_yaml(catalogue.options("task_weights", [catalogue.conf_folder()])[name])
    return int(section.get("every", 1))


def with_weights(learner: Learner, settled: dict[str, Any], name: str) -> TaskWeights:
    """Return another weighting for the same run."""
    section = catalogue.read_yaml(catalogue.options("task_weights", [catalogue.conf_folder()])[name])
    made: TaskWeights = instantiate.make(settled | {"task_weights": section}, "task_weights", learner.task_weights.tasks)
    return made


def seconds(act: Callable[[], Any], device: torch.device, clock: Callable[[], float], times: int = 1) -> float:
    """Return the mean time of `act`, including work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = clock()
    for _ in range(times):
        act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begun) / times


def measure(options: argparse.Namespace, run_dir: str) -> list[dict[str, Any]]:
    """Return a row per weighting and per other implementation."""
    plain, settled = make_learner("uniform", options, run_dir)
    taped, _ = make_learner("mgda", options, run_dir)
    device = plain.replay.spec.device
    uniform, clock = plain.task_weights, time.process_time if options.busy else time.perf_counter
    names = options.names or [name for name in catalogue.options("task_weights", [catalogue.conf_folder()]) if name != "uniform"]
    rows = []

    def baseline() -> None:
        plain.task_weights = uniform
        plain.update(ROWS)

    def pairs(act: Callable[[], Any], period: int) -> dict[str, float]:
        for _ in range(WARM_UPS):
            act()
        times = [(seconds(act, device, clock, period), seconds(baseline, device, clock)) for _ in range(max(2, options.pairs // period))]
        ratios = [mine / other for mine, other in times]
        return {
            "milliseconds": 1000 * statistics.median(mine for mine, _ in times),
            "uniform_milliseconds": 1000 * statistics.median(other for _, other in times),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }

    baseline()
    for name in names:
        try:
            weights = with_weights(plain, settled, name)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        learner = plain if weights.needs == "losses" else taped
        period = settled_every(name)

        def update(learner: Learner = learner, weights: TaskWeights = weights) -> None:
            learner.task_weights = weights
            learner.update(ROWS)

        rows.append({"name": name, "needs": weights.needs, "bar": BARS[weights.needs], "every": period} | pairs(update, period))
        print(line(rows[-1]), file=sys.stderr)
    for name, make in PEERS.items():
        rows.append({"name": name, "needs": "peer", "bar": None, "every": 1} | pairs(make(plain), 1))
        print(line(rows[-1]), file=sys.stderr)
    return rows


def line(row: dict[str, Any]) -> str:
    """Format a row."""
    verdict = "" if row["bar"] is None else f"at most {row['bar']}  {'met' if row['ratio'] <= row['bar'] else 'MISSED'}"
    every = f"every {row['every']} updates" if row["every"] > 1 else ""
    spread = f"{row['least']:.2f} to {row['most']:.2f}"
    return (
        f"{row['name']:<36}{row['needs']:<8}{row['milliseconds']:>8.1f} ms {row['uniform_milliseconds']:>8.1f} ms"
        f"{row['ratio']:>7.2f}  {spread:<14}{verdict:<20}{every}"
    ).rstrip()


def table(rows: list[dict[str, Any]]) -> str:
    """Format all rows with a header."""
    titles = f"{'weighting':<36}{'needs':<8}{'time':>11} {'uniform':>11}{'ratio':>7}  {'range':<14}"
    return "\n".join([titles.rstrip(), *map(line, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="weightings (default: all)")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="samples per task")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--busy", action="store_true", help="measure CPU time of one thread, for a busy machine")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 1 and not options.busy:
        print(f"warning: the machine is busy (load {load:.1f}); the ratios are not reliable", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, f"{folder}/run")
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
