"""Playing whole games to see how good the network is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mtrl_cli.agents.acting import EpsilonGreedy
from mtrl_cli.envs.pack import Pack
from mtrl_cli.envs.scores import normalised
from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.metric_names import AGGREGATES, of_evaluation
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.stats.bootstrap import bootstrap_mean_ci, over_tasks
from mtrl_cli.training.frame_stack import FrameStack

# Games of one task that are played side by side.
_AT_ONCE = 32


@dataclass
class Games:
    """What one evaluation played.

    Attributes:
        returns: by task, one per episode, the game's own score.
        cut: by task, how many games were ended by the limit on steps.
        first: by task, seed and actions of the first game, from which it can be shown again.
    """

    returns: dict[str, list[float]]
    cut: dict[str, int]
    first: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


class Evaluator:
    """Plays `episodes` games of every task with seeds of their own and a small fixed epsilon.

    Args:
        pack: the tasks.
        episodes: games per task.
        max_steps: a longer game is cut and counts with what it has scored.
        epsilon: share of random actions.
        seed: of the games and of the random actions.
        num_threads: for the emulators.
        device: where the network is.
    """

    def __init__(self, pack: Pack, *, episodes: int, max_steps: int, epsilon: float, seed: int, num_threads: int, device: torch.device):
        self.pack, self.episodes, self.max_steps, self._epsilon = pack, episodes, max_steps, epsilon
        self.seed, self._num_threads, self._device = seed, num_threads, device

    def play(self, network: MultiTaskNetwork, check: Callable[[], None]) -> Games:
        """All games of all tasks in parallel; `check` is called between steps and may raise to stop."""
        names = [task.name for task in self.pack.tasks]
        games = Games({name: [] for name in names}, dict.fromkeys(names, 0))
        for wave, begun in enumerate(range(0, self.episodes, _AT_ONCE)):
            self._play_wave(network, check, games, wave, min(_AT_ONCE, self.episodes - begun))
        return games

    def _play_wave(self, network: MultiTaskNetwork, check: Callable[[], None], games: Games, wave: int, num_envs: int) -> None:
        pack, K = self.pack, len(self.pack.tasks)
        # Every environment plays one game: which games are played never depends on how long they take.
        envs = VectorTasks(pack, num_envs=num_envs, seed=self.seed, num_threads=self._num_threads, training=False, stream=f"eval{wave}")
        frame_dtype = torch.from_numpy(np.empty(0, pack.observation_dtype)).dtype
        frames = FrameStack(K, num_envs, pack.stack, pack.observation_shape, frame_dtype, self._device)
        actor = EpsilonGreedy(network, [task.num_actions for task in pack.tasks], self._device, self.seed + wave)
        epsilon_K = np.full(K, self._epsilon, np.float32)
        try:
            frames.push(torch.from_numpy(envs.reset()).to(self._device), torch.ones_like(frames.start))
            total: np.ndarray = np.zeros((K, num_envs))
            running: np.ndarray = np.ones((K, num_envs), bool)
            first_game: list[list[int]] = [[] for _ in range(K)]
            for _ in range(self.max_steps):
                check()
                action = actor.act(frames.observation, epsilon_K).cpu().numpy()
                for player in np.flatnonzero(running[:, 0]):
                    first_game[player].append(int(action[player, 0]))
                envs.send(action, np.asarray(running.any(1)))
                step = envs.recv()
                total += step.reward * running
                running &= ~step.done
                if not running.any():
                    break
                frames.push(torch.from_numpy(step.observation).to(self._device), torch.from_numpy(step.done).to(self._device))
            for k, task in enumerate(pack.tasks):
                games.returns[task.name] += [float(value) for value in total[k]]
                games.cut[task.name] += int(running[k].sum())
                if wave == 0:
                    games.first[task.name] = (envs.episode_seed(k, 0, 0), first_game[k])
        finally:
            envs.close()


def summarise(
    games: Games, pack: Pack, step: int, checkpoint: str, *, split: str = "validation", seed: int | None = None
) -> dict[str, Any]:
    """What `eval/<step>.json` holds: scores by task and over tasks, with 95% bootstrap intervals.

    `split`: "validation" for games by which checkpoints are chosen, "test" for others; `seed`: of the games.
    """
    tasks: dict[str, Any] = {}
    scores: dict[str, list[float]] = {}
    for task in pack.tasks:
        returns = games.returns[task.name]
        each = [normalised(value, task.random_score, task.reference_score) for value in returns]
        known = [score for score in each if score is not None]
        if known:
            scores[task.name] = known
        tasks[task.name] = {
            "mean": float(np.mean(returns)),
            "std": float(np.std(returns)),
            "returns": returns,
            "score": float(np.mean(known)) if known else None,
            "ci": list(bootstrap_mean_ci(returns)),
            "cut": games.cut[task.name],
        }
    return {
        "step": step,
        "checkpoint": checkpoint,
        "split": split,
        "seed": seed,
        "episodes": len(next(iter(games.returns.values()))),
        "tasks": tasks,
        "over_tasks": over_tasks(scores),
    }


def metrics(summary: dict[str, Any], prefix: str = "eval/") -> dict[str, float]:
    """An evaluation's metrics by name, such as eval/return/<task>."""
    found: dict[str, float] = {}
    for name, task in summary["tasks"].items():
        found[f"{prefix}return/{name}"] = task["mean"]
        if task["score"] is not None:
            found[f"{prefix}score/{name}"] = task["score"]
    return found | {f"{prefix}score/{name}": summary["over_tasks"][name] for name in AGGREGATES if summary["over_tasks"]}


def metric_names(pack: Pack) -> list[str]:
    """The names of the metrics that an evaluation of these tasks has."""
    scored = [task.name for task in pack.tasks if normalised(0.0, task.random_score, task.reference_score) is not None]
    return of_evaluation([task.name for task in pack.tasks], scored)


def ranking(summary: dict[str, Any]) -> float | None:
    """The number by which the best checkpoint is chosen: the mean normalised score; without any reference, a single task's own."""
    if summary["over_tasks"]:
        return summary["over_tasks"]["mean"]
    tasks = list(summary["tasks"].values())
    return tasks[0]["mean"] if len(tasks) == 1 else None
