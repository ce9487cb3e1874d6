"""Learner: when updates are due, the parts of an update, metrics, losses that are not finite, and exact resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.agents.value_scale import NoValueScale
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.errors import RunError
from mtrl_cli.networks.sharing import HardSharing, IndependentSharing, Sharing
from mtrl_cli.replay.buffers import Batch, PrioritizedReplay, Replay, Transition, UniformReplay
from mtrl_cli.task_weights.base import TaskWeights
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.losses import Uniform
from mtrl_cli.task_weights.tape import TapedGradients, tape_for
from mtrl_cli.training.callbacks import Callback
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.optimizers import Adam
from tests.helpers.fake_tasks import stream_of, tasks_of, weights_of
from tests.helpers.learners import NAMES, SPEC, fill, learner_of, parameters, resumed_from, rows
from tests.helpers.replay_reference import transition

# -- when updates are due -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "samples_per_step", "due"),
    [
        (32, 8.0, {99: 0, 100: 0, 103: 0, 104: 1, 107: 1, 108: 2, 132: 8, 1100: 250}),
        (32, 0.5, {100: 0, 163: 0, 164: 1, 228: 2}),  # one update per 64 steps
        (8, 3.0, {102: 0, 103: 1, 105: 1, 106: 2, 108: 3, 116: 6}),  # one update per 8/3 steps
        (2, 5.0, {101: 2, 102: 5, 103: 7}),  # several updates per step
        (32, 0.1, {419: 0, 420: 1, 740: 2}),
    ],
)
def test_number_of_due_updates_equals_hand_computed_numbers(batch_size: int, samples_per_step: float, due: dict[int, int]) -> None:
    learner = fill(learner_of(batch_size=batch_size, samples_per_step=samples_per_step, learning_starts=100))
    assert {step: learner.updates_due(step) for step in due} == due


@pytest.mark.parametrize("stride", [1, 3, 8, 50])
def test_number_of_updates_does_not_depend_on_the_stride_of_steps(stride: int) -> None:
    learner = fill(learner_of(batch_size=4, samples_per_step=0.7, learning_starts=10))
    for step in range(0, 211, stride):
        learner.run_due_updates(step)
    last = 210 // stride * stride
    assert learner.updates == int((last - 10) * 0.7 / 4)


def test_no_update_is_due_before_the_replay_can_be_sampled() -> None:
    learner = learner_of(batch_size=4, samples_per_step=1.0, learning_starts=0)
    learner.run_due_updates(100)
    assert learner.updates == 0
    fill(learner)
    learner.run_due_updates(101)
    assert learner.updates == 25  # missed updates are made up


def test_refilled_replay_does_not_make_up_for_missed_updates() -> None:
    learner = fill(learner_of(batch_size=4, samples_per_step=1.0, learning_starts=100))
    learner.run_due_updates(140)
    assert learner.updates == 10
    learner.refill_from(200)
    assert [learner.updates_due(step) for step in (200, 299, 300, 303, 304, 340)] == [10, 10, 10, 10, 11, 20]


# -- an update ------------------------------------------------------------------------------------------------------------------


class FakeNetwork(nn.Module):
    """A parameter of each task."""

    def __init__(self, num_tasks: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_tasks))

    def shared_parameters(self) -> list[nn.Parameter]:
        return []

    def own_parameters(self) -> list[nn.Parameter]:
        return [self.values]


class FakeAgent(Agent):
    """One parameter per task with given losses and gradients. Records calls."""

    def __init__(self, losses: list[list[float]], slopes: list[float]):
        self.network = FakeNetwork(len(slopes))  # type: ignore[assignment]
        self.parameter = self.network.values
        self.value_scale = NoValueScale(stream_of(NAMES))
        self.batch_size, self.samples_per_step, self.learning_starts, self.n_step = 2, 2.0, 0, 3
        self._losses, self._slopes = losses, torch.tensor(slopes)
        self.seen: list[Batch] = []
        self.stepped: list[Batch] = []
        self.synced_after: list[int] = []

    def losses(self, batch: Batch) -> Losses:
        self.seen.append(batch)
        # A loss with the given value and the given slope in the parameter.
        through = (self.parameter - self.parameter.detach()) * self._slopes
        loss_KB = torch.tensor(self._losses[len(self.seen) - 1])[:, None] + through[:, None] + torch.tensor([-1.0, 1.0])
        error_KB, q_K = torch.full((2, 2), float(len(self.seen))), torch.tensor([10.0, 20.0]) * len(self.seen)
        return Losses(loss_KB, error_KB, q_K, torch.zeros(2, 2))

    def after_step(self, batch: Any, losses: Losses) -> None:
        self.stepped.append(batch)

    def sync_target(self, names: Any = None) -> None:
        self.synced_after.append(len(self.stepped))


def fake_learner(losses: list[list[float]], slopes: tuple[float, float] = (6.0, 8.0)) -> tuple[Learner, FakeAgent]:
    agent = FakeAgent(losses, list(slopes))
    optimizer = Adam([agent.parameter], lr=0.1, eps=1e-6, weight_decay=0.0, max_grad_norm=0.0)
    learner = Learner(agent, UniformReplay(SPEC, capacity=36), Pipeline(), Uniform(tasks_of(NAMES)), optimizer, NAMES)
    return fill(learner), agent


def test_metrics_are_means_since_the_last_row() -> None:
    """Two updates, losses 1 and 3 of pong and 2 and 10 of qbert; the mean of the tasks' slopes is (3, 4), of norm 5."""
    learner, agent = fake_learner([[1.0, 2.0], [3.0, 10.0], [7.0, 7.0]])
    assert learner.read_metrics() == {}
    learner.update(1)
    learner.update(2)
    assert agent.stepped == agent.seen
    assert learner.read_metrics() == {
        "loss/pong": 2.0,
        "loss/qbert": 6.0,
        "q/mean/pong": 15.0,
        "q/mean/qbert": 30.0,
        "weight/pong": 0.5,
        "weight/qbert": 0.5,
        "grad/norm": pytest.approx(5.0),
    }
    learner.update(3)
    assert learner.read_metrics()["loss/pong"] == 7.0
    assert learner.read_metrics() == {}


