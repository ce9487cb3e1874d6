#!/usr/bin/env python3
"""Compare the speed with stable-baselines3's DQN at equal work: the same game, the Nature network with a plain head, no double
Q-learning, one-step returns, 8 replayed samples per step. The sides run in alternation, each in its own process; results are
medians over rounds. In addition `agent=pqn` on the same game, at 4 samples per step (4 epochs), with its LayerNorm.

    pip install '.[bench]'
    python scripts/bench_sb3.py [--rounds 3] [--steps 4096] [--json]

`mtrl train` is the real command with logging. The rates come from the rows of metrics.jsonl after learning has started and the update
is compiled. Evaluation and checkpoints happen only at the end. The machine's speed drifts, so compare only ratios within one call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_startup import environment

SAMPLES_PER_STEP = 8
CAPACITY = 10_000  # total transitions, for both sides
LEARNING_STARTS, WARM_UP = 1000, 1000  # total steps
EPSILON = 0.05
ROWS = 8  # of metrics.jsonl, in the timed part


@dataclass(frozen=True)
class Side:
    """One configuration.

    Attributes:
        name: name in the table.
        games: `env.tasks`.
        batch_size: samples per task and update.
        agent: `agent`.
    """

    name: str
    games: tuple[str, ...]
    batch_size: int
    agent: str = "dqn"


GAMES = ("pong", "breakout", "space_invaders", "seaquest", "beam_rider", "qbert", "enduro", "freeway")
PEER = Side("stable-baselines3, breakout", ("breakout",), 32)
ONE = Side("mtrl, breakout", ("breakout",), 128)
ALL = Side("mtrl, eight games", GAMES, 32)
# 16 environments, rollouts of 32 steps, 4 minibatches per epoch: 128 samples each.
PQN = Side("mtrl pqn, breakout", ("breakout",), 16 * 32 // 4, "pqn")
SIDES = (PEER, ONE, ALL, PQN)


def run(command: list[str], folder: str) -> str:
    """Return the stdout of a command. Exit with its error if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def time_peer(steps: int, folder: str) -> dict[str, float]:
    """Measure stable-baselines3 in a separate process."""
    script = Path(__file__).with_name("bench_sb3_peer.py")
    sizes = {"steps": steps, "capacity": CAPACITY, "learning-starts": LEARNING_STARTS, "epsilon": EPSILON}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    result: dict[str, float] = json.loads(run([sys.executable, str(script), *words], folder).splitlines()[-1])
    return result


def overrides(side: Side, steps: int, run_dir: str) -> list[str]:
    """Return the overrides of `mtrl train`."""
    tasks = len(side.games)
    of_dqn = {
        "agent.double": "false",
        "agent.n_step": 1,
        "agent.samples_per_step": SAMPLES_PER_STEP,
        "agent.batch_size": side.batch_size,
        "agent.learning_starts": LEARNING_STARTS // tasks,
        "replay.capacity": CAPACITY // tasks,
    }
    of_pqn = {"agent": "pqn", "env.num_envs": 16, "agent.rollout_length": 32, "agent.minibatches": 4, "agent.epochs": 4}
    values = {
        "env": "atari_pack",
        "network": "nature",
        "network/head": "plain",
        "env.tasks": f"[{','.join(side.games)}]",
        "env.protocol": "nature",
        "agent.epsilon_start": EPSILON,
        "agent.epsilon_end": EPSILON,
        **(of_pqn if side.agent == "pqn" else of_dqn),
        "steps_per_task": (LEARNING_STARTS + WARM_UP + steps) // tasks,
        "log.every": steps // tasks // ROWS,
        "eval.every": 0,
        "eval.episodes": 1,
        "eval.max_steps": 10,
        "checkpoint.every": 0,
        "checkpoint.replay": "false",
        "run_dir": run_dir,
    }
    return [f"{key}={value}" for key, value in values.items()]


def time_mtrl(side: Side, steps: int, folder: str) -> dict[str, float]:
    """Measure `mtrl train` in a separate process, from the rows of metrics.jsonl."""
    run_dir = tempfile.mkdtemp(dir=folder)
    run([str(Path(sys.executable).parent / "mtrl"), "train", *overrides(side, steps, run_dir)], folder)
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    tasks = len(side.games)
    return steady_rates(rows, (LEARNING_STARTS + WARM_UP) // tasks, tasks, side.batch_size)


def steady_rates(rows: list[dict[str, Any]], skipped: int, tasks: int, batch_size: int) -> dict[str, float]:
    """Return rates over the rows that begin at or after step `skipped` (per task): total work divided by total time."""
    timed = [row for row in rows if "perf/steps_per_second" in row]
    pairs = [(before, after) for before, after in pairwise(timed) if before["step"] >= skipped]
    steps = [(after["step"] - before["step"]) * tasks for before, after in pairs]
    seconds = sum(count / after["perf/steps_per_second"] for count, (_, after) in zip(steps, pairs, strict=True))
    updates = pairs[-1][1]["updates"] - pairs[0][0]["updates"]
    return {
        "steps_per_second": sum(steps) / seconds,
        "updates_per_second": updates / seconds,
        "samples_per_step": updates * batch_size * tasks / sum(steps),
    }


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Measure all sides in alternation, `rounds` times. Returns the rates of each round and the ratios to stable-baselines3."""
    if (load := os.getloadavg()[0]) > 1:
        print(f"warning: the machine is busy (load {load:.1f}); the ratios are not reliable", file=sys.stderr)
    rates: dict[str, list[dict[str, float]]] = {side.name: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            rates[PEER.name].append(time_peer(steps, folder))
            for side in SIDES[1:]:
                rates[side.name].append(time_mtrl(side, steps, folder))
    speeds = {name: [rate["steps_per_second"] for rate in found] for name, found in rates.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "sides": rates,
        "ratio": {name: median / medians[PEER.name] for name, median in medians.items()},
        "ratio_by_round": {name: [a / b for a, b in zip(values, speeds[PEER.name], strict=True)] for name, values in speeds.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Format the results."""
    lines = [f"{'medians':<30}{'batch':>9}{'samples/step':>14}{'updates/s':>11}{'steps/s':>9}{'ratio':>7}   ratio by round"]
    for side in SIDES:
        keys = ("samples_per_step", "updates_per_second", "steps_per_second")
        samples, updates, steps = (statistics.median(rate[key] for rate in result["sides"][side.name]) for key in keys)
        batch, ratio = f"{len(side.games)} x {side.batch_size}", result["ratio"][side.name]
        by_round = " ".join(f"{each:.2f}" for each in result["ratio_by_round"][side.name])
        lines.append(f"{side.name:<30}{batch:>9}{samples:>14.2f}{updates:>11.1f}{steps:>9.1f}{ratio:>7.2f}   {by_round}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4096, help="timed steps per side and round, over all games")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.rounds, options.steps)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
