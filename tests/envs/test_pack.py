"""Packs and `VectorTasks`: padding, seeds, and exact restoration of all environments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtrl_cli.envs.pack import Pack, Task, check_names, padded_shape
from mtrl_cli.envs.serial import SerialVectorTask
from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.errors import RunError, UserError
from tests.helpers.played import assert_restores, play, random_actions


def task(name: str, shape: tuple[int, ...] = (3,), num_actions: int = 2) -> Task:
    return Task(name, shape, num_actions, tuple(map(str, range(num_actions))), 1, None, None)


class Dice:
    """Environment whose numbers depend on the last seed and all actions since. It ends at random.

    Attributes:
        steps: steps since the last seed.
        seeds: all seeds so far.
    """

    def __init__(self, shape: tuple[int, ...], ends: float) -> None:
        self.shape, self.ends = shape, ends
        self.steps, self.sum = 0, 0
        self.generator = np.random.default_rng()
        self.seeds: list[int] = []
        self.over = True

    def reset(self, seed: int | None) -> np.ndarray:
        if seed is not None:
            self.generator = np.random.default_rng(seed)
            self.steps, self.sum = 0, 0
            self.seeds.append(seed)
        self.over = False
        return self.generator.random(self.shape) + self.sum

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        assert not self.over, "stepped past the end"
        self.steps += 1
        self.sum = (31 * self.sum + action) % 1009
        throw = self.generator.random()
        terminated, truncated = bool(throw < self.ends), bool(self.ends <= throw < 1.5 * self.ends)
        self.over = terminated or truncated
        return self.generator.random(self.shape) + self.sum, 2.5 * action, terminated, truncated

    def close(self) -> None:
        self.over = True


class DicePack(Pack):
    observation_kind = "vector"

    def __init__(self, tasks: list[Task], ends: float = 0.05, steps_between_seeds: int = 0) -> None:
        super().__init__(name="dice", tasks=tasks, num_envs=3, observation_dtype=np.float32)
        self.ends, self.steps_between_seeds = ends, steps_between_seeds
        self.envs: dict[str, list[Dice]] = {}

    def vector(self, task_index: int, num_envs: int, num_threads: int, training: bool) -> SerialVectorTask:
        shape = self.tasks[task_index].observation_shape
        envs = self.envs[self.tasks[task_index].name] = [Dice(shape, self.ends) for _ in range(num_envs)]
        return SerialVectorTask(envs, shape, self.observation_dtype)


TASKS = [task("a", (3,), 2), task("b", (5,), 4), task("c", (1,), 3)]


def make(tasks: list[Task] = TASKS, ends: float = 0.05, steps_between_seeds: int = 0, **options: Any) -> VectorTasks:
    options = {"num_envs": 3, "seed": 7, "num_threads": 1, "training": True, "stream": "train", **options}
    return VectorTasks(DicePack(tasks, ends, steps_between_seeds), **options)


@pytest.mark.parametrize("steps_between_seeds", [0, 20, 1000])
@pytest.mark.parametrize("trial", range(12))
def test_state_taken_at_any_step_restores_everything(trial: int, steps_between_seeds: int) -> None:
    options = {"ends": [0.3, 0.05, 0.004][trial % 3], "seed": trial, "steps_between_seeds": steps_between_seeds}
    uninterrupted = make(**options)
    last = uninterrupted.reset()
    if steps := play(uninterrupted, steps=trial * 7, seed=trial, with_inactive_tasks=trial % 2 == 0):
        last = steps[-1].observation
    state = uninterrupted.state_dict()
    resumed = make(**options)
    observation = resumed.load_state_dict(state)
    for name in resumed.pack.envs:  # type: ignore[attr-defined]
        lengths = state["lengths"][[each.name for each in TASKS].index(name)]
        assert [env.steps for env in resumed.pack.envs[name]] == lengths.tolist()  # type: ignore[attr-defined]
    assert_restores(uninterrupted, resumed, last if trial % 2 else observation)  # inactive tasks return zeros


@pytest.mark.parametrize("ends", [0.0, 0.05])
def test_state_holds_all_actions_since_the_seed(ends: float) -> None:
    played = make(ends=ends, steps_between_seeds=2000)
    played.reset()
    steps = play(played, steps=1500, seed=0)
    state = played.state_dict()
    assert state["lengths"].tolist() == [[1500] * 3] * 3
    assert state["seeded_episode"].tolist() == [[0] * 3] * 3
    assert state["episode"].tolist() == np.sum([step.done for step in steps], axis=0).tolist()
    env = Dice((5,), ends)
    env.reset(played.episode_seed(1, 2, 0))
    actions = state["actions"].reshape(3, 3, 1500)[1, 2]
    for action, step in zip(actions.tolist(), steps, strict=True):
        seen = env.step(action)[0]
        if step.done[1, 2]:
            seen = env.reset(None)
        assert np.array_equal(seen.astype(np.float32), step.observation[1, 2])


@pytest.mark.parametrize("steps_between_seeds", [0, 1, 30, 90])
def test_episode_is_seeded_after_steps_between_seeds(steps_between_seeds: int) -> None:
    played = make(ends=0.1, steps_between_seeds=steps_between_seeds)
    played.reset()
    done = np.array([step.done for step in play(played, steps=400, seed=0)])
    for k, n in np.ndindex(3, 3):
        seeds, last, ended = [played.episode_seed(k, n, 0)], 0, 0
        for step in np.flatnonzero(done[:, k, n]) + 1:
            ended += 1
            if step - last >= steps_between_seeds:
                seeds.append(played.episode_seed(k, n, ended))
                last = step
        assert played.pack.envs[TASKS[k].name][n].seeds == seeds  # type: ignore[attr-defined]
        assert played.episodes[k, n] == ended
        assert 2 < len(seeds) <= 1 + ended
        assert (len(seeds) == 1 + ended) == (steps_between_seeds <= 1)


def test_seeds_depend_on_the_task_name_not_on_its_index_or_other_tasks() -> None:
    whole, part = make(), make([TASKS[2], TASKS[0]])
    assert np.array_equal(whole.reset()[2, :, :1], part.reset()[0, :, :1])
    assert whole.episode_seed(0, 1, 5) == part.episode_seed(1, 1, 5)


def test_episode_seeds_are_31_bits_and_unique() -> None:
    packs = [make(), make(seed=8), make(stream="eval")]
    seeds = [pack.episode_seed(k, n, e) for pack in packs for k in range(3) for n in range(3) for e in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert max(seeds) < 2**31
    assert (
        make().episode_seed(0, 0, 0) == 1453533189
    )  # from `printf train/7/a/0/0 | b2sum -l 64`; must not change, or existing runs could not be resumed


def test_observation_after_done_is_the_first_of_the_next_episode() -> None:
    played = make(ends=0.2)
    played.reset()
    generator = np.random.default_rng(0)
    for _ in range(40):
        played.send(random_actions(played, generator))
        step = played.recv()
        assert np.array_equal(step.done, step.terminated | step.truncated)
        for k, n in np.argwhere(step.done):
            shape = TASKS[k].observation_shape
            first = Dice(shape, 0).reset(played.episode_seed(k, n, int(played.episodes[k, n])))
            assert np.array_equal(step.observation[k, n, : shape[0]], first.astype(np.float32))
            assert played.state_dict()["lengths"][k, n] == 0
    assert played.episodes.min() > 0


def test_reset_restarts_at_the_first_episodes() -> None:
    played = make()
    first = played.reset().copy()
    play(played, 50, seed=0)
    assert np.array_equal(played.reset(), first)
    assert not played.episodes.any()


def test_vectors_are_padded_with_zeros() -> None:
    played = make()
    assert played.reset().shape == (3, 3, 5)
    for step in play(played, 30, seed=1):
        assert not step.observation[0, :, 3:].any()
        assert not step.observation[2, :, 1:].any()
        assert step.observation[1].all()


def test_observation_stays_valid_until_the_next_recv() -> None:
    played = make()
    held = played.reset()
    generator = np.random.default_rng(0)
    for _ in range(5):
        kept = held.copy()
        played.send(random_actions(played, generator))
        step = played.recv()
        assert np.array_equal(held, kept)
        held = step.observation


def test_inactive_tasks_are_not_stepped_and_return_zeros() -> None:
    played = make(ends=0.0)
    played.reset()
    play(played, 4, seed=0)
    played.send(np.ones((3, 3), np.int64), np.array([True, False, True]))
    step = played.recv()
    assert not step.observation[1].any()
    assert not step.reward[1].any()
    assert (step.reward[[0, 2]] == 2.5).all()
    assert [env.steps for env in played.pack.envs["b"]] == [4, 4, 4]  # type: ignore[attr-defined]
    assert played.state_dict()["lengths"].tolist() == [[5] * 3, [4] * 3, [5] * 3]


@pytest.mark.parametrize(("place", "action"), [((0, 1), 2), ((1, 0), 4), ((2, 2), -1)])
def test_invalid_action_reaches_no_environment(place: tuple[int, int], action: int) -> None:
    played = make()
    played.reset()
    actions = np.zeros((3, 3), np.int64)
    actions[place] = action
    with pytest.raises(ValueError, match=f"{TASKS[place[0]].name}: action must be from 0 to .* got {action}"):
        played.send(actions)
    assert not played.state_dict()["lengths"].any()
    assert sum(env.steps for envs in played.pack.envs.values() for env in envs) == 0  # type: ignore[attr-defined]
    inactive = np.arange(3) != place[0]
    played.send(actions, inactive)
    played.recv()


@pytest.mark.parametrize(("then", "now"), [(0.0, 0.2), (0.2, 0.0), (0.1, 0.3)], ids=["more ends", "fewer ends", "other ends"])
def test_environment_that_is_not_reproducible_is_detected(then: float, now: float) -> None:
    played = make(ends=then, steps_between_seeds=1000)
    played.reset()
    play(played, 40, seed=0)
    with pytest.raises(RunError, match="environment 0 of a is not reproducible: its 40 saved actions ended"):
        make(ends=now, steps_between_seeds=1000).load_state_dict(played.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": np.zeros((2, 3), np.int64)},
        {"episode": np.zeros((3, 4), np.int64)},
        {"seeded_episode": np.zeros((3, 4), np.int64)},
        {"seeded_episode": np.ones((3, 3), np.int64)},
        {"seeded_episode": np.full((3, 3), -1, np.int64)},
        {"episode": np.full((3, 3), 11, np.int64)},
        {"actions": np.zeros(3, np.uint8)},
        {"actions": np.full(90, 9, np.uint8)},
        {"lengths": np.array([[100, -10, 0], [0, 0, 0], [0, 0, 0]])},
        {"lengths": np.array([[2**62, 2**62, 2**62], [2**62, 90, 0], [0, 0, 0]])},
    ],
    ids=[
        "fewer tasks",
        "more environments",
        "more seeds",
        "seeded later",
        "seeded before the first",
        "more ends than steps",
        "too few actions",
        "no such actions",
        "negative",
        "overflow",
    ],
)
def test_state_that_does_not_fit_is_refused(change: dict[str, np.ndarray]) -> None:
    played = make(ends=0.0)
    played.reset()
    play(played, 10, seed=0)
    with pytest.raises(UserError, match="do not fit"):
        make(ends=0.0).load_state_dict(played.state_dict() | change)


def test_images_are_padded_to_the_most_channels() -> None:
    assert padded_shape([task("a", (4, 10, 10)), task("b", (7, 10, 10))]) == (7, 10, 10)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([task("a", (1, 84, 84)), task("b", (1, 64, 84))], "a has 84x84 and b has 64x84"),
        ([task("a", (1, 84, 84)), task("b", (4,))], "mixes vectors and images"),
        ([task("a", (3,), 300)], "a has 300 actions; at most 256"),
    ],
)
def test_tasks_that_cannot_share_a_pack_are_refused(tasks: list[Task], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DicePack(tasks)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["Brekout"], r"unknown task 'Brekout' in env\.tasks: not a game\. Did you mean 'breakout'\?"),
        (["zzz"], r"unknown task 'zzz' in env\.tasks: not a game\. Expected one of: breakout, pong"),
    ],
)
def test_invalid_names_are_refused_with_a_suggestion(names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_names(names, {"pong", "breakout"}, "a game")