@pytest.mark.parametrize(("period", "synced_after"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6])])
def test_target_network_is_synced_every_target_period_updates(period: int, synced_after: list[int]) -> None:
    learner, agent = fake_learner([[1.0, 1.0]] * 7)
    agent.target_period = period
    for step in range(7):
        learner.update(step)
    assert agent.synced_after == synced_after


def test_callbacks_run_in_order_at_each_stage_of_an_update() -> None:
    """Each callback at each moment: before the losses, before and after the optimizer step."""
    calls: list[str] = []

    class Recording(Callback):
        def __init__(self, name: str):
            self.name = name  # type: ignore[misc]

        def before_update(self, step: int) -> None:
            calls.append(f"{self.name} before_update {step}")

        def before_losses(self) -> None:
            assert not agent.seen
            calls.append(f"{self.name} before_losses")

        def before_step(self) -> None:
            assert agent.parameter.grad is not None
            assert not agent.parameter.any()
            calls.append(f"{self.name} before_step")

        def after_step(self) -> None:
            assert agent.parameter.all()
            assert not agent.stepped
            calls.append(f"{self.name} after_step")

    learner, agent = fake_learner([[1.0, 2.0]])
    learner.callbacks = [Recording("a"), Recording("b")]
    learner.update(7)
    moments = ("before_update 7", "before_losses", "before_step", "after_step")
    assert calls == [f"{name} {moment}" for moment in moments for name in "ab"]


def test_losses_use_the_augmented_batch_and_priorities_use_its_errors() -> None:
    class Brighter(Pipeline):
        def __call__(self, batch: Batch) -> Batch:
            batch.observation = batch.observation + 100.0
            return batch

    priorities = []

    class RecordingReplay(UniformReplay):
        def update_priorities(self, batch: Batch, error_KB: torch.Tensor) -> None:
            priorities.append((batch, error_KB))

    agent = FakeAgent([[1.0, 2.0]], [6.0, 8.0])
    optimizer = Adam([agent.parameter], lr=0.1, eps=1e-6, weight_decay=0.0, max_grad_norm=0.0)
    learner = fill(Learner(agent, RecordingReplay(SPEC, capacity=36), Brighter(), Uniform(tasks_of(NAMES)), optimizer, NAMES))
    learner.update(1)
    assert agent.seen[0].action.shape == (2, 2)
    assert (agent.seen[0].observation > 50).all()
    assert priorities[0][0] is agent.seen[0]
    assert priorities[0][1].tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("task", [0, 1])
