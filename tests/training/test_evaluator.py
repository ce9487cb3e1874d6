"""Evaluation: whole episodes with separate seeds, independent of tasks and waves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtrl_cli.errors import Stopped
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.training.evaluator import Episodes, Evaluator, metrics, ranking, summarise
from tests.helpers.fake_pack import FakeEnv, FakePack, PrefersLastAction

CPU = torch.device("cpu")


def evaluator(pack: FakePack, **changes: Any) -> Evaluator:
    settings: dict[str, Any] = {"episodes": 3, "max_steps": 100, "epsilon": 0.0, "seed": 5, "num_threads": 1, "device": CPU}
    return Evaluator(pack, **(settings | changes))


def play(pack: FakePack, **changes: Any) -> Episodes:
    network: MultiTaskNetwork = PrefersLastAction(pack)  # type: ignore[assignment]
    return evaluator(pack, **changes).run(network, lambda: None)


def replayed_return(pack: FakePack, task: int, played: Episodes) -> float:
    """Replay a task's first episode from its seed and actions, and return its return."""
    seed, actions = played.first[pack.tasks[task].name]
    env = FakeEnv(pack.tasks[task])
    env.reset(seed)
    total, over = 0.0, False
    for action in actions:
        assert not over
        _, reward, terminated, truncated = env.step(action)
        total, over = total + reward, terminated or truncated
    assert over
    return total


def test_every_task_plays_its_episodes_to_the_end() -> None:
    """A greedy episode of L steps returns L times the last action's number, plus up to 0.1 per step."""
    pack = FakePack()
    played = play(pack, episodes=20)
    assert played.cut == {"short": 0, "middle": 0, "long": 0}
    assert pack.training == [False] * 3
    for task in pack.tasks:
        returns = played.returns[task.name]
        assert len(returns) == 20
        assert len(set(returns)) > 4
        best, longest = task.num_actions - 1, {"short": 6, "middle": 12, "long": 40}[task.name]
        for value in returns:
            assert any(best * length - 1e-4 <= value <= (best + 0.1) * length + 1e-4 for length in range(1, longest + 1))


def test_first_episode_can_be_replayed() -> None:
    pack = FakePack()
    played = play(pack, epsilon=0.5)
    for task in range(3):
        assert replayed_return(pack, task, played) == pytest.approx(played.returns[pack.tasks[task].name][0], rel=1e-5)


def test_returns_are_reproducible_and_depend_on_the_seed() -> None:
    assert play(FakePack(), epsilon=0.3) == play(FakePack(), epsilon=0.3)
    assert play(FakePack(), seed=6).returns != play(FakePack()).returns


def test_episodes_depend_neither_on_the_number_of_tasks_nor_on_their_order() -> None:
    """A greedy network plays the same episodes of a task without other tasks, with other tasks, and in another position."""
    together = play(FakePack())
    for name in ("short", "middle", "long"):
        assert play(FakePack([name])).returns[name] == together.returns[name]
    shuffled = play(FakePack(["long", "short", "middle"]))
    assert shuffled.returns == together.returns
    assert shuffled.first == together.first


@pytest.mark.parametrize(("episodes", "waves"), [(1, [1]), (32, [32]), (33, [32, 1]), (70, [32, 32, 6])])
def test_more_than_32_episodes_are_played_in_waves(episodes: int, waves: list[int]) -> None:
    pack = FakePack()
    played = play(pack, episodes=episodes)
    assert [len(played.returns[task.name]) for task in pack.tasks] == [episodes] * 3
    assert len(pack.envs) == 3 * sum(waves)
    if episodes == 70:  # episodes differ between waves
        returns = played.returns["long"]
        assert len({tuple(returns[:6]), tuple(returns[32:38]), tuple(returns[64:])}) == 3
        assert returns[:32] == play(FakePack(), episodes=32).returns["long"]
    assert all(env.closed for env in pack.envs)


