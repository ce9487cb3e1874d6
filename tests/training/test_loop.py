"""Training loop: stored transitions, due updates, order of calls, and exact resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.replay.buffers import PrioritizedReplay, Replay, UniformReplay
from mtrl_cli.training.loop import Clock, Loop
from tests.helpers.fake_pack import FakePack
from tests.helpers.learners import restore, saved
from tests.helpers.loops import NAMES, loop_of, run


def task_pack(pack: FakePack) -> VectorTasks:
    return VectorTasks(pack, num_envs=2, seed=3, num_threads=1, training=True, stream="train")


def test_steps_are_counted_per_task() -> None:
    loop = loop_of()
    loop.reset()
    assert run(loop, 3) == [2, 4, 6]
    assert loop.step == 6
    assert run(loop, 2) == [8, 10]


@pytest.mark.parametrize("groups", [1, 2])
def test_stored_transitions_are_those_played(groups: int) -> None:
    """Replaying the stored actions gives the stored frames, rewards and ends, for any number of groups."""
    loop = loop_of(capacity=200, groups=groups)
    loop.reset()
    run(loop, 60)
    stored = loop.replay.export_rows(0, 60)
    replayed = task_pack(FakePack())
    observation, start = replayed.reset(), np.ones((3, 2), bool)
    ends = 0
    for row in range(60):
        assert np.array_equal(stored["frames"][:, row].numpy(), observation)
        flags = stored["flags"][:, row].numpy()
        assert np.array_equal((flags & 4) != 0, start)
        replayed.send(stored["actions"][:, row].numpy().astype(np.int64))
        step = replayed.recv()
        assert np.array_equal(stored["rewards"][:, row].numpy(), step.reward)
        assert np.array_equal((flags & 1) != 0, step.terminated)
        assert np.array_equal((flags & 2) != 0, step.truncated & ~step.terminated)
        observation, start = step.observation, step.done
        ends += int(step.done.sum())
    assert ends > 10
    flags = stored["flags"]
    life_lost = ((flags[:, :-1] & 1) != 0) & ((flags[:, 1:] & 4) == 0)
    assert life_lost.any(), "the test covers no lost life"
    assert ((flags & 2) != 0).any(), "the test covers no truncation"


def test_agent_observes_every_reward_and_end_once() -> None:
    loop, seen = loop_of(capacity=200), []
    observe = loop.learner.agent.observe
    loop.learner.agent.observe = lambda *step: (seen.append([each.clone() for each in step]), observe(*step))  # type: ignore[method-assign]
    loop.reset()
    run(loop, 40)
    stored = loop.replay.export_rows(0, 40)
    assert torch.equal(torch.stack([reward for reward, _ in seen], 1), stored["rewards"])
    # The step after the end of an episode is a start.
    assert torch.equal(torch.stack([done for _, done in seen[:-1]], 1), (stored["flags"][:, 1:] & 4) != 0)


def test_actions_follow_the_network_and_epsilon() -> None:
    """Without updates and with epsilon 0, every stored action is greedy for its stored observation."""
    loop = loop_of(epsilon_start=0.0, epsilon_end=0.0, learning_starts=1000)
    loop.reset()
    run(loop, 10)
    stored = loop.replay.export_rows(0, 10)
    q = loop.learner.agent.network(stored["frames"].flatten(1, 2))
    assert torch.equal(q.argmax(-1), stored["actions"].flatten(1).long())


def test_due_updates_are_made_before_the_next_tick() -> None:
    """Before the tick that plays steps 41 and 42, (40 - 8) * 1 / 4 updates are due."""
    loop = loop_of()
    loop.reset()
    run(loop, 4)
    assert loop.learner.updates == 0
    run(loop, 17)
    assert loop.step == 42
    assert loop.learner.updates == 8


@pytest.mark.parametrize(
    ("groups", "overlapped", "order"),
    [
        (1, False, "send0 recv0 learn add choose0"),
        (1, True, "send0 learn recv0 add choose0"),
        # While one group steps, actions are chosen for the other.
        (2, True, "send0 choose1 send1 learn recv0 choose0 recv1 add"),
        (2, False, "send0 choose1 send1 recv0 choose0 recv1 learn add"),
    ],
)
def test_order_of_calls_with_groups_and_overlap(groups: int, overlapped: bool, order: str) -> None:
    loop, calls = loop_of(groups=groups, overlapped=overlapped), []

    def record(part: Any, method: str, name: str) -> None:
        call = getattr(part, method)

        def wrapper(*args: Any) -> Any:
            calls.append(name)
            return call(*args)

        setattr(part, method, wrapper)

    loop.reset()
    for number, group in enumerate(loop.groups):
        for part, method in ((group.envs, "send"), (group.envs, "recv"), (group, "choose")):
            record(part, method, f"{method}{number}")
    record(loop.learner, "run_due_updates", "learn")
    record(loop.replay, "add", "add")
    run(loop, 2)
    assert " ".join(calls) == f"{order} {order}"


def test_groups_do_not_change_the_transitions() -> None:
    """With greedy actions, two groups of one environment behave like one group of two."""
    stored = []
    for groups in (1, 2):
        loop = loop_of(groups=groups, epsilon_start=0.0, epsilon_end=0.0, learning_starts=1000, capacity=200)
        loop.reset()
        run(loop, 40)
        stored.append(loop.replay.export_rows(0, 40))
    for name, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][name]), name


def test_statistics_are_unscaled_episode_returns_and_lengths() -> None:
    """Means over ended episodes equal those of the same episodes replayed."""
    loop = loop_of(capacity=200)
    loop.reset()
    run(loop, 60)
    actions = loop.replay.export_rows(0, 60)["actions"].numpy().astype(np.int64)
    replayed = task_pack(FakePack())
    replayed.reset()
    total, length = np.zeros((3, 2)), np.zeros((3, 2))
    ended: dict[str, list[float]] = {f"train/{metric}/{name}": [] for name in NAMES for metric in ("return", "length")}
    for row in range(60):
        replayed.send(actions[:, row])
        step = replayed.recv()
        total, length = total + step.reward, length + 1
        for task, env in np.argwhere(step.done):
            ended[f"train/return/{NAMES[task]}"].append(total[task, env])
            ended[f"train/length/{NAMES[task]}"].append(length[task, env])
        total, length = total * ~step.done, length * ~step.done
    assert all(ended.values())
    assert loop.statistics.row() == pytest.approx({name: np.mean(values) for name, values in ended.items()})


def resumed_from(loop: Loop, fresh: Loop, with_rows: bool = True) -> Loop:
    """Restore a fresh loop from the saved state of another loop."""
    state = saved(loop.learner, loop=loop)
    restore(fresh.learner, state, loop.replay if with_rows else None)
    fresh.load_state_dict(state["loop"], rows_restored=with_rows)
    return fresh


@pytest.mark.parametrize("stops", [[0], [1], [33], [3, 4, 5, 30, 50]])
@pytest.mark.parametrize(
    ("replay_kind", "turns"),
    [
        (UniformReplay, {}),
        (PrioritizedReplay, {}),
        (UniformReplay, {"groups": 2, "overlapped": True}),
        (PrioritizedReplay, {"groups": 2, "overlapped": True, "pinned": True}),
    ],
)
def test_run_resumed_several_times_is_bit_identical_to_an_uninterrupted_run(
    replay_kind: type[Replay], turns: dict[str, Any], stops: list[int]
) -> None:
    uninterrupted = loop_of(replay_kind, **turns)
    uninterrupted.reset()
    run(uninterrupted, 70)
    resumed, played = loop_of(replay_kind, **turns), 0
    resumed.reset()
    for stop in stops:
        run(resumed, stop - played)
        played = stop
        resumed = resumed_from(resumed, loop_of(replay_kind, weights_seed=9, **turns))
    run(resumed, 70 - played)
    assert resumed.step == uninterrupted.step == 140
    assert resumed.learner.updates == uninterrupted.learner.updates > 20
    for name, tensor in uninterrupted.learner.agent.network.state_dict().items():
        assert torch.equal(tensor, resumed.learner.agent.network.state_dict()[name]), name
    assert uninterrupted.statistics.row() == resumed.statistics.row()
    assert uninterrupted.learner.read_metrics() == resumed.learner.read_metrics()


def test_run_resumed_without_its_replay_refills_it_before_learning() -> None:
    loop = loop_of(learning_starts=20)
    loop.reset()
    run(loop, 30)
    made = loop.learner.updates
    assert made > 0
    resumed = resumed_from(loop, loop_of(learning_starts=20), with_rows=False)
    assert resumed.step == 60
    run(resumed, 11)  # the last of these ticks starts at step 80
    assert resumed.learner.updates == made
    run(resumed, 3)  # the last of these ticks starts at step 86: 6 steps give one update of 4 samples
    assert resumed.learner.updates == made + 1


def test_clock_accumulates_and_is_reset_by_reading() -> None:
    clock = Clock(("act", "learn"))
    with clock.time("act"):
        pass
    with clock.time("act"):
        pass
    first = clock.read()
    assert first["act"] > 0
    assert first["learn"] == 0
    assert clock.read() == {"act": 0.0, "learn": 0.0}


@pytest.mark.parametrize("groups", [1, 2])
def test_pinned_block_transfer_does_not_change_training(groups: int) -> None:
    """Copying steps in blocks, as for a GPU, gives the same run as memory shared by emulators and learner."""
    loops = [loop_of(groups=groups, pinned=pinned) for pinned in (False, True)]
    for loop in loops:
        loop.reset()
        run(loop, 50)
    shared, pinned = (loop.replay.export_rows(10, 50) for loop in loops)
    for name, tensor in shared.items():
        assert torch.equal(tensor, pinned[name]), name
    for name, tensor in loops[0].learner.agent.network.state_dict().items():
        assert torch.equal(tensor, loops[1].learner.agent.network.state_dict()[name]), name


def test_state_with_another_number_of_groups_is_refused() -> None:
    loop = loop_of()
    loop.reset()
    with pytest.raises(ValueError, match="groups must be 1, as in the saved run, got 2"):
        resumed_from(loop, loop_of(groups=2))
