"""PQN: losses against hand-computed values, timing of updates, every head and scale, and whole runs with exact resume."""

from __future__ import annotations

import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mtrl_cli.agents.pqn import PQN
from mtrl_cli.agents.value_scale import ClipRewards, NoValueScale, PopArt, ReturnNorm, ValueScale
from mtrl_cli.build import resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.config import compose
from mtrl_cli.machine import hardware
from mtrl_cli.networks.heads import C51Head, DuelingHead, Head, HLGaussHead, PlainHead, QuantileHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.replay.buffers import ReplaySpec, Transition
from mtrl_cli.replay.rollout_buffer import Rollouts
from mtrl_cli.replay.types import RolloutBatch
from mtrl_cli.training.loop import Loop
from tests.helpers.command import MtrlHere
from tests.helpers.fake_tasks import stream_of
from tests.helpers.pqn_loops import CPU, SETTINGS, loop_of
from tests.helpers.value_tables import ONLINE, STATES, Table, one_hot


def agent(value_scale: ValueScale | None = None, names: tuple[str, ...] = ("pong",), **changes: Any) -> PQN:
    """One task of three states and two actions, two environments."""
    network: MultiTaskNetwork = Table(ONLINE)  # type: ignore[assignment]
    return PQN(network, value_scale or NoValueScale(stream_of(names)), names, lambda function: function, **(SETTINGS | changes))


def batch(returns: list[float], weight: float = 1.0) -> RolloutBatch:
    """Chosen actions (and values): state 0 action 1 (2), state 1 action 0 (3), state 2 action 1 (-1)."""
    return RolloutBatch(
        observation=one_hot([[0, 1, 2]]),
        action=torch.tensor([[1, 0, 1]]),
        returns=torch.tensor([returns]),
        weight=torch.tensor([[1.0, weight, 1.0]]),
        index=torch.zeros(1, 3, dtype=torch.int64),
    )


# -- losses -------------------------------------------------------------------------------------------------------------------


def test_losses_equal_hand_computed_values() -> None:
    """Half the squares of 4 - 2, 2 - 3 (with weight 0.5) and 3 - -1."""
    losses = agent().losses(batch([4.0, 2.0, 3.0], weight=0.5))
    assert losses.error_KB.tolist() == [[2.0, 1.0, 4.0]]
    assert losses.loss_KB.tolist() == [[2.0, 0.25, 8.0]]
    assert losses.q_K.tolist() == [pytest.approx((2 + 3 - 1) / 3)]
    assert agent(huber=1.0).losses(batch([4.0, 2.0, 3.0])).loss_KB.tolist() == [[1.5, 0.5, 3.5]]


def test_gradient_flows_only_through_the_values_of_chosen_actions() -> None:
    made = agent()
    made.losses(batch([4.0, 2.0, 3.0])).loss_KB.sum().backward()
    assert made.network.values.grad.tolist() == [[[0.0, -2.0], [1.0, 0.0], [0.0, -4.0]]]  # type: ignore[union-attr]


def test_popart_normalises_returns_and_keeps_values() -> None:
    """After the moments change, losses use (return - mean) / scale, and stored values are unnormalized."""
    torch.manual_seed(0)
    scale = PopArt(stream_of(("pong",)), step_size=0.5)
    network = MultiTaskNetwork(HardSharing(MLP(hidden=[8]), [(3,)]), PlainHead(8, [2]), 1.0)
    made = PQN(network, scale, ("pong",), lambda function: function, **SETTINGS)
    given = batch([400.0, 200.0, 300.0])
    before = network(given.observation.flatten(2, 3)).max(-1).values
    assert torch.equal(made.value_to_store(before), before)  # type: ignore[arg-type]
    made.initialise_value_scale(given)
    assert scale.mean_K.item() == pytest.approx(300)
    after = made.value_to_store(network(given.observation.flatten(2, 3)).max(-1).values)
    assert torch.allclose(after, before, atol=1e-2)  # type: ignore[arg-type]
    q = network(given.observation.flatten(2, 3)).gather(-1, given.action[..., None]).squeeze(-1)
    target = (given.returns - scale.mean_K) / scale.scale_K
    losses = made.losses(given)
    assert torch.allclose(losses.loss_KB, 0.5 * (target - q).square())
    losses.loss_KB.sum().backward()
    moved = scale.scale_K.clone()
    made.after_step(given, losses)
    assert scale.scale_K != moved
    again = made.value_to_store(network(given.observation.flatten(2, 3)).max(-1).values)
    assert torch.allclose(again, after, atol=1e-2)  # type: ignore[arg-type]