def test_episode_beyond_the_step_limit_is_cut_and_counts_with_its_return_so_far() -> None:
    whole, cut = play(FakePack(), episodes=30), play(FakePack(), episodes=30, max_steps=5)
    for name, best in (("short", 1), ("middle", 3), ("long", 2)):
        assert 0 < cut.cut[name] < 30
        pairs = list(zip(whole.returns[name], cut.returns[name], strict=True))
        shortened = [(one, other) for one, other in pairs if one != other]
        assert len(shortened) == cut.cut[name]
        for one, other in shortened:  # five steps, and at least one more in the whole episode
            assert 5 * best - 1e-4 <= other <= 5 * (best + 0.1) + 1e-4
            assert one >= other + best - 1e-4


def test_episode_that_ends_at_the_step_limit_is_not_cut() -> None:
    pack = FakePack(["long"])
    length = len(play(pack, episodes=1).first["long"][1])
    assert play(FakePack(["long"]), episodes=1, max_steps=length).cut["long"] == 0
    assert play(FakePack(["long"]), episodes=1, max_steps=length - 1).cut["long"] == 1


def test_stopped_evaluation_closes_its_environments() -> None:
    pack, steps = FakePack(), []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 4:
            raise Stopped(15)

    network: MultiTaskNetwork = PrefersLastAction(pack)  # type: ignore[assignment]
    with pytest.raises(Stopped):
        evaluator(pack).run(network, stop)
    assert len(steps) == 4
    assert all(env.closed for env in pack.envs)


def test_random_actions_have_probability_epsilon() -> None:
    """In the task `long`, the best of three actions gives 2 per step, random actions 1 on average."""
    one = play(FakePack(["long"]), episodes=64, epsilon=0.0)
    half = play(FakePack(["long"]), episodes=64, epsilon=0.5)
    assert np.sum(half.returns["long"]) / np.sum(one.returns["long"]) == pytest.approx(0.75, abs=0.06)


# -- summaries ------------------------------------------------------------------------------------------------------------------

PLAYED = Episodes({"short": [0.0, 10.0], "long": [5.0, 15.0]}, {"short": 0, "long": 1})


def test_summary_equals_hand_computed_scores() -> None:
    """Random play returns 0 and the reference 10: scores are 0 and 1 for short, 0.5 and 1.5 for long."""
    summary = summarise(PLAYED, FakePack(["short", "long"]), step=1000, checkpoint="best")
    assert (summary["step"], summary["checkpoint"], summary["episodes"]) == (1000, "best", 2)
    short, long = summary["tasks"]["short"], summary["tasks"]["long"]
    assert (short["mean"], short["std"], short["returns"], short["score"], short["cut"]) == (5.0, 5.0, [0.0, 10.0], 0.5, 0)
    assert (long["mean"], long["score"], long["cut"]) == (10.0, 1.0, 1)
    assert 0.0 <= short["ci"][0] <= 5.0 <= short["ci"][1] <= 10.0
    assert (summary["over_tasks"]["mean"], summary["over_tasks"]["min"]) == (0.75, 0.5)
    assert ranking(summary) == 0.75
    assert metrics(summary) == {
        "eval/return/short": 5.0,
        "eval/score/short": 0.5,
        "eval/return/long": 10.0,
        "eval/score/long": 1.0,
        "eval/score/mean": 0.75,
        "eval/score/median": 0.75,
        "eval/score/iqm": 0.75,
        "eval/score/min": 0.5,
    }


def test_summary_without_reference_scores_has_only_returns() -> None:
    summary = summarise(PLAYED, FakePack(["short", "long"], scores=False), step=1, checkpoint="1")
    assert summary["tasks"]["short"]["mean"] == 5.0
    assert summary["tasks"]["short"]["score"] is None
    assert summary["over_tasks"] == {}
    assert metrics(summary) == {"eval/return/short": 5.0, "eval/return/long": 10.0}
    assert ranking(summary) is None


def test_single_task_without_reference_scores_is_ranked_by_its_return() -> None:
    played = Episodes({"short": [1.0, 2.0]}, {"short": 0})
    assert ranking(summarise(played, FakePack(["short"], scores=False), step=1, checkpoint="1")) == 1.5
