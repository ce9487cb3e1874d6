"""Gymnasium environments: spaces, names, trust, and exact reproduction of episodes."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from mtrl_cli.envs.gymnasium import GymnasiumPack
from mtrl_cli.errors import UserError
from mtrl_cli.machine import extras
from tests.helpers.played import assert_restores, play, start

CLASSIC = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


class Toy(gymnasium.Env):
    """Environment whose observations contain the last action. Episodes never end."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.observe(0), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.observe(action), float(action), False, False, {}

    def observe(self, action: int) -> np.ndarray:
        observation = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        observation.flat[0] = action
        observation.flat[1] = 5
        return observation


BYTES = {"low": 0, "high": 255, "dtype": np.uint8}
TOYS: dict[str, tuple[Any, Any]] = {
    "ToyOffset-v0": (Box(-np.inf, np.inf, (2,)), Discrete(3, start=4)),
    "ToyHWC-v0": (Box(shape=(12, 10, 3), **BYTES), Discrete(2)),
    "ToyCHW-v0": (Box(shape=(4, 12, 10), **BYTES), Discrete(2)),
    "ToyUnclear-v0": (Box(shape=(8, 8, 8), **BYTES), Discrete(2)),
    "ToyBits-v0": (Box(0, 1, (4, 6, 6), dtype=np.uint8), Discrete(2)),
    "ToyFloatImage-v0": (Box(0, 1, (12, 10, 3)), Discrete(2)),
    "ToyMatrix-v0": (Box(0, 1, (3, 3)), Discrete(2)),
    "ToyDict-v0": (Dict({"a": Box(0, 1, (3,))}), Discrete(2)),
    "ToyContinuous-v0": (Box(0, 1, (3,)), Box(-1, 1, (2,))),
    "ToyKeyboard-v0": (Box(0, 1, (3,)), Discrete(300)),
}


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    for name, (observation_space, action_space) in TOYS.items():
        gymnasium.register(name, entry_point=Toy, kwargs={"observation_space": observation_space, "action_space": action_space})
    yield
    for name in TOYS:
        del gymnasium.registry[name]


def make(*tasks: str, **options: Any) -> GymnasiumPack:
    return GymnasiumPack(name="test", tasks=list(tasks), num_envs=2, **options)


@pytest.mark.parametrize("steps_between_seeds", [0, 100])
@pytest.mark.parametrize("steps", [1, 75, 420])
def test_state_restores_every_environment(steps: int, steps_between_seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GymnasiumPack, "steps_between_seeds", steps_between_seeds)
    uninterrupted, resumed = start(make(*CLASSIC)), start(make(*CLASSIC))
    uninterrupted.reset()
    assert_restores(uninterrupted, resumed, play(uninterrupted, steps, seed=1)[-1].observation)


def test_classic_tasks_attributes_and_padding() -> None:
    pack = make(*CLASSIC)
    assert pack.observation_kind == "vector"
    assert [task.observation_shape for task in pack.tasks] == [(4,), (6,), (2,)]
    assert [task.num_actions for task in pack.tasks] == [2, 3, 3]
    assert (pack.observation_shape, pack.observation_dtype, pack.observation_scale, pack.stack) == ((6,), np.float32, 1.0, 1)
    assert start(pack).reset().shape == (3, 2, 6)


def test_only_components_with_finite_bounds_are_scaled() -> None:
    played = start(make("CartPole-v1", "MountainCar-v0"))
    seed = played.episode_seed(0, 0, 0)
    raw, _ = gymnasium.make("CartPole-v1").reset(seed=seed)
    angle = 24 * np.pi / 180
    observation = played.reset()
    np.testing.assert_allclose(observation[0, 0, :4], [raw[0] / 4.8, raw[1], raw[2] / angle, raw[3]], rtol=1e-5)
    raw, _ = gymnasium.make("MountainCar-v0").reset(seed=played.episode_seed(1, 1, 0))
    np.testing.assert_allclose(observation[1, 1, :2], [(raw[0] + 0.3) / 0.9, raw[1] / 0.07], rtol=1e-5)


def test_time_limit_truncates_without_terminating() -> None:
    played = start(make("MountainCar-v0"))
    played.reset()
    steps = play(played, 200, seed=0)
    assert steps[-1].truncated.all()
    assert not steps[-1].terminated.any()
    assert not any(step.truncated.any() for step in steps[:-1])


