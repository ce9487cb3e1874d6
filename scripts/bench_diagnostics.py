#!/usr/bin/env python3
"""Measure the share of run time that the sharing diagnostics take at their default interval. The target is at most 2%.

    python scripts/bench_diagnostics.py [classic_pack] [minatar_pack] [atari_pack] [--json]

Each pack is trained briefly with the real command and with more frequent diagnostics. The rows of metrics.jsonl give the median time of
one computation and the speed without it, from which the share at the default interval follows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bench_sb3 import steady_rates

# Per pack: steps per task, steps before learning starts, steps between diagnostics.
SIZES = {"classic_pack": (20_000, 1000, 1000), "minatar_pack": (6000, 500, 500), "atari_pack": (800, 100, 100)}
TARGET = 0.02


def mtrl_train(folder: str, *overrides: str) -> str:
    """Return the output of `mtrl train`. Exit with its error if it fails."""
    done = subprocess.run([sys.executable, "-m", "mtrl_cli", "train", *overrides], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mtrl train {' '.join(overrides)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def overrides(pack: str, run_dir: str) -> list[str]:
    """Return the overrides of the timed run."""
    steps, starts, every = SIZES[pack]
    lengths = [f"steps_per_task={steps}", f"agent.learning_starts={starts}", f"log.diagnostics={every}", f"log.every={every // 2}"]
    rare = ["eval.every=0", "eval.episodes=1", "eval.max_steps=10", "checkpoint.every=0", "checkpoint.replay=false"]
    return [f"env={pack}", f"run_dir={run_dir}", "replay.capacity=20000", *lengths, *rare]


def measure(pack: str, folder: str) -> dict[str, float]:
    """Return the time of one computation and of a default interval, and their ratio."""
    config = yaml.safe_load(mtrl_train(folder, f"env={pack}", "--dry-run"))
    run_dir, tasks, every = tempfile.mkdtemp(dir=folder), len(config["env"]["tasks"]), config["log"]["diagnostics"]
    mtrl_train(folder, *overrides(pack, run_dir))
    rows: list[dict[str, Any]] = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    # The first computation includes warm-up.
    times = [row["perf/seconds/diagnostics"] for row in rows if "perf/seconds/diagnostics" in row][1:]
    speed = steady_rates(rows, 2 * SIZES[pack][1], tasks, config["agent"]["batch_size"])["steps_per_second"]
    median, interval = statistics.median(times), every * tasks / speed
    return {
        "median": median,
        "longest": max(times),
        "count": len(times),
        "speed": speed,
        "every": every,
        "interval": interval,
        "share": median / interval,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="*", choices=[[], *SIZES], default=[], metavar="pack", help="default: all three")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {pack: measure(pack, folder) for pack in options.packs or SIZES}
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'pack':<14}{'median, s':>12}{'longest':>9}{'count':>7}{'steps/s':>9}{'every':>8}{'interval, s':>13}{'share':>8}")
    for pack, row in result.items():
        line = f"{pack:<14}{row['median']:>12.3f}{row['longest']:>9.3f}{row['count']:>7.0f}{row['speed']:>9,.0f}{row['every']:>8,.0f}"
        print(f"{line}{row['interval']:>13.1f}{row['share']:>8.2%} {'met' if row['share'] <= TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
