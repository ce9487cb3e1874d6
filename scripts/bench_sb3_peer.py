#!/usr/bin/env python3
"""The stable-baselines3 side of bench_sb3.py: DQN on one Atari game, timed after learning has started. Prints one JSON object.

The hyperparameters are those of RL Zoo (batch 32 every 4 steps: 8 replayed samples per step), except for a small buffer and a
constant exploration rate, so that the speed is constant. Needs only stable-baselines3, ale-py and OpenCV.

    python scripts/bench_sb3_peer.py --game Breakout --steps 3000
"""

from __future__ import annotations

import argparse
import json
import time

import ale_py
import gymnasium
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

BATCH, TRAIN_EVERY = 32, 4


class Timer(BaseCallback):
    """Time the steps after `first` and count the updates."""

    def __init__(self, model: DQN, first: int):
        super().__init__()
        self._model, self._first = model, first
        self._seconds_at_first = 0.0
        self._updates_at_first = 0

    def _on_step(self) -> bool:
        if self.num_timesteps == self._first:
            self._seconds_at_first = time.perf_counter()
            self._updates_at_first = self._model._n_updates
        return True

    def result(self) -> dict[str, float]:
        """Return the rates since `first`."""
        seconds = time.perf_counter() - self._seconds_at_first
        steps, updates = self._model.num_timesteps - self._first, self._model._n_updates - self._updates_at_first
        return {
            "steps_per_second": steps / seconds,
            "updates_per_second": updates / seconds,
            "samples_per_step": updates * BATCH / steps,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", default="Breakout", help="name in ale-py")
    parser.add_argument("--steps", type=int, default=3000, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=500, help="learning steps before the timed steps")
    parser.add_argument("--learning-starts", type=int, default=1000)
    parser.add_argument("--capacity", type=int, default=10_000)
    parser.add_argument("--epsilon", type=float, default=0.05)
    options = parser.parse_args()

    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env(f"{options.game}NoFrameskip-v4", n_envs=1, seed=0), n_stack=4)
    model = DQN(
        "CnnPolicy",
        env,
        learning_rate=1e-4,
        buffer_size=options.capacity,
        batch_size=BATCH,
        train_freq=TRAIN_EVERY,
        gradient_steps=1,
        learning_starts=options.learning_starts,
        target_update_interval=1000,
        exploration_initial_eps=options.epsilon,
        exploration_final_eps=options.epsilon,
        seed=0,
    )
    first = options.learning_starts + options.warm_up
    timer = Timer(model, first)
    model.learn(first + options.steps, callback=timer)
    print(json.dumps(timer.result()))


if __name__ == "__main__":
    main()