def test_max_episode_steps_replaces_the_registered_limit() -> None:
    played = start(make("MountainCar-v0", max_episode_steps=30))
    played.reset()
    assert [step.done.all() for step in play(played, 31, seed=0)] == [False] * 29 + [True, False]


def test_actions_are_offset_by_the_start_of_the_space() -> None:
    pack = make("ToyOffset-v0")
    assert pack.tasks[0].num_actions == 3
    played = start(pack)
    played.reset()
    played.send(np.array([[0, 2]]))
    assert played.recv().reward.tolist() == [[4.0, 6.0]]


def test_images_are_channels_first() -> None:
    pack = make("ToyHWC-v0", "ToyCHW-v0")
    assert pack.observation_kind == "image"
    assert [task.observation_shape for task in pack.tasks] == [(3, 12, 10), (4, 12, 10)]
    assert (pack.observation_shape, pack.observation_dtype, pack.observation_scale) == ((4, 12, 10), np.uint8, 255.0)
    observation = start(pack).reset()
    assert observation[0, 0, 1, 0, 0] == 5  # second element in [H, W, C]
    assert observation[1, 0, 0, 0, 1] == 5
    assert make("ToyBits-v0").observation_scale == 1.0


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["Pendulum-v1"], r"actions of Pendulum-v1 must be Discrete, got Box\("),
        (["ToyContinuous-v0"], "actions of ToyContinuous-v0 must be Discrete, got Box"),
        (["Blackjack-v1"], r"observations of Blackjack-v1 must be .*Box, got Tuple\("),
        (["ToyDict-v0"], r"observations of ToyDict-v0 must be .* got Dict\("),
        (["ToyFloatImage-v0"], "must be a 1-D Box or a 3-D uint8 Box"),
        (["ToyMatrix-v0"], "must be a 1-D Box or a 3-D uint8 Box"),
        (["ToyUnclear-v0"], r"got \(8, 8, 8\)"),
        (["ToyKeyboard-v0"], "300 actions; at most 256"),
        (["CartPole-v1", "ToyHWC-v0"], "mixes vectors and images"),
        (["ToyHWC-v0", "ToyBits-v0"], "the same height and width"),
        (["cartpole-v1"], r"unknown task 'cartpole-v1' in env\.tasks: not a registered Gymnasium id\. Did you mean 'CartPole-v1'"),
        (["CartPole"], "Did you mean 'CartPole-v"),
    ],
)
def test_unsupported_tasks_are_refused(tasks: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(*tasks)


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that registers an environment and creates a file when it is imported."""
    (tmp_path / "stranger.py").write_text(
        "import gymnasium, pathlib\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n"
        "gymnasium.register('Stranger-v0', entry_point='gymnasium.envs.classic_control.cartpole:CartPoleEnv', max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("stranger", None)
    gymnasium.registry.pop("Stranger-v0", None)


def test_id_with_a_package_prefix_is_refused_without_importing_the_package(stranger: Path) -> None:
    with pytest.raises(UserError, match=r"got stranger:Stranger-v0. Use Stranger-v0\n.* trusted_packages=\[stranger\]"):
        make("stranger:Stranger-v0")
    assert not stranger.exists()


@pytest.mark.parametrize("name", ["absent_package:Env-v0", ":CartPole-v1", "CartPole-v1:"])
def test_any_id_with_a_colon_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        make(name)


def test_environment_registered_by_an_imported_package_can_be_used(stranger: Path) -> None:
    importlib.import_module("stranger")
    played = start(make("Stranger-v0"))
    played.reset()
    assert play(played, 9, seed=0)[-1].done.all()


def test_rendering_reproduces_the_episode() -> None:
    pytest.importorskip("pygame", reason="an extra")
    pack = make("CartPole-v1")
    frames = list(pack.render(0, 3, [0, 1, 1]))
    assert len(frames) == 4
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((400, 600, 3), "uint8")}
    assert not np.array_equal(frames[0], frames[3])
    assert all(np.array_equal(one, other) for one, other in zip(frames, pack.render(0, 3, [0, 1, 1]), strict=True))
    assert pack.render_fps(0) == 50


def test_rendering_without_pygame_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UserError, match=re.escape(extras.install_command("video"))):
        next(make("CartPole-v1").render(0, 3, []))


def test_rendering_without_a_render_mode_is_refused() -> None:
    with pytest.raises(UserError, match="ToyOffset-v0 cannot be rendered"):
        next(make("ToyOffset-v0").render(0, 3, []))
