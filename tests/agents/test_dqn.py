"""DQN: losses against hand-computed values, the target network, and settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mtrl_cli.agents.dqn import DQN
from mtrl_cli.agents.value_scale import ClipRewards, NoValueScale, PopArt, ReturnNorm, ValueScale
from mtrl_cli.networks.heads import C51Head, DuelingHead, Head, HLGaussHead, PlainHead, QuantileHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.replay.buffers import Batch
from tests.helpers import learners
from tests.helpers.fake_tasks import stream_of
from tests.helpers.value_tables import ONLINE, STATES, Table, one_hot

SETTINGS = {**learners.SETTINGS, "batch_size": 3, "samples_per_step": 1.0, "gamma": 0.5, "double": False, "target_period": 1}

# One task of three states and two actions.
TARGET = [[[0.0, 0.0], [8.0, 2.0], [6.0, 4.0]]]


def agent(online: list, target: list, value_scale: ValueScale | None = None, names: tuple[str, ...] = ("pong",), **changes: Any) -> DQN:
    compile_with: Callable = changes.pop("compile_with", lambda function: function)
    network: MultiTaskNetwork = Table(online)  # type: ignore[assignment]
    made = DQN(network, value_scale or NoValueScale(stream_of(names)), names, compile_with, **(SETTINGS | changes))
    made.target_network.load_state_dict(Table(target).state_dict())
    return made


def batch() -> Batch:
    return Batch(
        observation=one_hot([[0, 1, 2]]),
        action=torch.tensor([[1, 0, 1]]),
        rewards=torch.tensor([[[1.0, 2.0, 4.0], [2.0, 0.0, 0.0], [0.0, 6.0, 0.0]]]),
        steps=torch.tensor([[3, 1, 2]]),
        terminated=torch.tensor([[False, True, False]]),
        next_observation=one_hot([[1, 1, 2]]),
        weight=torch.tensor([[1.0, 0.5, 1.0]]),
        index=torch.zeros(1, 3, dtype=torch.int64),
    )


# -- losses -------------------------------------------------------------------------------------------------------------------


def test_losses_equal_hand_computed_values() -> None:
    """gamma 0.5; the target network's best values are 8 in state 1 and 6 in state 2.

    1 + 2/2 + 4/4 + 8/8 = 4 against 2: error 2, Huber 1.5
    2, terminated, against 3: error 1, Huber 0.5, weight 0.5
    0 + 6/2 + 6/4 = 4.5 against -1: error 5.5, Huber 5
    """
    losses = agent(ONLINE, TARGET).losses(batch())
    assert losses.error_KB.tolist() == [[2.0, 1.0, 5.5]]
    assert losses.loss_KB.tolist() == [[1.5, 0.25, 5.0]]
    assert losses.q_K.tolist() == [pytest.approx((2 + 3 - 1) / 3)]


def test_double_selects_actions_with_the_online_network() -> None:
    """In state 1 the online network selects action 1, which the target network values at 2: 1 + 1 + 1 + 2/8 = 3.25 against 2."""
    losses = agent(ONLINE, TARGET, double=True).losses(batch())
    assert losses.error_KB.tolist() == [[1.25, 1.0, 5.5]]
    assert losses.loss_KB.tolist() == [[0.75, 0.25, 5.0]]


def test_errors_are_squared_for_huber_zero() -> None:
    assert agent(ONLINE, TARGET, huber=0.0).losses(batch()).loss_KB.tolist() == [[2.0, 0.25, 15.125]]


def test_rewards_are_clipped_one_by_one_in_the_learner_only() -> None:
    """1 + 1/2 + 1/4 + 8/8 = 2.75 against 2; 1 against 3; 1/2 + 6/4 = 2 against -1."""
    given = batch()
    losses = agent(ONLINE, TARGET, ClipRewards(stream_of(["pong"]), limit=1.0)).losses(given)
    assert losses.error_KB.tolist() == [[0.75, 2.0, 3.0]]
    assert given.rewards.max() == 6.0


def test_clip_limits_rewards_and_none_keeps_rewards() -> None:
    rewards = torch.tensor([-200.0, -0.5, 0.0, 2.0])
    assert ClipRewards(stream_of(["pong"])).rewards(rewards).tolist() == [-1.0, -0.5, 0.0, 1.0]
    assert ClipRewards(stream_of(["pong"]), limit=10.0).rewards(rewards).tolist() == [-10.0, -0.5, 0.0, 2.0]
    assert NoValueScale(stream_of(["pong"])).rewards(rewards).tolist() == rewards.tolist()


@pytest.mark.parametrize("double", [False, True])
def test_gradient_flows_only_through_the_values_of_chosen_actions(double: bool) -> None:
    """d Huber / d q = -clip(error), times the weight; nothing flows into the target."""
    made = agent(ONLINE, TARGET, double=double)
    made.losses(batch()).loss_KB.sum().backward()
    assert made.network.values.grad.tolist() == [[[0.0, -1.0], [0.5, 0.0], [0.0, -1.0]]]
    assert made.target_network.values.grad is None


@pytest.mark.parametrize("double", [False, True])
def test_target_never_uses_an_action_that_the_task_does_not_have(double: bool) -> None:
    """The first task has one action, of value -4, the second has two. All rewards are 0, so targets are -4/8 and 3/8."""
    online = [[[-9.0, None]] * 3, [[5.0, 7.0]] * 3]
    target = [[[-4.0, None]] * 3, [[1.0, 3.0]] * 3]
    made = agent(online, target, names=("one", "two"), double=double)
    given = Batch(
        observation=one_hot([[0], [0]]),
        action=torch.tensor([[0], [1]]),
        rewards=torch.zeros(2, 1, 3),
        steps=torch.full((2, 1), 3),
        terminated=torch.zeros(2, 1, dtype=torch.bool),
        next_observation=one_hot([[1], [1]]),
        weight=torch.ones(2, 1),
        index=torch.zeros(2, 1, dtype=torch.int64),
    )
    assert made.losses(given).error_KB.tolist() == [[8.5], [6.625]]


def test_sample_of_weight_zero_has_no_loss_and_no_gradient() -> None:
    made, given = agent(ONLINE, TARGET), batch()
    given.weight = torch.tensor([[0.0, 0.0, 0.0]])
    losses = made.losses(given)
    losses.loss_KB.sum().backward()
    assert losses.loss_KB.tolist() == [[0.0, 0.0, 0.0]]
    assert not made.network.values.grad.any()


def test_stacked_frames_reach_the_network_as_channels() -> None:
    seen = []

    class RecordingTable(Table):
        def outputs(self, observation: torch.Tensor) -> torch.Tensor:
            seen.append(observation.shape)
            return super().outputs(observation[..., :STATES])

    made, given = agent(ONLINE, TARGET), batch()
    made.network, made.target_network = RecordingTable(ONLINE), RecordingTable(TARGET)
    given.observation = torch.cat([given.observation] * 2, 2)
    given.next_observation = torch.cat([given.next_observation] * 2, 2)
    made.losses(given)
    assert set(seen) == {(1, 3, 2 * STATES)}


def test_losses_are_compiled_once() -> None:
    compiled = []

    def compile_with(function: Callable) -> Callable:
        compiled.append(function)
        return function

    made = agent(ONLINE, TARGET, compile_with=compile_with)
    made.losses(batch())
    assert len(compiled) == 1


# -- value scales and heads -----------------------------------------------------------------------------------------------------


def tasks_batch(samples: int = 8) -> Batch:
    """Two tasks of three states, one with rewards at the scale of 1000."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randint(STATES, (2, 2, samples), generator=draw)
    return Batch(
        observation=one_hot(states[0].tolist()),
        action=torch.randint(2, (2, samples), generator=draw),
        rewards=torch.randn(2, samples, 3, generator=draw) * torch.tensor([1.0, 1000.0])[:, None, None],
        steps=torch.full((2, samples), 3),
        terminated=torch.rand(2, samples, generator=draw) < 0.3,
        next_observation=one_hot(states[1].tolist()),
        weight=torch.ones(2, samples),
        index=torch.zeros(2, samples, dtype=torch.int64),
    )


