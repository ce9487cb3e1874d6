"""Measure uniform random play on the classic and MinAtar packs, and write the scores with the cited references.

    python scripts/measure_reference_scores.py             print the table
    python scripts/measure_reference_scores.py --write     replace mtrl_cli/envs/data/other_scores.csv

Each of 16 environments runs the same number of complete episodes. Using the first episodes to end would favor short ones.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from mtrl_cli.envs.gymnasium import GymnasiumPack
from mtrl_cli.envs.minatar import GAMES, MinAtarPack
from mtrl_cli.envs.pack import Pack
from mtrl_cli.envs.vector_tasks import VectorTasks

TABLE = Path(__file__).parent.parent / "mtrl_cli/envs/data/other_scores.csv"
NUM_ENVS = 16

THRESHOLD = "reference: reward_threshold in gymnasium's registry"
LEARNING_CURVE = "reference: DQN after 5M frames, read off MinAtar's published learning curves (sticky 0.1, difficulty ramp, 30 seeds)"
REFERENCES = {
    ("gymnasium", "CartPole-v1"): (475.0, THRESHOLD),
    ("gymnasium", "Acrobot-v1"): (-100.0, THRESHOLD),
    ("gymnasium", "MountainCar-v0"): (-110.0, THRESHOLD),
    ("minatar", "asterix"): (16.5, LEARNING_CURVE),
    ("minatar", "breakout"): (10.0, LEARNING_CURVE),
    ("minatar", "freeway"): (50.0, LEARNING_CURVE),
    ("minatar", "seaquest"): (20.0, f"{LEARNING_CURVE}; of MinAtar 1.0.10: newer versions may differ"),
    ("minatar", "space_invaders"): (43.0, LEARNING_CURVE),
}


def random_returns(pack: Pack, episodes_per_env: int, seed: int) -> list[np.ndarray]:
    """Return the returns of `NUM_ENVS * episodes_per_env` episodes of uniform random play per task."""
    played = VectorTasks(pack, num_envs=NUM_ENVS, seed=seed, num_threads=1, training=False, stream="random-scores")
    played.reset()
    generator = np.random.default_rng(seed)
    shape = len(pack.tasks), NUM_ENVS
    num_actions = np.array([[task.num_actions] for task in pack.tasks])
    sums = np.zeros(shape)
    returns: list[list[float]] = [[] for _ in pack.tasks]
    active = np.ones(len(pack.tasks), bool)
    while active.any():
        played.send(generator.integers(0, num_actions, shape), active)
        step = played.recv()
        sums += step.reward
        for task, env in np.argwhere(step.done):
            if played.episodes[task, env] <= episodes_per_env:
                returns[task].append(sums[task, env])
            sums[task, env] = 0
        active = played.episodes.min(axis=1) < episodes_per_env
    played.close()
    return [np.array(each) for each in returns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1024, help="episodes per task (default 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    options = parser.parse_args()
    classic = [task for suite, task in REFERENCES if suite == "gymnasium"]
    packs: dict[str, Pack] = {
        "gymnasium": GymnasiumPack(name="classic_pack", tasks=classic, num_envs=NUM_ENVS),
        "minatar": MinAtarPack(name="minatar_pack", tasks=list(GAMES), num_envs=NUM_ENVS),
    }
    rows = []
    for suite, pack in packs.items():
        for task, returns in zip(pack.tasks, random_returns(pack, options.episodes // NUM_ENVS, options.seed), strict=True):
            reference, source = REFERENCES[suite, task.name]
            error = returns.std(ddof=1) / len(returns) ** 0.5
            print(f"{suite:10} {task.name:16} random {returns.mean():9.3f} ± {error:.3f} ({len(returns)} episodes)  reference {reference}")
            measured = f"random: mean of {len(returns)} episodes of uniform random play (standard error {error:.3f})"
            rows.append([suite, task.name, f"{returns.mean():.3f}", reference, f"{measured}; {source}"])
    if options.write:
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["suite", "task", "random", "reference", "source"], *rows])


if __name__ == "__main__":
    main()
