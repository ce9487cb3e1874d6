"""Value scales: statistics against numpy, preserved outputs, and valid combinations of scales and heads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mtrl_cli.agents.value_scale import PopArt, ReturnNorm
from mtrl_cli.networks.heads import DuelingHead, Head, PlainHead, QuantileHead
from tests.helpers.command import MtrlHere
from tests.helpers.fake_tasks import stream_of
from tests.helpers.learners import round_trip

NAMES = ["pong", "qbert", "enduro"]
ACTIONS = [3, 1, 4]
ALL_SAMPLES = torch.ones(3, 16, dtype=torch.bool)


# -- popart -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PlainHead, DuelingHead, QuantileHead])
def test_popart_preserves_the_values_of_both_networks(kind: type[Head]) -> None:
    """Targets jump over eight orders of magnitude, with means far from 0: unnormalized values of both heads stay the same."""
    torch.manual_seed(0)
    scale, online, target = PopArt(stream_of(NAMES), step_size=0.2), kind(7, ACTIONS), kind(7, ACTIONS)
    features = torch.randn(3, 16, 7)

    def values(head: Head) -> torch.Tensor:
        return head.values(head(features)) * scale.scale_K[:, None, None] + scale.mean_K[:, None, None]

    for _ in range(50):
        size_K1 = 10 ** (8 * torch.rand(3, 1) - 4)
        wanted_KB = size_K1 * (torch.randn(3, 16) + 3 * torch.randn(3, 1))
        before, statistics = [values(online), values(target)], scale.scale_K.clone()
        scale.update((wanted_KB - scale.mean_K[:, None]) / scale.scale_K[:, None], ALL_SAMPLES, (online, target))
        assert not torch.equal(scale.scale_K, statistics)
        for old, new in zip(before, [values(online), values(target)], strict=True):
            assert torch.equal(new.isfinite(), old.isfinite())
            largest_K = torch.maximum(old.where(old.isfinite(), 0.0).abs().amax((1, 2)), scale.mean_K.abs() + scale.scale_K)
            assert ((new - old).abs().where(old.isfinite(), 0.0).amax((1, 2)) <= 1e-5 * largest_K).all()


def test_popart_normalises_a_stationary_stream_of_each_task() -> None:
    torch.manual_seed(0)
    scale, heads = PopArt(stream_of(NAMES), step_size=0.01), (PlainHead(7, ACTIONS),)
    mean_K1, spread_K1 = torch.tensor([[5.0], [-2000.0], [1e-3]]), torch.tensor([[0.1], [300.0], [20.0]])
    seen = []
    for update in range(2500):
        wanted_KB = mean_K1 + spread_K1 * torch.randn(3, 16)
        normalised_KB = (wanted_KB - scale.mean_K[:, None]) / scale.scale_K[:, None]
        if update >= 1500:
            seen.append(normalised_KB)
        scale.update(normalised_KB, ALL_SAMPLES, heads)
    stream_K = torch.cat(seen, 1)
    assert stream_K.mean(1).abs().max() < 0.05
    assert (stream_K.var(1) - 1).abs().max() < 0.1


def test_popart_moments_are_bias_corrected_moving_averages() -> None:
    """Compare with the definition: weights (1 - step_size) ^ age over their sum; the squared mean is scaled by the bias correction."""
    torch.manual_seed(0)
    scale, heads = PopArt(stream_of(NAMES), step_size=0.1), (PlainHead(7, ACTIONS),)
    history = []
    for update in range(12):
        wanted_KB = (10 + torch.randn(3, 16, dtype=torch.float64)) * (1 + update)
        history.append(wanted_KB.numpy())
        scale.update(((wanted_KB - scale.mean_K[:, None]) / scale.scale_K[:, None]).float(), ALL_SAMPLES, heads)
        weight = 0.9 ** np.arange(len(history))[::-1]
        first = np.average([targets.mean(1) for targets in history], axis=0, weights=weight)
        second = np.average([(targets**2).mean(1) for targets in history], axis=0, weights=weight)
        assert scale.mean_K.numpy() == pytest.approx(first, rel=1e-5)
        assert scale.scale_K.numpy() == pytest.approx(np.sqrt(second - (1 - 0.9 ** len(history)) * first**2), rel=1e-4)


def test_popart_ignores_masked_samples_and_has_a_minimum_scale() -> None:
    scale, head = PopArt(stream_of(NAMES), min_scale=0.5), PlainHead(7, ACTIONS)
    before, seen_KB = copy.deepcopy(head.state_dict()), torch.zeros(3, 16, dtype=torch.bool)
    scale.update(torch.full((3, 16), torch.nan), seen_KB, (head,))
    assert scale.mean_K.tolist() == [0, 0, 0]
    assert scale.scale_K.tolist() == [1, 1, 1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    seen_KB[0, 3] = True
    targets_KB = torch.full((3, 16), 7.0)
    targets_KB[0, 3] = -4.0
    scale.update(targets_KB, seen_KB, (head,))
    assert scale.mean_K.tolist() == [-4, 0, 0]
    assert scale.scale_K.tolist() == pytest.approx([(16 - 0.01 * 16) ** 0.5, 1, 1])
    for _ in range(2000):  # a constant target: no spread
        scale.update((-4 - scale.mean_K[:, None]).expand(3, 16) / scale.scale_K[:, None], seen_KB, (head,))
    assert scale.scale_K.tolist() == [0.5, 1, 1]


def test_restored_popart_continues_identically() -> None:
    torch.manual_seed(0)
    scale, head = PopArt(stream_of(NAMES)), PlainHead(7, ACTIONS)
    scale.update(100 * torch.randn(3, 16) + 3, ALL_SAMPLES, (head,))
    other = PopArt(stream_of(NAMES))
    other.load_state_dict(round_trip(scale.state_dict()))
    more_KB = torch.randn(3, 16)
    for each in (scale, other):
        each.update(more_KB, ALL_SAMPLES, (copy.deepcopy(head),))
    assert torch.equal(scale.mean_K, other.mean_K)
    assert torch.equal(scale.scale_K, other.scale_K)


# -- return_norm --------------------------------------------------------------------------------------------------------------------


def observe_random(scale: ReturnNorm, steps: int, seed: int) -> np.ndarray:
    """Observe random rewards and ends. Return the running return of every environment at each step."""
    draw, running, all_returns = np.random.default_rng(seed), np.zeros((3, 4)), []
    for _ in range(steps):
        reward = (draw.normal(size=(3, 4)) + 0.5) * np.array([[1.0], [1000.0], [0.01]])
        done = draw.random((3, 4)) < 0.1
        scale.observe(torch.from_numpy(reward.astype(np.float32)), torch.from_numpy(done))
        running = 0.9 * running + reward.astype(np.float32)
        all_returns.append(running.copy())
        running[done] = 0
    return np.stack(all_returns, 1).reshape(3, -1)


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_rewards_are_divided_by_the_larger_of_return_spread_and_largest_return_over_limit(limit: float) -> None:
    scale = ReturnNorm(stream_of(NAMES, num_envs=4, gamma=0.9), limit=limit)
    returns = observe_random(scale, 300, seed=0)
    divisor = np.maximum(np.sqrt(returns.var(1) + 1e-8), np.abs(returns).max(1) / limit)
    assert (np.abs(returns).max(1) / limit > returns.std(1)).all() == (limit < 1)
    rewards = torch.randn(3, 5, 2)
    assert torch.allclose(scale.rewards(rewards), rewards / torch.tensor(divisor, dtype=torch.float32)[:, None, None], rtol=1e-5)


def test_scaled_returns_never_exceed_the_limit() -> None:
    """A single reward of 1000 among zero rewards."""
    scale = ReturnNorm(stream_of(["one"], num_envs=1), limit=10.0)
    for step in range(50):
        reward = torch.tensor([[1000.0 if step == 30 else 0.0]])
        scale.observe(reward, torch.tensor([[False]]))
        assert scale.rewards(reward[..., None]).abs().max() <= 10.0001


def test_restored_return_norm_continues_identically() -> None:
    scale, other = (ReturnNorm(stream_of(NAMES, num_envs=4)) for _ in range(2))
    observe_random(scale, 37, seed=0)
    other.load_state_dict(round_trip(scale.state_dict()))
    for each in (scale, other):
        observe_random(each, 20, seed=1)
    rewards = torch.randn(3, 5, 2)
    assert torch.equal(scale.rewards(rewards), other.rewards(rewards))


# -- combinations with heads ------------------------------------------------------------------------------------------------------

HEADS = ["plain", "dueling", "quantile", "c51", "hl_gauss"]
ALLOWED = {"none": HEADS[:3], "clip": HEADS, "popart": HEADS[:3], "return_norm": HEADS}
SHORT = [
    "env=classic_pack",
    "steps_per_task=160",
    "agent.learning_starts=64",
    "agent.batch_size=8",
    "agent.samples_per_step=2.0",
    "network.hidden=[8,8]",
    "eval.every=0",
    "eval.episodes=1",
    "eval.max_steps=5",
    "checkpoint.every=0",
    "replay.capacity=800",
    "log.every=80",
    "device=cpu",
    "agent.reward_factors={MountainCar-v0: 1000}",
]


@pytest.mark.parametrize("scale", ALLOWED)
def test_invalid_combination_of_scale_and_head_is_refused_before_a_folder_is_created(here: MtrlHere, scale: str) -> None:
    for head in HEADS:
        words = ["train", "env=classic_pack", f"network/head={head}", f"agent/value_scale={scale}", "run_dir=run", "--dry-run"]
        if head in ALLOWED[scale]:
            here(*words)
            continue
        for command in (words, words[:-1]):
            refused = here(*command, code=2)
            assert len(refused.stderr.strip().splitlines()) == 1
            assert "agent/value_scale=return_norm or clip" in refused.stderr
        assert list(here.folder.iterdir()) == []


@pytest.mark.parametrize(("scale", "head"), [(scale, head) for scale, heads in ALLOWED.items() for head in heads])
def test_every_valid_combination_of_scale_and_head_trains(here: MtrlHere, scale: str, head: str) -> None:
    here("train", *SHORT, f"network/head={head}", f"agent/value_scale={scale}", "run_dir=run")
    rows = [json.loads(line) for line in (here.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "grad/norm" in row][-1]
    assert last["updates"] > 15
    assert all(np.isfinite(last[f"{name}/{task}"]) for name in ("loss", "q/mean") for task in ("CartPole-v1", "MountainCar-v0"))
    evaluation = json.loads((here.folder / "run" / "eval" / "160.json").read_text())
    assert evaluation["tasks"]["MountainCar-v0"]["mean"] == -5  # the raw return, for any scaling in the learner


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["network/head=c51", "agent/value_scale=return_norm", "agent.value_scale.limit=11"],
            "agent.value_scale.limit must be at most network.head.v_max=10",
        ),
        (["network/head=hl_gauss", "agent/value_scale=clip", "network.head.v_max=0.5"], "network.head.v_max=0.5"),
        (
            ["network/head=hl_gauss", "agent/value_scale=clip", "network.head.v_min=10"],
            "network.head.v_min must be below network.head.v_max, got 10 and 10",
        ),
        (["agent/value_scale=popart", "agent.value_scale.step_size=0"], "agent.value_scale.step_size must be above 0"),
        (["agent.reward_factors={MountainCar: 1000}"], "Did you mean 'MountainCar-v0'?"),
        (["agent.reward_factors={MountainCar-v0: 0}"], "each a positive number"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(here: MtrlHere, overrides: list[str], message: str) -> None:
    refused = here("train", "env=classic_pack", *overrides, "run_dir=run", code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert list(here.folder.iterdir()) == []


def state_bytes(run: Path) -> dict[str, bytes]:
    step = (run / "checkpoints" / "latest").read_text().strip()
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / step).glob("*.safetensors")}


@pytest.mark.parametrize(
    "overrides",
    [["agent/value_scale=popart", "network/head=dueling"], ["agent/value_scale=return_norm", "network/head=hl_gauss"]],
    ids=["popart", "return_norm"],
)
def test_resumed_run_ends_with_the_same_bytes(here: MtrlHere, overrides: list[str]) -> None:
    """The run ends at a smaller budget, which is then raised; the learning rate is constant."""
    here("train", *SHORT, *overrides, "run_dir=uninterrupted", "optimizer.lr_final=1.0")
    here("train", *SHORT, *overrides, "run_dir=run", "optimizer.lr_final=1.0", "steps_per_task=104")
    here("resume", "run", "steps_per_task=160")
    assert state_bytes(here.folder / "run") == state_bytes(here.folder / "uninterrupted")
