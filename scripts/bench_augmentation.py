#!/usr/bin/env python3
"""What an augmentation costs: the time of an update with it over the time of an update without, side by side.

The learner of `mtrl train` with its sampling, targets, backward pass and optimizer, compiled, in the fastest precision here: on eight Atari
games (the Nature network, 32 samples each) and on MinAtar (as tuned: 128 samples of each of five games).

    pip install '.[minatar]'
    python scripts/bench_augmentation.py [--pairs 10] [--env atari_pack] [--device cpu] [--busy] [--json] [NAME ...]

Each metric is the median over pairs of one update with it and one without, in turns. With `--busy` one thread works and its CPU time is
taken, which other processes disturb less.
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
from mtrl_cli.training.learner import Learner

PACKS = {
    "atari_pack": ["agent.batch_size=32"],
    "minatar_pack": ["env.tasks=[asterix,breakout,seaquest,space_invaders]", "agent.batch_size=128"],
}
BARS = {"shift": 1.1}
BAR = 1.25
WARM_UPS, ROWS = 2, 40


def bar_of(name: str) -> float:
    """How many times as long an update with it may take."""
    return BARS.get(name, BAR)


def make_learner(env: str, options: argparse.Namespace, run_dir: str) -> tuple[Learner, dict[str, Any], Pack]:
    """The learner of a run, its replay filled with noise, its settled configuration, and its pack."""
    words = [f"env={env}", *PACKS[env], "replay.capacity=4000", f"device={options.device}", f"run_dir={run_dir}"]
    composed = compose.compose_training([*words, f"threads={1 if options.busy else 'auto'}"])
    # That no game is the same in a mirror does not matter here.
    composed["env"]["symmetric"] = composed["env"]["tasks"]
    pack = build_run.make_pack(composed)

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    settled = resolve_auto.settle(composed, pack, say)
    learner = build_run.make_run(settled, pack, say).learner
    spec, random = learner.replay.spec, torch.Generator().manual_seed(0)
    shape = (spec.num_tasks, spec.num_envs)
    never = torch.zeros(shape, dtype=torch.bool)
    for _ in range(ROWS):
        frame = torch.randint(int(pack.observation_scale) + 1, (*shape, *spec.frame_shape), dtype=torch.uint8, generator=random)
        reward = torch.rand(shape, generator=random)
        row = (frame, never, torch.zeros(shape, dtype=torch.int64), reward, never, never)
        learner.replay.add(*(each.to(spec.device) for each in row))
    learner.warm_up()
    return learner, settled, pack


def pipeline(name: str, learner: Learner, settled: dict[str, Any], pack: Pack) -> Pipeline:
    """One augmentation, with its defaults, for the same run."""
    section = catalogue.read_yaml(catalogue.options("augmentation", [catalogue.conf_folder()])[name])
    chosen = settled | {"augmentation": {name: section}}
    settled = chosen | {"augmentation": build_augmentation.settle(chosen, pack)}
    return build_augmentation.make_augmentation(settled, pack, learner.agent, learner.replay.spec.device, ALONE)


def measure(env: str, options: argparse.Namespace, run_dir: str) -> list[dict[str, Any]]:
    """A row for each augmentation."""
    learner, settled, pack = make_learner(env, options, run_dir)
    device, clock = learner.replay.spec.device, time.process_time if options.busy else time.perf_counter
    names = options.names or [name for name in catalogue.options("augmentation", [catalogue.conf_folder()]) if name != "none"]
    rows = []

    def timed(augmentation: Pipeline) -> float:
        learner._augmentation = augmentation
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
    """A row as text."""
    verdict = f"at most {row['bar']}  {'met' if row['ratio'] <= row['bar'] else 'MISSED'}"
    spread = f"{row['least']:.2f} to {row['most']:.2f}"
    return (
        f"{row['env']:<14}{row['name']:<12}{row['milliseconds']:>8.1f} ms {row['none_milliseconds']:>8.1f} ms"
        f"{row['ratio']:>7.2f}  {spread:<14}{verdict}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All rows under their titles."""
    titles = f"{'an update of':<14}{'with':<12}{'takes':>11} {'without':>11}{'ratio':>7}  over pairs"
    return "\n".join([titles, *map(line, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="augmentations; all where none is named")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--env", choices=list(PACKS), help="both where none is named")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--busy", action="store_true", help="one thread's CPU time, for a busy machine")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 1 and not options.busy:
        print(f"the machine is busy (load {load:.1f}): no ratio holds", file=sys.stderr)
    rows = []
    for env in [options.env] if options.env else PACKS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(env, options, f"{folder}/run")
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