def network_of(head: type[Head]) -> MultiTaskNetwork:
    torch.manual_seed(0)
    torso = MLP(hidden=[8])
    return MultiTaskNetwork(HardSharing(torso, [(STATES,)] * 2), head(8, [2, 3]), observation_scale=1.0)


def agent_of(head: type[Head], scale: ValueScale, **changes: Any) -> DQN:
    compile_with: Callable = changes.pop("compile_with", lambda function: function)
    return DQN(network_of(head), scale, ["pong", "qbert"], compile_with, **(SETTINGS | changes))


@pytest.mark.parametrize("head", [PlainHead, DuelingHead, QuantileHead])
def test_popart_losses_use_normalised_targets(head: type[Head]) -> None:
    """After the statistics change, errors are divided by the scale, and unnormalized targets and values stay the same."""
    plain, scale = agent_of(head, NoValueScale(stream_of(["a", "b"]))), PopArt(stream_of(["a", "b"]), step_size=0.5)
    normalised, given = agent_of(head, scale), tasks_batch()
    expected = plain.losses(given)
    first = normalised.losses(given)
    assert torch.equal(first.loss_KB, expected.loss_KB)
    with torch.no_grad():
        normalised.losses(given)  # re-evaluating a batch does not update the statistics
    normalised.after_step(given, first)
    assert scale.scale_K[1] > 100
    second = normalised.losses(given)
    assert torch.allclose(second.error_KB * scale.scale_K[:, None], expected.error_KB, rtol=1e-4, atol=1e-3)
    assert torch.allclose(second.q_K, expected.q_K, rtol=1e-4, atol=1e-4 * float(scale.scale_K[1]))
    mean_K = scale.mean_K.clone()
    normalised.after_step(given, second)  # repeated targets do not change the moments
    assert torch.allclose(scale.mean_K, mean_K, rtol=1e-3)


