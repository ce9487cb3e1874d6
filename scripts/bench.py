#!/usr/bin/env python3
"""Every figure that the project promises, measured in one run and printed beside its bar. (A bar missed is shown, not an error.)

Run it with `make bench`, or as `python scripts/bench.py [--rounds 3] [--json]`.
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

from bench_sb3 import table


class Figure(NamedTuple):
    """A measured value, and the bound that it is held against."""

    name: str
    value: float
    unit: str
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of its bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:,g}"
        return f"{self.name:<58}{self.value:>10,.4g} {self.unit:<6} {bound:<15} {'met' if self.met else 'MISSED'}"


def script(name: str, *arguments: str) -> Any:
    """What another script here prints as JSON; its progress goes to stderr."""
    command = [sys.executable, str(Path(__file__).with_name(name)), "--json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed")
    return json.loads(done.stdout)


def figures(startup: dict[str, float], memory: dict[str, float], ratio: dict[str, float], weights: list[dict[str, Any]]) -> list[Figure]:
    """All figures with their bars."""
    worst = [max((row for row in weights if row["needs"] == needs), key=lambda row: row["ratio"]) for needs in ("gram", "rows")]
    return [
        *(
            Figure(f"an update over uniform's, {row['name']}, the slowest of {row['needs']}", row["ratio"], "times", row["bar"], False)
            for row in worst
        ),
        Figure("steps/s over stable-baselines3's DQN, one game", ratio["mtrl, breakout"], "times", 2.2, True),
        Figure("steps/s over stable-baselines3's DQN, all eight games", ratio["mtrl, eight games"], "times", 2.0, True),
        Figure("resident memory per Atari transition", memory["bytes_per_transition"], "bytes", 7300, False),
        Figure("mtrl --help", startup["help"], "s", 0.5, False),
        Figure("mtrl train --dry-run", startup["dry_run"], "s", 1.5, False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns against stable-baselines3")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    startup = script("bench_startup.py")
    memory = script("bench_replay_memory.py")
    speed = script("bench_sb3.py", f"--rounds={options.rounds}")
    weights = script("bench_task_weights.py")
    from bench_task_weights import table as weights_table  # imports torch and the peers, which the figures above do without

    if options.json:
        print(json.dumps({"startup": startup, "memory": memory, "speed": speed, "task_weights": weights}))
        return
    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}\n")
    print(table(speed), end="\n\n")
    print(weights_table(weights), end="\n\n")
    for figure in figures(startup, memory, speed["ratio"], weights):
        print(figure)


if __name__ == "__main__":
    main()
