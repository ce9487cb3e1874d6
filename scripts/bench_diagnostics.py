#!/usr/bin/env python3
"""What the diagnostics of sharing take of a run's time at their default interval: at most 2% is the aim.

    python scripts/bench_diagnostics.py [classic_pack] [minatar_pack] [atari_pack] [--json]

Each pack is trained for a short while by the real command, with diagnostics more often than by default. The rows of its metrics.jsonl tell
the time of one look (the median) and the speed without it, and so the time that the steps of a default interval take.
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

# Of each pack: steps per task, those before learning starts, those from one look to the next.
SIZES = {"classic_pack": (20_000, 1000, 1000), "minatar_pack": (6000, 500, 500), "atari_pack": (800, 100, 100)}
AIM = 0.02


def mtrl_train(folder: str, *overrides: str) -> str:
    """What `mtrl train` prints; where it fails, its last words and the end of this script."""
    done = subprocess.run([sys.executable, "-m", "mtrl_cli", "train", *overrides], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mtrl train {' '.join(overrides)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def overrides(pack: str, run_dir: str) -> list[str]:
    """What the timed run is told."""
    steps, starts, every = SIZES[pack]
    lengths = [f"steps_per_task={steps}", f"agent.learning_starts={starts}", f"log.diagnostics={every}", f"log.every={every // 2}"]
    rare = ["eval.every=0", "eval.episodes=1", "eval.max_steps=10", "checkpoint.every=0", "checkpoint.replay=false"]
    return [f"env={pack}", f"run_dir={run_dir}", "replay.capacity=20000", *lengths, *rare]


def measure(pack: str, folder: str) -> dict[str, float]:
    """The time of one look, and that of a default interval."""
    config = yaml.safe_load(mtrl_train(folder, f"env={pack}", "--dry-run"))
    run_dir, tasks, every = tempfile.mkdtemp(dir=folder), len(config["env"]["tasks"]), config["log"]["diagnostics"]
    mtrl_train(folder, *overrides(pack, run_dir))
    rows: list[dict[str, Any]] = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    # What is done for the first time takes longer, as does an update.
    looks = [row["perf/seconds/diagnostics"] for row in rows if "perf/seconds/diagnostics" in row][1:]
    speed = steady_rates(rows, 2 * SIZES[pack][1], tasks, config["agent"]["batch_size"])["steps_per_second"]
    look, interval = statistics.median(looks), every * tasks / speed
    return {
        "look": look,
        "longest": max(looks),
        "looks": len(looks),
        "speed": speed,
        "every": every,
        "interval": interval,
        "share": look / interval,
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
    print(f"{'pack':<14}{'one look, s':>12}{'longest':>9}{'looks':>7}{'steps/s':>9}{'every':>8}{'interval, s':>13}{'share':>8}")
    for pack, its in result.items():
        line = f"{pack:<14}{its['look']:>12.3f}{its['longest']:>9.3f}{its['looks']:>7.0f}{its['speed']:>9,.0f}{its['every']:>8,.0f}"
        print(f"{line}{its['interval']:>13.1f}{its['share']:>8.2%} {'met' if its['share'] <= AIM else 'MISSED'}")


if __name__ == "__main__":
    main()