def test_popart_moments_are_those_of_the_targets_of_the_update() -> None:
    scale, given = PopArt(stream_of(["pong"])), batch()
    made = agent(ONLINE, TARGET, scale, target_period=1000)
    made.network.head.rescale = made.target_network.head.rescale = lambda factor_K, offset_K: None  # type: ignore[assignment]
    given.weight[0, 1] = 0.0  # as in test_losses_equal_hand_computed_values: targets 4, 2 and 4.5; 2 is masked
    made.after_step(given, made.losses(given))
    assert scale.mean_K.tolist() == [4.25]
    assert scale.scale_K.tolist() == pytest.approx([(18.125 - 0.01 * 4.25**2) ** 0.5])  # one step of 0.01 has been taken


def test_reward_factors_apply_before_the_value_scale() -> None:
    scale, given = ClipRewards(stream_of(["pong"]), limit=3.0), batch()
    made = agent(ONLINE, TARGET, scale, reward_factors={"pong": 2.0})
    # 2 + 3/2 + 3/4 + 8/8 = 5.25 against 2; 3 against 3; 3/2 + 6/4 = 3 against -1
    assert made.losses(given).error_KB.tolist() == [[3.25, 0.0, 4.0]]
    seen = []
    scale.observe = lambda reward_KN, done_KN: seen.append((reward_KN, done_KN))  # type: ignore[method-assign]
    done = torch.tensor([[True, False]])
    made.observe(torch.tensor([[1.0, -2.0]]), done)
    assert seen[0][0].tolist() == [[2.0, -4.0]]
    assert seen[0][1] is done


