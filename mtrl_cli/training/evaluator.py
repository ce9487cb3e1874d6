"""Evaluation of a network on complete episodes."""

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

# Parallel episodes of one task.
_AT_ONCE = 32


@dataclass
class Episodes:
    """Episodes of one evaluation.

    Attributes:
        returns: unscaled returns of the episodes, by task.
        cut: number of episodes truncated at `max_steps`, by task.
        first: seed and actions of each task's first episode, to replay the episode.
    """

    returns: dict[str, list[float]]
    cut: dict[str, int]
    first: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


class Evaluator:
    """Evaluates networks on `episodes` episodes of every task, with separate seeds and a small fixed epsilon.

    Args:
        pack: the tasks.
        episodes: number of episodes per task.
        max_steps: limit on the steps of an episode. The return of a longer episode is the return up to the limit.
        epsilon: probability of a random action.
        seed: seed of the episodes and of the random actions.
        num_threads: number of threads of the emulators.
        device: device of the network.
    """

    def __init__(self, pack: Pack, *, episodes: int, max_steps: int, epsilon: float, seed: int, num_threads: int, device: torch.device):
        self.pack = pack
        self.episodes = episodes
        self.max_steps = max_steps
        self.seed = seed
        self._epsilon = epsilon
        self._num_threads = num_threads
        self._device = device

    def run(self, network: MultiTaskNetwork, check: Callable[[], None]) -> Episodes:
        """Run the episodes of all tasks in parallel. `check` is called between steps and may raise an exception to stop."""
        names = [task.name for task in self.pack.tasks]
        episodes = Episodes({name: [] for name in names}, dict.fromkeys(names, 0))
        for wave, start in enumerate(range(0, self.episodes, _AT_ONCE)):
            self._play_wave(network, check, episodes, wave, min(_AT_ONCE, self.episodes - start))
        return episodes

    def _play_wave(self, network: MultiTaskNetwork, check: Callable[[], None], episodes: Episodes, wave: int, num_envs: int) -> None:
        pack, K = self.pack, len(self.pack.tasks)
        # One episode per environment, so that no episode depends on the lengths of other episodes.
        envs = VectorTasks(pack, num_envs=num_envs, seed=self.seed, num_threads=self._num_threads, training=False, stream=f"eval{wave}")
        frame_dtype = torch.from_numpy(np.empty(0, pack.observation_dtype)).dtype
        frames = FrameStack(K, num_envs, pack.stack, pack.observation_shape, frame_dtype, self._device)
        actor = EpsilonGreedy(network, [task.num_actions for task in pack.tasks], self._device, self.seed + wave)
        epsilon_K = np.full(K, self._epsilon, np.float32)
        try:
            frames.push(torch.from_numpy(envs.reset()).to(self._device), torch.ones_like(frames.start))
            total: np.ndarray = np.zeros((K, num_envs))
            running: np.ndarray = np.ones((K, num_envs), bool)
            first_actions: list[list[int]] = [[] for _ in range(K)]
            for _ in range(self.max_steps):
                check()
                action = actor.act(frames.observation, epsilon_K).cpu().numpy()
                for index in np.flatnonzero(running[:, 0]):
                    first_actions[index].append(int(action[index, 0]))
                envs.send(action, np.asarray(running.any(1)))
                step = envs.recv()
                total += step.reward * running
                running &= ~step.done
                if not running.any():
                    break
                frames.push(torch.from_numpy(step.observation).to(self._device), torch.from_numpy(step.done).to(self._device))
            for k, task in enumerate(pack.tasks):
                episodes.returns[task.name] += [float(value) for value in total[k]]
                episodes.cut[task.name] += int(running[k].sum())
                if wave == 0:
                    episodes.first[task.name] = (envs.episode_seed(k, 0, 0), first_actions[k])
        finally:
            envs.close()


def summarise(
    episodes: Episodes, pack: Pack, step: int, checkpoint: str, *, split: str = "validation", seed: int | None = None
) -> dict[str, Any]:
    """Compute the content of `eval/<step>.json`: scores by task and over tasks, with 95% bootstrap intervals.

    Args:
        episodes: episodes of the evaluation.
        pack: the tasks.
        step: step of the checkpoint, per task.
        checkpoint: name of the checkpoint.
        split: "validation" for episodes that select checkpoints, "test" for others.
        seed: seed of the episodes.
    """
    tasks: dict[str, Any] = {}
    scores: dict[str, list[float]] = {}
    for task in pack.tasks:
        returns = episodes.returns[task.name]
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
            "cut": episodes.cut[task.name],
        }
    return {
        "step": step,
        "checkpoint": checkpoint,
        "split": split,
        "seed": seed,
        "episodes": len(next(iter(episodes.returns.values()))),
        "tasks": tasks,
        "over_tasks": over_tasks(scores),
    }


def metrics(summary: dict[str, Any], prefix: str = "eval/") -> dict[str, float]:
    """Return the metrics of an evaluation by name, such as eval/return/<task>."""
    found: dict[str, float] = {}
    for name, task in summary["tasks"].items():
        found[f"{prefix}return/{name}"] = task["mean"]
        if task["score"] is not None:
            found[f"{prefix}score/{name}"] = task["score"]
    return found | {f"{prefix}score/{name}": summary["over_tasks"][name] for name in AGGREGATES if summary["over_tasks"]}


def metric_names(pack: Pack) -> list[str]:
    """Return the names of the metrics of an evaluation of the tasks."""
    scored = [task.name for task in pack.tasks if normalised(0.0, task.random_score, task.reference_score) is not None]
    return of_evaluation([task.name for task in pack.tasks], scored)


def ranking(summary: dict[str, Any]) -> float | None:
    """Return the score that selects the best checkpoint: the mean normalized score, or the mean return of a single task without one."""
    if summary["over_tasks"]:
        return summary["over_tasks"]["mean"]
    tasks = list(summary["tasks"].values())
    return tasks[0]["mean"] if len(tasks) == 1 else None