# -- timing of updates --------------------------------------------------------------------------------------------------------


def run(loop: Loop, ticks: int) -> list[int]:
    """Return the number of updates at the end of each tick."""
    return [loop.learner.updates for _ in islice(loop.ticks(), ticks)]


def test_all_updates_from_a_rollout_follow_the_next_stored_step() -> None:
    """5 steps are stored when the sixth tick starts: 2 epochs of 2 updates, then again every 4 ticks."""
    assert run(loop_of(), 15) == [0] * 5 + [4] * 4 + [8] * 4 + [12] * 2


def test_overlap_spreads_updates_over_the_next_rollout() -> None:
    assert run(loop_of(overlap=True), 15) == [0] * 5 + [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert run(loop_of(overlap=True, epochs=1, minibatches=1), 15) == [0] * 5 + [1] * 4 + [2] * 4 + [3] * 2
    assert run(loop_of(overlap=True, epochs=3), 13) == [0] * 5 + [1, 3, 4, 6, 7, 9, 10, 12]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("length", "num_envs", "epochs", "minibatches"), [(1, 2, 1, 1), (5, 3, 3, 5), (4, 4, 1, 16), (3, 1, 7, 3), (7, 2, 2, 1)]
)
def test_updates_of_a_rollout_are_complete_before_those_of_the_next(
    overlap: bool, length: int, num_envs: int, epochs: int, minibatches: int
) -> None:
    loop = loop_of(num_envs=num_envs, rollout_length=length, epochs=epochs, minibatches=minibatches, overlap=overlap)
    rollouts = loop.replay
    assert isinstance(rollouts, Rollouts)
    for rows, updates in enumerate(run(loop, 6 * length + 2)):
        complete = max(0, (rows - 1) // length)  # rollouts that were complete at the start of the tick
        if overlap:
            assert (complete - 1) * epochs * minibatches <= updates <= complete * epochs * minibatches
            assert updates > (complete - 1) * epochs * minibatches or complete == 0
        else:
            assert updates == complete * epochs * minibatches


def test_stored_values_are_those_used_for_acting() -> None:
    """Before the first update, stored values are the network's maxima at the stored observations."""
    loop = loop_of(rollout_length=20, scale=ClipRewards)
    run(loop, 15)
    stored = loop.replay.export_rows(0, 15)
    q = loop.learner.agent.network(stored["frames"].flatten(1, 2))
    assert torch.allclose(q.max(-1).values, stored["values"].flatten(1), atol=1e-6)


def test_returns_are_computed_from_scaled_rewards() -> None:
    """With gamma 0 and trace decay 0, a return is the scaled reward."""
    loop = loop_of(scale=ClipRewards, gamma=0.0, trace_decay=0.0, reward_factors={"middle": 0.5})
    run(loop, 6)
    rollouts = loop.replay
    assert isinstance(rollouts, Rollouts)
    rewards = rollouts.export_rows(0, 4)["rewards"]
    rewards[1] *= 0.5
    flags = rollouts.export_rows(0, 4)["flags"]
    kept = (flags & 2) == 0
    assert torch.equal(rollouts._returns[kept], rewards.clamp(-1, 1)[kept])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scale", [NoValueScale, PopArt, ReturnNorm])
def test_extra_losses_and_warm_up_do_not_affect_training(overlap: bool, scale: type[ValueScale]) -> None:
    """Computing losses between updates, as diagnostics do, and `warm_up` do not affect training."""
    loops = [loop_of(overlap=overlap, scale=scale) for _ in range(2)]
    loops[1].learner.warm_up()
    for _ in range(20):
        for loop in loops:
            next(loop.ticks())
        rollouts = loops[1].replay
        first, stop = rollouts.eligible_rows
        if stop > first:
            row = torch.arange(first, stop).expand(3, -1)
            with torch.no_grad():
                losses = loops[1].learner.agent.losses(rollouts.gather(row, torch.zeros_like(row), torch.ones(row.shape)))
            assert torch.isfinite(losses.loss_KB).all()
    assert loops[0].learner.updates > 10
    for ours, theirs in zip(*(loop.learner.agent.network.parameters() for loop in loops), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("head", [PlainHead, DuelingHead, C51Head, HLGaussHead, QuantileHead])
def test_values_converge_to_the_returns_with_every_head(head: type[Head]) -> None:
    """With gamma 0, an action's value is its number plus 0.05, clipped at 1; the greedy policy finds the best action."""
    huber = 1.0 if head is QuantileHead else 0.0
    settings = {"num_envs": 8, "rollout_length": 8, "epochs": 4, "gamma": 0.0, "trace_decay": 0.0, "epsilon_steps": 1000, "huber": huber}
    loop = loop_of(head=head, scale=ClipRewards, lr=0.03, **settings)
    run(loop, 180)
    with torch.no_grad():
        q_KA = loop.learner.agent.network(loop.groups[0].frames.observation.flatten(2, 3)).mean(1)
    assert q_KA[0, :2].tolist() == pytest.approx([0.05, 1.0], abs=0.15)
    assert q_KA[1, :4].tolist() == pytest.approx([0.05, 1.0, 1.0, 1.0], abs=0.15)
    assert q_KA[2, :3].tolist() == pytest.approx([0.05, 1.0, 1.0], abs=0.15)
    stored = loop.replay.export_rows(loop.replay.rows - 16, loop.replay.rows)
    rewards_K = stored["rewards"].clamp(max=1).flatten(1).mean(1)
    assert (rewards_K > 0.85).all(), "a tenth of the actions are random"


def test_values_converge_to_the_optimal_values() -> None:
    """Compare with value iteration on two small MDPs with observed states and random actions.

    Each MDP has 3 states and 2 actions, of which one terminates the episode. Episodes are also truncated at random.
    """
    torch.manual_seed(0)
    K, N, gamma = 2, 8, 0.8
    successor, reward = torch.randint(STATES, (K, STATES, 2)), torch.randn(K, STATES, 2)
    ends = torch.zeros(K, STATES, 2, dtype=torch.bool)
    ends[:, 0, 1] = True
    best = torch.zeros(K, STATES, 2)
    for _ in range(100):
        best = reward + gamma * (~ends) * best.amax(2).gather(1, successor.flatten(1)).view_as(reward)
    network: MultiTaskNetwork = Table([[[0.0, 0.0]] * STATES] * K)  # type: ignore[assignment]
    scale = NoValueScale(stream_of(("a", "b"), num_envs=N))
    made = PQN(network, scale, ("a", "b"), lambda function: function, **(SETTINGS | {"gamma": gamma, "trace_decay": 0.0}))
    rollouts = Rollouts(ReplaySpec(K, N, (STATES,), torch.float32, 1, 1, CPU, 0, 1000, rollout_length=4))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    task_K1, state = torch.arange(K)[:, None], torch.randint(STATES, (K, N))
    start = torch.ones(K, N, dtype=torch.bool)
    for number in range(1, 1201):
        observation, action = torch.nn.functional.one_hot(state, STATES).float(), torch.randint(2, (K, N))
        value = made.value_to_store(network(observation).amax(-1).detach())
        at = (task_K1, state, action)
        terminated, cut = ends[at], torch.rand(K, N) < 0.1
        done = terminated | cut
        rollouts.add(Transition(observation, start, action, reward[at], terminated, cut, done, value))
        start = done
        state = torch.where(start, torch.randint(STATES, (K, N)), successor[at])
        if number > 4 and number % 4 == 1:
            for _ in range(4):
                made.before_update(rollouts)
                rollouts.prepare(number, made.batch_size)
                made.losses(rollouts.draw(made.batch_size)).loss_KB.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert torch.allclose(network.values, best, atol=0.1)  # type: ignore[arg-type]


# -- whole runs ---------------------------------------------------------------------------------------------------------------

SMALL = [
    "env=classic_pack",
    "agent=pqn",
    "env.num_envs=4",
    "agent.rollout_length=8",
    "agent.epochs=2",
    "agent.minibatches=4",
    "steps_per_task=240",
    "network.hidden=[16,16]",
    "eval.every=0",
    "eval.episodes=1",
    "eval.max_steps=20",
    "checkpoint.every=60",
    "log.every=80",
    "log.diagnostics=80",
    "device=cpu",
]


def state_bytes(run: Path, step: int = 240) -> list[bytes]:
    return [(run / "checkpoints" / str(step) / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        ["task_weights=uniform"],
        ["task_weights=pcgrad", "network/head=c51", "agent/value_scale=return_norm"],
        ["task_weights=gradnorm", "network/head=dueling", "agent/value_scale=popart"],
        ["task_weights=famo", "network/head=hl_gauss", "agent/value_scale=clip", "network/sharing=independent"],
        ["task_weights=graddrop", "network/head=quantile", "agent.huber=1.0", "optimizer=adam"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_trains_and_resumes_exactly(overrides: list[str], overlap: bool, here: MtrlHere) -> None:
    """Resumes from a checkpoint within a rollout and, with overlap, within an epoch."""
    here("train", *SMALL, *overrides, f"agent.overlap={overlap}".lower(), "run_dir=run")
    rows = [json.loads(line) for line in (here.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss/CartPole-v1" in row][-1]
    # The last of 60 ticks starts at step 236 with 7 rollouts of 8 rows, each with 8 updates, and one more row. With overlap there is one
    # update every 4 steps, the first at step 36.
    assert last["updates"] == ((236 - 36) // 4 + 1 if overlap else 7 * 8)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert any("grad/norm/CartPole-v1" in row for row in rows) == ("network/sharing=independent" not in overrides)
    run = here.folder / "run"
    before = state_bytes(run)
    shutil.rmtree(run / "checkpoints" / "240")  # as after a kill before the checkpoint
    assert "resuming from step 180" in here("resume", "run").stdout
    assert state_bytes(run) == before


def test_resume_without_saved_rollouts_starts_a_new_rollout(here: MtrlHere) -> None:
    here("train", *SMALL, "checkpoint.replay=false", "run_dir=run")
    assert not list((here.folder / "run" / "checkpoints").glob("replay/*"))
    assert "with an empty replay" in here("resume", "run", "steps_per_task=400").stdout
    rows = [json.loads(line) for line in (here.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = {row["step"]: row["updates"] for row in rows}
    # From step 240, 160 steps of 4 environments: 4 rollouts of 8 rows and one more row are stored at the start of the tick at step 372.
    assert updates[400] == updates[240] + 4 * 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agent.minibatches=5"], "agent.minibatches must divide agent.rollout_length * env.num_envs = 8 * "),
        (["agent.rollout_length=60"], "steps_per_task must be at least (agent.rollout_length + 1) * env.num_envs = 244, got 240"),
        (["replay=uniform"], "agent=PQN requires replay=rollouts, got UniformReplay"),
        (["replay=prioritized"], "agent=PQN requires replay=rollouts, got PrioritizedReplay"),
        (["agent.n_step=3"], "unknown key 'agent.n_step' in PQN"),
        (["replay.capacity=100"], "unknown key 'replay.capacity' in Rollouts"),
        (["agent.overlap=maybe"], "agent.overlap must be true or false or auto, got 'maybe'"),
    ],
)
def test_invalid_overrides_are_refused_in_one_line(here: MtrlHere, overrides: list[str], message: str) -> None:
    refused = here("train", *SMALL, *overrides, "run_dir=run", code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert list(here.folder.iterdir()) == []


@pytest.mark.parametrize(("device", "overlap"), [("cpu", False), ("cuda", True)])
def test_auto_settings_depend_on_the_device(monkeypatch: pytest.MonkeyPatch, device: str, overlap: bool) -> None:
    monkeypatch.setattr(hardware, "resolve_device", lambda name: torch.device(device))
    composed = compose.compose_training(["env=classic_pack", "agent=pqn"])
    pack = build_run.make_pack(composed)
    settled = resolve_auto.resolve(composed, pack, lambda line: None)
    assert settled["agent"]["overlap"] is overlap
    assert settled["replay"] == {"_target_": "mtrl_cli.replay.rollout_buffer.Rollouts"}
    chosen = resolve_auto.resolve(
        compose.compose_training(["env=classic_pack", "agent=pqn", "agent.overlap=true"]), pack, lambda line: None
    )
    assert chosen["agent"]["overlap"] is True
    # (2 rollouts of 32 rows + 3 rows) * 16 environments; each transition has 6 numbers, an action, a reward, flags and a value.
    assert "rollouts: 1,072 transitions per task, 0.1 MiB in total (46 bytes each)" in resolve_auto.describe(
        settled | {"device": "cpu"}, pack
    )
