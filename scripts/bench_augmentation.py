#!/usr/bin/env python3
"""Measure the cost of augmentations: the time of an update with an augmentation relative to an update without.

The complete update of `mtrl train` (sampling, targets, backward pass, optimizer), compiled, in the fastest precision: on eight Atari games
(Nature network, 32 samples per task) and on MinAtar (as tuned: 128 samples per task).

    pip install '.[minatar]'
    python scripts/bench_augmentation.py [--pairs 10] [--env atari_pack] [--device cpu] [--busy] [--json] [NAME ...]

Each result is the median over pairs of updates with and without the augmentation, in alternation. `--busy` uses one thread and measures
its CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from bench_task_weights import seconds
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.build import augmentation as build_augmentation
from mtrl_cli.build import resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.config import compose
from mtrl_cli.config import options as catalogue
from mtrl_cli.envs.pack import Pack
from mtrl_cli.parallel.distributed import ALONE
from mtrl_cli.replay.buffers import Transition
from mtrl_cli.training.learner import Learner

PACKS = {
    "atari_pack": ["agent.batch_size=32"],
    "minatar_pack": ["env.tasks=[asterix,breakout,seaquest,space_invaders]", "agent.batch_size=128"],
}
BARS = {"shift": 1.1}
BAR = 1.25
WARM_UPS, ROWS = 2, 40


def bar_of(name: str) -> float:
    """Return the target: the maximum ratio of update times."""
    return BARS.get(name, BAR)


def make_learner(env: str, options: argparse.Namespace, run_dir: str) -> tuple[Learner, dict[str, Any], Pack]:
    """Return the learner of a run with a replay of noise, the resolved configuration, and the pack."""
    words = [f"env={env}", *PACKS[env], "replay.capacity=4000", f"device={options.device}", f"run_dir={run_dir}"]
    composed = compose.compose_training([*words, f"threads={1 if options.busy else 'auto'}"])
    # Treat all games as mirror-symmetric, so that flip can be measured.
    composed["env"]["symmetric"] = composed["env"]["tasks"]
    pack = build_run.make_pack(composed)

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    settled = resolve_auto.resolve(composed, pack, log)
    learner = build_run.make_run(settled, pack, log).learner
    spec, random = learner.replay.spec, torch.Generator().manual_seed(0)
    shape = (spec.num_tasks, spec.num_envs)
    never = torch.zeros(shape, dtype=torch.bool)
    for _ in range(ROWS):
        frame = torch.randint(int(pack.observation_scale) + 1, (*shape, *spec.frame_shape), dtype=torch.uint8, generator=random)
        reward = torch.rand(shape, generator=random)
        row = (frame, never, torch.zeros(shape, dtype=torch.int64), reward, never, never, never, torch.zeros(shape))
        learner.replay.add(Transition(*(each.to(spec.device) for each in row)))
    learner.warm_up()
    return learner, settled, pack


def pipeline(name: str, learner: Learner, settled: dict[str, Any], pack: Pack) -> Pipeline:
    """Return an augmentation with its defaults for the same run."""
    section = catalogue.read_yaml(catalogue.options("augmentation", [catalogue.conf_folder()])[name])
    chosen = settled | {"augmentation": {name: section}}
    settled = chosen | {"augmentation": build_augmentation.resolve(chosen, pack)}
    return build_augmentation.make_augmentation(settled, pack, learner.agent, learner.replay.spec.device, ALONE)


def measure(env: str, options: argparse.Namespace, run_dir: str) -> list[dict[str, Any]]:
    """Return a row per augmentation."""
    learner, settled, pack = make_learner(env, options, run_dir)
    device, clock = learner.replay.spec.device, time.process_time if options.busy else time.perf_counter
    names = options.names or [name for name in catalogue.options("augmentation", [catalogue.conf_folder()]) if name != "none"]
    rows = []

    def timed(augmentation: Pipeline) -> float:
        learner.augmentation = augmentation
        return seconds(lambda: learner.update(ROWS), device, clock)

    none = Pipeline()
    for name in names:
        one = pipeline(name, learner, settled, pack)
        for _ in range(WARM_UPS):
            timed(one)
            timed(none)
        times = [(timed(one), timed(none)) for _ in range(max(2, options.pairs))]
        ratios = [mine / other for mine, other in times]
        rows.append(
            {
                "env": env,
                "name": name,
                "bar": bar_of(name),
                "milliseconds": 1000 * statistics.median(mine for mine, _ in times),
                "none_milliseconds": 1000 * statistics.median(other for _, other in times),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
        print(line(rows[-1]), file=sys.stderr)
    return rows


def line(row: dict[str, Any]) -> str:
    """Format a row."""
    verdict = f"at most {row['bar']}  {'met' if row['ratio'] <= row['bar'] else 'MISSED'}"
    spread = f"{row['least']:.2f} to {row['most']:.2f}"
    return (
        f"{row['env']:<14}{row['name']:<12}{row['milliseconds']:>8.1f} ms {row['none_milliseconds']:>8.1f} ms"
        f"{row['ratio']:>7.2f}  {spread:<14}{verdict}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Format all rows with a header."""
    titles = f"{'pack':<14}{'augmentation':<12}{'with':>11} {'without':>11}{'ratio':>7}  range"
    return "\n".join([titles, *map(line, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="augmentations (default: all)")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--env", choices=list(PACKS), help="pack (default: both)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--busy", action="store_true", help="measure CPU time of one thread, for a busy machine")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 1 and not options.busy:
        print(f"warning: the machine is busy (load {load:.1f}); the ratios are not reliable", file=sys.stderr)
    rows = []
    for env in [options.env] if options.env else PACKS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(env, options, f"{folder}/run")
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
