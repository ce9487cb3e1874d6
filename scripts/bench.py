#!/usr/bin/env python3
"""Measure every performance target of the project and print the results. A missed target is shown, not an error.

make bench
python scripts/bench.py [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import bench_first_step
import bench_limit
import bench_sb3


class Measurement(NamedTuple):
    """A measured value and its target."""

    name: str
    value: float
    unit: str
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the value meets its target."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:,g}"
        return f"{self.name:<66}{self.value:>10,.4g} {self.unit:<6} {bound:<15} {'met' if self.met else 'MISSED'}"


def script(name: str, *arguments: str) -> Any:
    """Return the JSON that another script in this folder prints. Its progress goes to stderr."""
    command = [sys.executable, str(Path(__file__).with_name(name)), "--json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed")
    return json.loads(done.stdout)


def metrics(
    startup: dict[str, float],
    first_step: dict[str, dict[str, dict[str, float]]],
    memory: dict[str, float],
    ratio: dict[str, float],
    limit: dict[str, Any],
    weights: list[dict[str, Any]],
    augmentations: list[dict[str, Any]],
) -> list[Measurement]:
    """Return all measurements with their targets."""
    worst = [max((row for row in weights if row["needs"] == needs), key=lambda row: row["ratio"]) for needs in ("gram", "rows")]
    # The slowest augmentation per target; shift has its own.
    slowest = [
        max((row for row in augmentations if (row["env"], row["bar"]) == each), key=lambda row: row["ratio"])
        for each in dict.fromkeys((row["env"], row["bar"]) for row in augmentations)
    ]
    sides = limit["sides"]
    return [
        Measurement("speedup over stable-baselines3 DQN, one game", ratio["mtrl, breakout"], "times", 3.5, True),
        Measurement("speedup over stable-baselines3 DQN, all eight games", ratio["mtrl, eight games"], "times", 3.0, True),
        Measurement("speedup over stable-baselines3 DQN, pqn, one game", ratio["mtrl pqn, breakout"], "times", 5.5, True),
        *(Measurement(f"share of the limit, {side}", found["share"], "", 0.9, True) for side, found in sides.items()),
        Measurement("eight games relative to one game with as many environments", limit["eight_over_one"], "times", 0.9, True),
        Measurement("MinAtar, dqn at 8 samples per step", sides["minatar_pack"]["loop"], "steps/s", 4000, True),
        Measurement("MinAtar, pqn at 4 samples per step", sides["minatar_pack, pqn, 4 epochs"]["loop"], "steps/s", 10_000, True),
        *(
            Measurement(f"time to the first step, {pack}, {way}", found["first_step"], "s", bench_first_step.BARS[way], False)
            for pack, ways in first_step.items()
            for way, found in ways.items()
        ),
        *(
            Measurement(
                f"update time relative to uniform, {row['name']} (slowest of {row['needs']})", row["ratio"], "times", row["bar"], False
            )
            for row in worst
        ),
        *(
            Measurement(f"update time relative to no augmentation, {row['name']}, {row['env']}", row["ratio"], "times", row["bar"], False)
            for row in slowest
        ),
        Measurement("resident memory per Atari transition", memory["bytes_per_transition"], "bytes", 7300, False),
        Measurement("mtrl --help", startup["help"], "s", 0.5, False),
        Measurement("mtrl train --dry-run", startup["dry_run"], "s", 1.5, False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the speed measurements")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = {
        "startup": script("bench_startup.py"),
        "memory": script("bench_replay_memory.py"),
        "speed": script("bench_sb3.py", f"--rounds={options.rounds}"),
        "limit": script("bench_limit.py", f"--rounds={options.rounds}"),
        "first_step": script("bench_first_step.py"),
        "task_weights": script("bench_task_weights.py"),
        "augmentation": script("bench_augmentation.py"),
    }
    from bench_augmentation import table as augmentation_table
    from bench_task_weights import table as weights_table  # imports torch and TorchJD, which the measurements above do not need

    if options.json:
        print(json.dumps(found))
        return
    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}\n")
    print(bench_sb3.table(found["speed"]), end="\n\n")
    print(bench_limit.table(found["limit"]), end="\n\n")
    print(bench_first_step.table(found["first_step"]), end="\n\n")
    print(weights_table(found["task_weights"]), end="\n\n")
    print(augmentation_table(found["augmentation"]), end="\n\n")
    startup, first_step, memory, ratio = found["startup"], found["first_step"], found["memory"], found["speed"]["ratio"]
    for metric in metrics(startup, first_step, memory, ratio, found["limit"], found["task_weights"], found["augmentation"]):
        print(metric)


if __name__ == "__main__":
    main()
