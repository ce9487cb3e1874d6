#!/usr/bin/env python3
"""Measure the resident memory per Atari transition of a full replay: the growth of the process divided by the transitions.

python scripts/bench_replay_memory.py [--transitions 100000] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mtrl_cli.replay.buffers import ReplaySpec, Transition, UniformReplay

GAMES, ENVS = 8, 8
EPISODE_STEPS = 500


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux) without pages of libraries, which vary."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def fill(replay: UniformReplay, rows: int) -> None:
    """Add `rows` rows of random frames, in episodes of EPISODE_STEPS."""
    shape = (GAMES, ENVS)
    frame = torch.empty((*shape, 84, 84), dtype=torch.uint8)
    never = torch.zeros(shape, dtype=torch.bool)
    for row in range(rows):
        frame.random_(0, 256)
        start, end = row % EPISODE_STEPS == 0, row % EPISODE_STEPS == EPISODE_STEPS - 1
        action, reward = torch.randint(4, shape), torch.randn(shape)
        ends = never | end
        replay.add(Transition(frame, never | start, action, reward, ends, never, ends, torch.zeros(shape)))


def measure(transitions: int) -> float:
    """Return the bytes per transition after the ring buffer has wrapped around and a batch was sampled."""
    spec = ReplaySpec(
        num_tasks=GAMES,
        num_envs=ENVS,
        frame_shape=(84, 84),
        dtype=torch.uint8,
        stack=4,
        n_step=3,
        device=torch.device("cpu"),
        seed=0,
        total_steps=1,
    )
    per_task = transitions // GAMES
    warm = UniformReplay(spec, capacity=20 * ENVS)  # excludes memory that torch allocates at its first operations
    fill(warm, 20)
    warm.sample(32, 0)
    before = resident_bytes()
    replay = UniformReplay(spec, capacity=per_task)
    fill(replay, replay.capacity_rows + replay.capacity_rows // 10)
    replay.sample(32, 0)
    return (resident_bytes() - before) / (replay.transitions * GAMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=100_000, help="total over all eight games")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    metric = measure(options.transitions)
    if options.json:
        print(json.dumps({"bytes_per_transition": metric}))
        return
    print(f"{metric:,.0f} bytes per Atari transition, {options.transitions:,} transitions of {GAMES} games")


if __name__ == "__main__":
    main()