@pytest.mark.parametrize("head", [PlainHead, DuelingHead, QuantileHead, C51Head, HLGaussHead])
def test_losses_compile_to_one_graph_without_recompilation(head: type[Head]) -> None:
    """No graph break, no synchronization with the device, and no recompilation when statistics change."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    bounded = head in (C51Head, HLGaussHead)
    scale = (ReturnNorm if bounded else PopArt)(stream_of(["a", "b"]))
    compiled = agent_of(head, scale, compile_with=lambda function: torch.compile(function, backend=backend, fullgraph=True, dynamic=False))
    eager = agent_of(head, (ReturnNorm if bounded else PopArt)(stream_of(["a", "b"])))
    for _ in range(3):
        for made in (compiled, eager):
            made.observe(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))
        losses, expected = compiled.losses(tasks_batch()), eager.losses(tasks_batch())
        assert torch.allclose(losses.loss_KB, expected.loss_KB, rtol=1e-4, atol=1e-5)
        for made in (compiled, eager):
            made.after_step(tasks_batch(), losses if made is compiled else expected)
            made.sync_target()
    assert len(graphs) == 1


# -- target network -------------------------------------------------------------------------------------------------------------


def values(network: nn.Module) -> list:
    return network.values.tolist()


def test_sync_copies_the_network_to_the_target_network() -> None:
    """The learner calls `sync_target` every `target_period` updates. Other updates do not change the target network."""
    made = agent(ONLINE, TARGET, target_period=3)
    assert made.target_period == 3
    made.after_step(batch(), made.losses(batch()))
    assert values(made.target_network) == TARGET
    made.sync_target()
    assert values(made.target_network) == ONLINE


def test_soft_target_update_moves_by_tau_in_every_update() -> None:
    made = agent([[[4.0, 8.0]] * 3], [[[0.0, 0.0]] * 3], target_period=0, target_tau=0.25)
    made.after_step(batch(), made.losses(batch()))
    assert values(made.target_network) == [[[1.0, 2.0]] * 3]
    made.after_step(batch(), made.losses(batch()))  # a quarter of the difference: 1 + 3/4, 2 + 6/4
    assert values(made.target_network) == [[[1.75, 3.5]] * 3]


def test_target_network_starts_as_a_frozen_copy() -> None:
    network: MultiTaskNetwork = Table(ONLINE)  # type: ignore[assignment]
    made = DQN(network, NoValueScale(stream_of(["pong"])), ["pong"], lambda function: function, **SETTINGS)
    assert values(made.target_network) == ONLINE
    with torch.no_grad():
        made.network.values.zero_()
    assert values(made.target_network) == ONLINE
    assert not any(parameter.requires_grad for parameter in made.target_network.parameters())


def test_target_network_is_part_of_the_state() -> None:
    made, fresh = agent(ONLINE, TARGET), agent(ONLINE, ONLINE)
    fresh.load_state_dict(copy.deepcopy(made.state_dict()))
    assert values(fresh.target_network) == TARGET
    assert values(fresh.network) == ONLINE


# -- settings -------------------------------------------------------------------------------------------------------------------


def test_epsilon_of_single_tasks_is_set_by_name() -> None:
    two = [ONLINE[0], ONLINE[0]]
    made = agent(two, two, names=("pong", "qbert"), epsilon_tasks={"qbert": 0.5})
    assert made.epsilon(0).tolist() == [1.0, 1.0]
    assert made.epsilon(100) == pytest.approx(np.array([0.1, 0.5]))


def test_popart_is_initialised_with_the_first_targets() -> None:
    """The first losses then have unit scale for targets of any size; other scales need no initialization."""
    scale, given = PopArt(stream_of(["a", "b"])), tasks_batch()
    normalised, plain = agent_of(PlainHead, scale), agent_of(PlainHead, NoValueScale(stream_of(["a", "b"])))
    values = normalised.losses(given).q_K
    before = plain.losses(given)
    for each in (normalised, plain):
        each.initialise_value_scale(given)
    after = normalised.losses(given)
    assert before.error_KB[1].max() > 100
    assert after.error_KB[1].max() < 5
    assert torch.allclose(after.q_K, values, rtol=1e-4, atol=1e-4 * float(scale.scale_K[1]))
    assert torch.equal(plain.losses(given).loss_KB, before.loss_KB)


# -- several draws of a sample ------------------------------------------------------------------------------------------------


def drawn(batch: Batch, observations: list[list[list[int]]], next_observations: list[list[list[int]]]) -> Batch:
    """Return `batch` with several draws of its states, each `[1, 3]`, concatenated."""
    states, next_states = ([[state for draw in draws for state in draw[0]]] for draws in (observations, next_observations))
    batch.observation, batch.next_observation = one_hot(states), one_hot(next_states)
    batch.action = batch.action.repeat(1, len(observations))
    return batch


def test_targets_and_losses_are_means_over_draws() -> None:
    """Sample 0's next state is drawn as 1 and as 2, with best values 8 and 6: its target is 1 + 1 + 1 + 7/8 = 3.875.

    The state of sample 0 is drawn as 0 and as 2, where action 1 has values 2 and -1: errors 1.875 and 4.875, Huber 1.375 and 4.375.
    All draws of the other samples are equal.
    """
    losses = agent(ONLINE, TARGET).losses(drawn(batch(), [[[0, 1, 2]], [[2, 1, 2]]], [[[1, 1, 2]], [[2, 1, 2]]]))
    assert losses.loss_KB.tolist() == [[(1.375 + 4.375) / 2, 0.25, 5.0]]
    assert losses.error_KB.tolist() == [[(1.875 + 4.875) / 2, 1.0, 5.5]]
    assert losses.q_K.tolist() == [pytest.approx((2 + 3 - 1 - 1 + 3 - 1) / 6)]


@pytest.mark.parametrize("head", [PlainHead, DuelingHead, C51Head, HLGaussHead, QuantileHead])
def test_equal_draws_give_the_losses_of_one_draw(head: type[Head]) -> None:
    torch.manual_seed(0)
    made = []
    for loss_draws, target_draws in ((1, 1), (3, 1), (1, 2), (2, 3)):
        torch.manual_seed(1)
        network = MultiTaskNetwork(HardSharing(MLP(hidden=[8]), [(5,), (5,)]), head(8, [4, 2]), observation_scale=1.0)
        learner = DQN(network, NoValueScale(stream_of(("a", "b"))), ("a", "b"), lambda function: function, **SETTINGS | {"double": True})
        random = torch.Generator().manual_seed(2)
        observation, next_observation = torch.rand((2, 2, 6, 1, 5), generator=random)
        action = torch.randint(2, (2, 6), generator=random)
        rewards = torch.rand((2, 6, 3), generator=random)
        losses = learner.losses(
            Batch(
                observation=observation.repeat(1, loss_draws, 1, 1),
                action=action.repeat(1, loss_draws),
                rewards=rewards,
                steps=torch.full((2, 6), 3),
                terminated=torch.arange(12).view(2, 6) % 4 == 0,
                next_observation=next_observation.repeat(1, target_draws, 1, 1),
                weight=torch.rand((2, 6), generator=random),
                index=torch.zeros(2, 6, dtype=torch.int64),
            )
        )
        losses.loss_KB.mean().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
        made.append((losses.loss_KB.detach(), losses.error_KB, losses.q_K, gradient))
    for other in made[1:]:
        for mine, theirs in zip(made[0], other, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_distributions_of_draws_are_mixed() -> None:
    outputs = torch.randn(2, 3, 4, 51)  # tasks, draws, samples
    c51, quantile = C51Head(8, [4, 2]), QuantileHead(8, [4, 2])
    assert torch.allclose(c51.mixture(outputs).softmax(-1), outputs.softmax(-1).mean(1), atol=1e-6)
    assert torch.allclose(c51.expectation(c51.mixture(outputs)), c51.expectation(outputs).mean(1), atol=1e-4)
    assert torch.equal(quantile.mixture(outputs).sort(-1)[0], outputs.transpose(1, 2).flatten(2).sort(-1)[0])
    assert torch.allclose(quantile.expectation(quantile.mixture(outputs)), outputs.mean((1, 3)), atol=1e-5)
