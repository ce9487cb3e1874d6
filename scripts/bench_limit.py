#!/usr/bin/env python3
"""Measure how close `mtrl` is to the limit of the machine, with `mtrl bench`: Atari with eight games and with one game and as many
environments, MinAtar, DQN and PQN. Results are medians over rounds.

    python scripts/bench_limit.py [--rounds 3] [--seconds 20] [--device auto] [--json]
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

from bench_startup import environment

EIGHT, ONE_GAME = "atari_pack, eight games x 8", "atari_pack, breakout x 64"
SIDES = {
    EIGHT: ["env=atari_pack"],
    ONE_GAME: ["env=atari_pack", "env.tasks=[breakout]", "env.num_envs=64"],
    "atari_pack, pqn": ["env=atari_pack", "agent=pqn"],
    "minatar_pack": ["env=minatar_pack"],
    "minatar_pack, pqn, 4 epochs": ["env=minatar_pack", "agent=pqn", "agent.epochs=4"],
}


def bench(overrides: list[str], seconds: float, folder: str) -> dict[str, Any]:
    """Return the JSON that `mtrl bench` prints."""
    command = [str(Path(sys.executable).parent / "mtrl"), "bench", *overrides, "--json", f"--seconds={seconds:g}"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(rounds: int, seconds: float, device: str) -> dict[str, Any]:
    """Return medians over rounds for every configuration, and the share of the limit in each round."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            print(f"limit: round {number + 1} of {rounds}", file=sys.stderr)
            for side, overrides in SIDES.items():
                found[side].append(bench([*overrides, f"device={device}"], seconds, folder))
    numbers = ("emulators", "acting", "learning", "limit", "loop", "share")
    medians = {side: {name: statistics.median(each[name] for each in rows) for name in numbers} for side, rows in found.items()}
    by_round = [many["loop"] / one["loop"] for many, one in zip(found[EIGHT], found[ONE_GAME], strict=True)]
    return {
        "sides": medians,
        "share_by_round": {side: [row["share"] for row in rows] for side, rows in found.items()},
        "eight_over_one": statistics.median(by_round),
        "eight_over_one_by_round": by_round,
    }


def table(result: dict[str, Any]) -> str:
    """Format the results."""
    names = ("emulators", "acting", "learning", "limit", "loop")
    lines = [f"{'steps/s, medians':<30}" + "".join(f"{name:>11}" for name in names) + f"{'share':>8}   share by round"]
    for side, metrics in result["sides"].items():
        by_round = " ".join(f"{share:.2f}" for share in result["share_by_round"][side])
        lines.append(f"{side:<30}" + "".join(f"{metrics[name]:>11,.0f}" for name in names) + f"{metrics['share']:>8.2f}   {by_round}")
    by_round = " ".join(f"{ratio:.2f}" for ratio in result["eight_over_one_by_round"])
    lines.append(f"eight games relative to one game with as many environments: {result['eight_over_one']:.2f}   by round {by_round}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="measuring time of each mtrl bench")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.rounds, options.seconds, options.device)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