def test_samples_of_one_independent_task_do_not_affect_another(task: int) -> None:
    """Two learners that differ in one task's rewards end with the same parameters of the other task, bit for bit."""

    def trained(reward: float) -> dict[str, torch.Tensor]:
        learner = learner_of(sharing=IndependentSharing)
        learner.optimizer._max_grad_norm = 0.0  # clipping the joint norm would couple the tasks
        for row in rows(20):
            row["reward"][task] = reward
            learner.replay.add(transition(row))
        for step in range(10):
            learner.update(step)
        return parameters(learner)

    one, other = trained(0.0), trained(1.0)
    changed = torch.stack([(one[name] != other[name]).flatten(1).any(1) for name in one]).any(0)
    assert changed.tolist() == [each == task for each in range(2)]


def test_padding_stays_zero_while_learning() -> None:
    learner = fill(learner_of())
    for step in range(20):
        learner.update(step)
    state = parameters(learner)
    assert not state["sharing.stem.stacked.0:weight"][1, :, 3:].any()
    assert not state["head.advantage.weight"][1, :, 2:].any()
    assert not state["head.advantage.bias"][1, :, 2:].any()


def test_values_converge_to_one_step_rewards() -> None:
    """Every episode has one step; the reward is 1 for action 3 in task 0 and action 0 in task 1, else 0."""
    learner = learner_of(batch_size=32)
    shape = (2, 3)
    random = torch.Generator().manual_seed(0)
    for _ in range(12):
        action = torch.randint(8, shape, generator=random) % torch.tensor([[4], [2]])
        reward = torch.stack([action[0] == 3, action[1] == 0]).float()
        ends, frame = torch.ones(shape, dtype=torch.bool), torch.zeros(*shape, 5)
        learner.replay.add(Transition(frame, ends, action, reward, ends, ~ends, ends, torch.zeros(shape)))
    for step in range(250):
        learner.update(step)
    q_KBA = learner.agent.network(torch.zeros(2, 1, 5))[:, 0]
    assert torch.allclose(q_KBA[0], torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=0.1)
    assert torch.allclose(q_KBA[1, :2], torch.tensor([1.0, 0.0]), atol=0.1)


# -- losses that are not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("task", [0, 1])
def test_error_of_a_loss_that_is_not_finite_names_its_task_and_first_step(task: int, value: float) -> None:
    bad = [1.0, 1.0]
    bad[task] = value
    learner, _ = fake_learner([[1.0, 1.0], bad, [1.0, 1.0], [value, value]])
    learner.update(10)
    learner.metrics.check_finite()
    for step in (20, 30, 40):
        learner.update(step)
    with pytest.raises(RunError) as raised:
        learner.metrics.check_finite()
    assert f"task {NAMES[task]} " in str(raised.value)
    assert "step 20" in str(raised.value)


@pytest.mark.parametrize("task", [0, 1])
def test_first_task_with_a_bad_loss_is_named_after_many_updates_in_one_step(task: int) -> None:
    """A loss that is not finite corrupts the shared parameters, and with the next update the loss of every task."""
    learner = learner_of()
    for row in rows(20):
        row["reward"][task] = torch.nan
        learner.replay.add(transition(row))
    for _ in range(3):
        learner.update(64)
    with pytest.raises(RunError) as raised:
        learner.metrics.check_finite()
    assert f"task {NAMES[task]} " in str(raised.value)
    assert "step 64" in str(raised.value)


def test_gradient_that_is_not_finite_is_an_error_although_every_loss_is_finite() -> None:
    """The optimizer step has corrupted the parameters, and they may be saved before the next loss is computed."""
    learner, _ = fake_learner([[1.0, 2.0]], slopes=(1.0, float("inf")))
    learner.update(7)
    with pytest.raises(RunError) as raised:
        learner.metrics.check_finite()
    assert f"task {NAMES[1]} or its gradient" in str(raised.value)
    assert "step 7" in str(raised.value)


