"""The loop: what is stored is what was played, updates keep step, and a run goes on identically from its state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtrl_cli.checkpoints.state_tree import flatten, unflatten
from mtrl_cli.envs.vector_tasks import VectorTasks
from mtrl_cli.replay.buffers import PrioritizedReplay, Replay, UniformReplay
from mtrl_cli.training.loop import Clock, Loop
from tests.helpers.fake_pack import FakePack
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
def test_what_is_stored_is_what_was_played(groups: int) -> None:
    """The games played again with the stored actions give the stored frames, rewards and ends, in however many groups they were played."""
    loop = loop_of(capacity=200, groups=groups)
    loop.reset()
    run(loop, 60)
    stored = loop.replay.export_rows(0, 60)
    again = task_pack(FakePack())
    observation, start = again.reset(), np.ones((3, 2), bool)
    ends = 0
    for row in range(60):
        assert np.array_equal(stored["frames"][:, row].numpy(), observation)
        flags = stored["flags"][:, row].numpy()
        assert np.array_equal((flags & 4) != 0, start)
        again.send(stored["actions"][:, row].numpy().astype(np.int64))
        step = again.recv()
        assert np.array_equal(stored["rewards"][:, row].numpy(), step.reward)
        assert np.array_equal((flags & 1) != 0, step.terminated)
        assert np.array_equal((flags & 2) != 0, step.truncated & ~step.terminated)
        observation, start = step.observation, step.done
        ends += int(step.done.sum())
    assert ends > 10
    flags = stored["flags"]
    life_lost = ((flags[:, :-1] & 1) != 0) & ((flags[:, 1:] & 4) == 0)
    assert life_lost.any(), "the test holds no life that was lost"
    assert ((flags & 2) != 0).any(), "the test holds no truncation"


def test_the_agent_sees_every_reward_and_end_once() -> None:
    loop, seen = loop_of(capacity=200), []
    observe = loop.learner.agent.observe
    loop.learner.agent.observe = lambda *step: (seen.append([each.clone() for each in step]), observe(*step))  # type: ignore[method-assign]
    loop.reset()
    run(loop, 40)
    stored = loop.replay.export_rows(0, 40)
    assert torch.equal(torch.stack([reward for reward, _ in seen], 1), stored["rewards"])
    # An episode that ended is followed by a start.
    assert torch.equal(torch.stack([done for _, done in seen[:-1]], 1), (stored["flags"][:, 1:] & 4) != 0)


def test_actions_follow_the_network_and_epsilon() -> None:
    """With epsilon 0 every stored action is the best of its stored observation, as long as nothing is learned."""
    loop = loop_of(epsilon_start=0.0, epsilon_end=0.0, learning_starts=1000)
    loop.reset()
    run(loop, 10)
    stored = loop.replay.export_rows(0, 10)
    q = loop.learner.agent.network(stored["frames"].flatten(1, 2))
    assert torch.equal(q.argmax(-1), stored["actions"].flatten(1).long())


def test_updates_keep_step_with_play() -> None:
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
        # While one group is being played, actions are chosen for the other.
        (2, True, "send0 choose1 send1 learn recv0 choose0 recv1 add"),
        (2, False, "send0 choose1 send1 recv0 choose0 recv1 learn add"),
    ],
)
def test_who_works_while_the_emulators_do(groups: int, overlapped: bool, order: str) -> None:
    loop, calls = loop_of(groups=groups, overlapped=overlapped), []

    def noted(part: Any, method: str, name: str) -> None:
        call = getattr(part, method)

        def wrapper(*args: Any) -> Any:
            calls.append(name)
            return call(*args)

        setattr(part, method, wrapper)

    loop.reset()
    for number, group in enumerate(loop.groups):
        for part, method in ((group.envs, "send"), (group.envs, "recv"), (group, "choose")):
            noted(part, method, f"{method}{number}")
    noted(loop.learner, "run_due_updates", "learn")
    noted(loop.replay, "add", "add")
    run(loop, 2)
    assert " ".join(calls) == f"{order} {order}"


def test_groups_play_the_environments_that_one_would_play() -> None:
    """With actions that do not depend on chance, two groups of one environment are one group of two."""
    stored = []
    for groups in (1, 2):
        loop = loop_of(groups=groups, epsilon_start=0.0, epsilon_end=0.0, learning_starts=1000, capacity=200)
        loop.reset()
        run(loop, 40)
        stored.append(loop.replay.export_rows(0, 40))
    for name, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][name]), name


def test_statistics_show_the_games_own_scores() -> None:
    """Means over the games that ended, added up from the same games played again."""
    loop = loop_of(capacity=200)
    loop.reset()
    run(loop, 60)
    actions = loop.replay.export_rows(0, 60)["actions"].numpy().astype(np.int64)
    again = task_pack(FakePack())
    again.reset()
    total, length = np.zeros((3, 2)), np.zeros((3, 2))
    ended: dict[str, list[float]] = {f"train/{what}/{name}": [] for name in NAMES for what in ("return", "length")}
    for row in range(60):
        again.send(actions[:, row])
        step = again.recv()
        total, length = total + step.reward, length + 1
        for task, env in np.argwhere(step.done):
            ended[f"train/return/{NAMES[task]}"].append(total[task, env])
            ended[f"train/length/{NAMES[task]}"].append(length[task, env])
        total, length = total * ~step.done, length * ~step.done
    assert all(ended.values())
    assert loop.statistics.row() == pytest.approx({name: np.mean(values) for name, values in ended.items()})


def saved(loop: Loop) -> dict[str, Any]:
    """Its state, through the form in which it is written."""
    learner = loop.learner
    state = {
        "model": learner.agent.network.state_dict(),
        "agent": learner.agent.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "loop": loop.state_dict(),
    }
    tensors: dict[str, torch.Tensor] = {}
    tree = flatten(state, tensors)
    return unflatten(tree, {name: tensor.clone() for name, tensor in tensors.items()})


def restored(loop: Loop, state: dict[str, Any], rows_of: Replay | None) -> Loop:
    if rows_of is not None:
        oldest = max(0, rows_of.rows - rows_of.capacity_rows)
        loop.replay.import_rows(oldest, rows_of.export_rows(oldest, rows_of.rows))
    loop.learner.agent.network.load_state_dict(state["model"])
    loop.learner.agent.load_state_dict(state["agent"])
    loop.learner.optimizer.load_state_dict(state["optimizer"])
    loop.load_state_dict(state["loop"], rows_restored=rows_of is not None)
    return loop


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
def test_a_run_stopped_and_resumed_any_number_of_times_ends_like_one_left_alone(
    replay_kind: type[Replay], turns: dict[str, Any], stops: list[int]
) -> None:
    alone = loop_of(replay_kind, **turns)
    alone.reset()
    run(alone, 70)
    resumed, played = loop_of(replay_kind, **turns), 0
    resumed.reset()
    for stop in stops:
        run(resumed, stop - played)
        played = stop
        resumed = restored(loop_of(replay_kind, weights_seed=9, **turns), saved(resumed), resumed.replay)
    run(resumed, 70 - played)
    assert resumed.step == alone.step == 140
    assert resumed.learner.updates == alone.learner.updates > 20
    for name, tensor in alone.learner.agent.network.state_dict().items():
        assert torch.equal(tensor, resumed.learner.agent.network.state_dict()[name]), name
    assert alone.statistics.row() == resumed.statistics.row()
    assert alone.learner.read_metrics() == resumed.learner.read_metrics()


def test_without_its_replay_a_run_gathers_anew_before_it_learns_on() -> None:
    loop = loop_of(learning_starts=20)
    loop.reset()
    run(loop, 30)
    made = loop.learner.updates
    assert made > 0
    resumed = restored(loop_of(learning_starts=20), saved(loop), None)
    assert resumed.step == 60
    run(resumed, 11)  # the last of these ticks begins at step 80
    assert resumed.learner.updates == made
    run(resumed, 3)  # and this at 86: 6 steps are one update of 4 samples
    assert resumed.learner.updates == made + 1


def test_the_clock_adds_up_and_starts_anew_at_every_reading() -> None:
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
def test_what_goes_over_in_one_block_is_what_was_there(groups: int) -> None:
    """A run whose steps are copied in blocks, as to a GPU, is the run whose emulators and learner share memory."""
    loops = [loop_of(groups=groups, pinned=pinned) for pinned in (False, True)]
    for loop in loops:
        loop.reset()
        run(loop, 50)
    shared, pinned = (loop.replay.export_rows(10, 50) for loop in loops)
    for name, tensor in shared.items():
        assert torch.equal(tensor, pinned[name]), name
    for name, tensor in loops[0].learner.agent.network.state_dict().items():
        assert torch.equal(tensor, loops[1].learner.agent.network.state_dict()[name]), name


def test_a_state_of_another_number_of_groups_is_refused() -> None:
    loop = loop_of()
    loop.reset()
    with pytest.raises(ValueError, match="1 groups of environments, this one 2"):
        restored(loop_of(groups=2), saved(loop), loop.replay)
