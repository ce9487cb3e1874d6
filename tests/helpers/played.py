"""Random steps of environments, and the test that a state restores them."""

from __future__ import annotations

import numpy as np

from mtrl_cli.envs.pack import Pack
from mtrl_cli.envs.vector_tasks import Step, VectorTasks


def start(pack: Pack, seed: int = 0) -> VectorTasks:
    return VectorTasks(pack, num_envs=2, seed=seed, num_threads=1, training=True, stream="test")


def random_actions(envs: VectorTasks, generator: np.random.Generator) -> np.ndarray:
    num_actions = np.array([[task.num_actions] for task in envs.tasks])
    return generator.integers(0, num_actions, envs.episodes.shape)


def play(envs: VectorTasks, steps: int, seed: int, with_inactive_tasks: bool = False) -> list[Step]:
    """Take random actions and return the steps."""
    generator = np.random.default_rng(seed)
    taken = []
    for _ in range(steps):
        active = generator.random(len(envs.tasks)) < 0.7 if with_inactive_tasks else None
        envs.send(random_actions(envs, generator), active)
        step = envs.recv()
        step.observation = step.observation.copy()
        taken.append(step)
    return taken


def assert_restores(envs: VectorTasks, resumed: VectorTasks, last: np.ndarray) -> None:
    """Restore `resumed` from the state of `envs` after the observation `last`, and assert that both continue identically."""
    state = envs.state_dict()
    assert np.array_equal(resumed.load_state_dict(state), last)
    for one, other in zip(play(envs, 60, seed=99), play(resumed, 60, seed=99), strict=True):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))
    assert all(np.array_equal(envs.state_dict()[key], resumed.state_dict()[key]) for key in state)