# -- state ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("sharing", [HardSharing, IndependentSharing])
@pytest.mark.parametrize("replay_kind", [UniformReplay, PrioritizedReplay])
def test_training_resumes_bit_for_bit_from_its_state(replay_kind: type[Replay], sharing: type[Sharing], before: int) -> None:
    uninterrupted = fill(learner_of(replay_kind, sharing, target_period=0, target_tau=0.1))
    for step in range(before):
        uninterrupted.update(step)
    fresh = learner_of(replay_kind, sharing, weights_seed=1, target_period=0, target_tau=0.1)
    resumed = resumed_from(uninterrupted, fresh)
    for learner in (uninterrupted, resumed):
        for step, row in enumerate(rows(10, start=20)):
            learner.replay.add(transition(row))
            learner.update(before + step)
    for name, tensor in parameters(uninterrupted).items():
        assert torch.equal(tensor, resumed.agent.network.state_dict()[name]), name
    assert uninterrupted.updates == resumed.updates == before + 10
    assert uninterrupted.read_metrics() == resumed.read_metrics()


def test_due_updates_are_part_of_the_state() -> None:
    uninterrupted = fill(learner_of(learning_starts=10))
    uninterrupted.run_due_updates(20)
    uninterrupted.refill_from(30)
    resumed = resumed_from(uninterrupted, learner_of(learning_starts=10))
    assert [resumed.updates_due(step) for step in range(20, 80)] == [uninterrupted.updates_due(step) for step in range(20, 80)]


@pytest.mark.parametrize("replay_kind", [UniformReplay, PrioritizedReplay])
@pytest.mark.parametrize("filled", [False, True])
def test_warm_up_does_not_affect_training(replay_kind: type[Replay], filled: bool) -> None:
    plain, warmed = learner_of(replay_kind), learner_of(replay_kind)
    if filled:
        fill(plain)
        fill(warmed)
    warmed.warm_up()
    assert all(parameter.grad is None for parameter in warmed.optimizer.parameters)
    if not filled:
        fill(plain)
        fill(warmed)
    assert warmed.read_metrics() == {}
    for learner in (plain, warmed):
        for step in range(5):
            learner.update(step)
        learner.metrics.check_finite()
    for name, tensor in parameters(plain).items():
        assert torch.equal(tensor, warmed.agent.network.state_dict()[name]), name
    assert plain.read_metrics() == warmed.read_metrics()


# -- gradients of tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "graddrop", "gradnorm"])
def test_updates_with_and_without_a_tape_agree(name: str) -> None:
    """One backward pass for all tasks and one per task give the same parameters up to rounding."""
    networks, gradients = [], set()
    for taped in (True, False):
        learner = fill(learner_of(optimizer_lr=0.001))
        network = learner.agent.network
        shared, own = network.shared_parameters(), network.own_parameters()
        observation = learner.replay.sample(2, 0).observation.flatten(2, 3)
        learner._tape = tape_for(network, shared, own, observation) if taped else None
        learner.task_weights = weights_of(name, num_tasks=2)
        for step in range(10):
            learner.update(step)
        gradients.add(type(learner._losses_and_gradients(learner.replay.sample(4, 0))[1]))
        networks.append(network)
    assert gradients == {TapedGradients, AutogradGradients}
    for (parameter, one), other in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), parameter


class Incomplete(TaskWeights):
    """A weighting that omits the weights or the gradient."""

    def __init__(self, part: str):
        super().__init__(tasks_of(NAMES))
        self._part = part

    def backward(self, gradients: Any) -> Any:
        if self._part != "gradient":
            gradients.weigh(torch.tensor([0.5, 0.5]))
        return {"gradient": torch.tensor([0.5, 0.5]), "weights": None, "all weights": torch.ones(())}[self._part]


@pytest.mark.parametrize("part", ["gradient", "weights", "all weights"])
def test_task_weights_without_weights_or_gradient_are_refused(part: str) -> None:
    learner = fill(learner_of())
    learner.task_weights = Incomplete(part)
    with pytest.raises(RunError, match=r"Incomplete.backward (computed no gradient|returned no weights)"):
        learner.update(0)
