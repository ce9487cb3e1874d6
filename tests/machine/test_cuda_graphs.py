"""Recorded functions: a replay reads the current tensors, calls host functions again, and trains like eager calls."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from mtrl_cli.agents.value_scale import ClipRewards, NoValueScale, PopArt, ReturnNorm, ValueScale
from mtrl_cli.augmentation.base import ObservationSpec, Pipeline
from mtrl_cli.augmentation.geometry import Scale
from mtrl_cli.augmentation.pixels import Noise
from mtrl_cli.build import resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.config.compose import compose_training
from mtrl_cli.machine import cuda_graphs
from mtrl_cli.networks.sharing import HardSharing, IndependentSharing, Sharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.replay.buffers import PrioritizedReplay, Replay, Transition, UniformReplay
from mtrl_cli.task_weights.tape import tape_for
from mtrl_cli.training.callbacks import SpectralNorm
from mtrl_cli.training.optimizers import Adam
from tests.helpers.fake_tasks import ALL_WEIGHTS, stream_of, weights_of
from tests.helpers.learners import NAMES, fill, learner_of, parameters, rows
from tests.helpers.pqn_loops import loop_of as pqn_loop
from tests.helpers.recorded_operations import RecordedOperations
from tests.helpers.replay_reference import transition


def test_function_is_recorded_after_its_warm_up_and_then_replayed() -> None:
    calls, x, total = [], torch.zeros(3), torch.zeros(())

    def function() -> torch.Tensor:
        calls.append(len(calls))
        total.add_(x.sum())
        return x * 2

    recorded = cuda_graphs.Captured(function, RecordedOperations, warm_up=2)
    results = []
    for value in range(6):
        x.fill_(value)
        results.append(recorded().clone())
    assert [result.tolist() for result in results] == [[2.0 * value] * 3 for value in range(6)]
    assert len(calls) == 3, "two eager calls and one recording"
    assert total == 3 * (0 + 1 + 2 + 3 + 4 + 5)


def test_host_function_is_called_directly_outside_a_recording() -> None:
    x = torch.arange(4.0)
    assert torch.equal(cuda_graphs.on_host(x, lambda host: host.double() * 2, like=x), x * 2)
    assert cuda_graphs.on_host(x, lambda host: host.double(), like=x).dtype == torch.float32


def test_host_function_is_called_in_every_replay() -> None:
    x, arguments = torch.ones(2), []

    def function() -> torch.Tensor:
        def compute(host: torch.Tensor) -> torch.Tensor:
            arguments.append(host.tolist())
            return host + len(arguments)

        return cuda_graphs.on_host(x * 10, compute, like=x) + 1

    recorded = cuda_graphs.Captured(function, RecordedOperations, warm_up=0)
    found = []
    for value in range(3):
        x.fill_(value)
        found.append(recorded().tolist())
    assert arguments == [[0.0, 0.0], [10.0, 10.0], [20.0, 20.0]]
    assert found == [[2.0, 2.0], [13.0, 13.0], [24.0, 24.0]]


def test_recorder_for_tests_refuses_to_synchronize_with_the_device() -> None:
    """`RecordedOperations` is as strict as CUDA graphs."""
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="would synchronize"):
        cuda_graphs.Captured(lambda: x * float(x.sum()), RecordedOperations, warm_up=0)()


def compare(change: Callable[[Any], None], updates: int = 12, **settings: Any) -> None:
    """Assert that recorded updates of a learner give the same metrics and parameters as eager updates while new rows are added."""
    learners, recorders = [], []

    def recorder() -> RecordedOperations:
        recorders.append(RecordedOperations())
        return recorders[-1]

    for make_recorder in (None, recorder):
        learner = fill(learner_of(**settings), 12)
        change(learner)
        if make_recorder is not None and learner.task_weights.capturable:
            learner._run_train_step = cuda_graphs.Captured(learner.train_step, make_recorder)
        for update, row in enumerate(rows(updates, start=12)):
            learner.replay.add(transition(row))
            learner.agent.observe(row["reward"], row["terminated"])
            if learner.task_weights.uses_scores:
                learner.task_weights.update_scores({name: float(update) for name in learner.task_weights.tasks.names})
            learner.update(100 * update)
        learners.append(learner)
    eager, recorded = learners
    assert bool(recorders) == eager.task_weights.capturable
    for name, tensor in parameters(eager).items():
        assert torch.equal(tensor, parameters(recorded)[name]), name
    metrics = eager.read_metrics()
    assert metrics == recorded.read_metrics()
    assert metrics["grad/norm"] > 0


@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_recorded_update_with_every_weighting_equals_the_eager_update(name: str) -> None:
    def change(learner: Any) -> None:
        learner.task_weights = weights_of(name, num_tasks=2)

    compare(change)


@pytest.mark.parametrize("replay_kind", [UniformReplay, PrioritizedReplay])
@pytest.mark.parametrize("scale", [NoValueScale, ClipRewards, PopArt, ReturnNorm])
@pytest.mark.parametrize("target", [{"target_period": 2}, {"target_period": 0, "target_tau": 0.1}])
def test_recorded_update_with_every_replay_scale_and_target_equals_the_eager_update(
    replay_kind: type[Replay], scale: type[ValueScale], target: dict[str, Any]
) -> None:
    def change(learner: Any) -> None:
        learner.agent.value_scale = scale(stream_of(NAMES, num_envs=3))

    compare(change, replay_kind=replay_kind, **target)


@pytest.mark.parametrize("sharing", [HardSharing, IndependentSharing])
@pytest.mark.parametrize("target", [{"target_period": 2}, {"target_period": 0, "target_tau": 0.1}])
def test_recorded_update_with_dropout_and_spectral_norm_equals_the_eager_update(sharing: type[Sharing], target: dict[str, Any]) -> None:
    """Each replay draws new dropout masks and continues the power iteration of the singular vectors."""

    def change(learner: Any) -> None:
        torch.manual_seed(5)
        assert any(isinstance(callback, SpectralNorm) for callback in learner.callbacks)

    compare(change, sharing=sharing, torso=MLP(hidden=[8, 6], dropout=0.3, spectral_norm=True), **target)


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "gradnorm", "uniform"])
def test_recorded_update_with_a_tape_equals_the_eager_update(name: str) -> None:
    def change(learner: Any) -> None:
        learner.task_weights = weights_of(name, num_tasks=2)
        network = learner.agent.network
        sample = learner.replay.sample(2, 0).observation.flatten(2, 3)
        learner._tape = tape_for(network, network.shared_parameters(), network.own_parameters(), sample)
        assert learner._tape is not None

    compare(change)


@pytest.mark.parametrize("replay_kind", [UniformReplay, PrioritizedReplay])
@pytest.mark.parametrize("draws", [(1, 1), (2, 3)])
@pytest.mark.parametrize("weights", ["uniform", "pcgrad"])
def test_recorded_update_with_augmentations_equals_eager(replay_kind: type[Replay], draws: tuple[int, int], weights: str) -> None:
    def change(learner: Any) -> None:
        learner.task_weights = weights_of(weights, num_tasks=2)
        spec = ObservationSpec("vector", (5,), (5, 3), 1.0, tuple(NAMES), (("a",), ("a",)), (False, False), torch.device("cpu"), seed=3)
        parts = {"noise": Noise(spec, std=0.1), "scale": Scale(spec, low=0.5, high=1.5)}
        learner.augmentation = Pipeline(parts, loss_draws=draws[0], target_draws=draws[1])
        if weights == "pcgrad":
            network = learner.agent.network
            sample = learner.replay.sample(2, 0).observation.flatten(2, 3)
            learner._tape = tape_for(network, network.shared_parameters(), network.own_parameters(), sample)

    compare(change, replay_kind=replay_kind)


@pytest.mark.parametrize("scale", [NoValueScale, PopArt, ReturnNorm])
@pytest.mark.parametrize("overlap", [False, True])
def test_recorded_updates_and_action_selection_of_pqn_equal_eager_ones(overlap: bool, scale: type[ValueScale]) -> None:
    """A whole run of PQN, with recorded and with eager updates and action selection."""
    loops = []
    for recorded in (False, True):
        loop = pqn_loop(scale=scale, overlap=overlap)
        group = loop.groups[0]
        # torch's RAdam counts on the host where there is no GPU.
        parameters_of_loop = list(loop.learner.agent.network.parameters())
        loop.learner.optimizer = Adam(parameters_of_loop, lr=0.01, eps=1e-5, weight_decay=0.0, max_grad_norm=10.0)
        if recorded:
            loop.learner._run_train_step = cuda_graphs.Captured(loop.learner.train_step, RecordedOperations)
            group._run_act = cuda_graphs.Captured(group._act, RecordedOperations)
        list(islice(loop.ticks(), 40))
        loops.append(loop)
    eager, recorded_loop = loops
    assert eager.learner.updates == recorded_loop.learner.updates > 30
    for name, tensor in parameters(eager.learner).items():
        assert torch.equal(tensor, parameters(recorded_loop.learner)[name]), name
    stored = [loop.replay.export_rows(loop.replay.rows - 8, loop.replay.rows) for loop in loops]
    for name, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][name]), name
    assert eager.learner.read_metrics() == recorded_loop.learner.read_metrics()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU; the tests above check the same rules on a CPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("weights", ["uniform", "pcgrad", "mgda"])
def test_captured_and_eager_updates_agree_on_a_gpu(weights: str, precision: str, tolerance: float) -> None:
    """200 updates of the learner of an Atari run on the same random rows, once compiled and captured and once eager."""
    words = ["env=atari_pack", "env.tasks=[pong,breakout]", "env.num_envs=2", "agent.batch_size=8", f"task_weights={weights}"]
    words += ["device=cuda", f"precision={precision}", "replay.capacity=200", "checkpoint.replay=false"]
    losses = []
    for captured in (True, False):
        config = compose_training([*words, f"compile={str(captured).lower()}"])
        pack = build_run.make_pack(config)
        learner = build_run.make_run(resolve_auto.resolve(config, pack, print), pack, print).learner
        assert isinstance(learner._run_train_step, cuda_graphs.Captured)
        if not captured:
            learner._run_train_step = learner.train_step
        device, generator = learner.replay.spec.device, torch.Generator().manual_seed(0)
        for _ in range(60):
            frame = torch.randint(256, (2, 2, 1, 84, 84), generator=generator, dtype=torch.uint8).to(device)
            flag = torch.rand((2, 2), generator=generator).to(device) < 0.1
            action = torch.randint(3, (2, 2), generator=generator).to(device)
            reward = torch.ones(2, 2, device=device)
            learner.replay.add(Transition(frame, flag, action, reward, flag, torch.zeros_like(flag), flag, reward))
        rows = []
        for update in range(200):
            learner.update(update)
            rows.append([learner.read_metrics()[f"loss/{task.name}"] for task in pack.tasks])
        losses.append(torch.tensor(rows))
    assert torch.allclose(losses[0], losses[1], rtol=tolerance, atol=tolerance)
