"""Sharing diagnostics: metrics against hand-computed values, output of a run, and no effect on training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mtrl_cli.agents.agent import Agent, Losses
from mtrl_cli.checkpoints.state_tree import flatten
from mtrl_cli.networks.heads import PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.per_task import PerTask
from mtrl_cli.networks.sharing import HardSharing, IndependentSharing, Sharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.replay.buffers import Batch, PrioritizedReplay, Replay, ReplaySpec, Transition, UniformReplay
from mtrl_cli.training.diagnostics import (
    PAIRED_TASKS,
    ROUTED_METRICS,
    SAMPLES,
    Diagnostics,
    dormant_share,
    effective_rank,
    mean_activation,
    mean_activations,
    norms_and_cosines,
    similarity,
)
from tests.helpers.command import MtrlHere
from tests.helpers.learners import fill, learner_of
from tests.helpers.shared import Shared
from tests.helpers.structures import STRUCTURES, structure
from tests.helpers.tiny_runs import TASKS, TINY, learning_rows, model, rows

# -- mathematics ----------------------------------------------------------------------------------------------------------------


def test_norms_and_cosines_of_hand_built_gradients() -> None:
    rows_KP = np.array([[3.0, 4.0], [-4.0, 3.0], [-6.0, -8.0], [0.0, 0.0]])
    norms, cosines = norms_and_cosines(rows_KP @ rows_KP.T)
    assert norms.tolist() == [5, 5, 10, 0]
    np.testing.assert_allclose(cosines[:3, :3], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-12)
    assert np.isnan(cosines[3]).all()
    assert np.isnan(cosines[:, 3]).all()


def test_cosines_agree_with_torch_for_random_gradients() -> None:
    rows_KP = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms, cosines = norms_and_cosines((rows_KP @ rows_KP.T).numpy())
    np.testing.assert_allclose(norms, rows_KP.norm(dim=1))
    np.testing.assert_allclose(cosines, torch.cosine_similarity(rows_KP[:, None], rows_KP[None], dim=2), atol=1e-12)


def test_similarity_of_four_samples_equals_the_hand_computed_value() -> None:
    # Inner products of different samples are 1 for samples 0 and 1 of the first task and 0 and 2 of the second, else 0. Centred, they are
    # 1/3 for that pair and the pair of the two other samples, -1/6 for the four other pairs: squares sum to 1/3, products to -1/6.
    features_KMF = torch.tensor([[[1.0], [1], [0], [0]], [[1], [0], [1], [0]]])
    np.testing.assert_allclose(similarity(features_KMF), [[1, -0.5], [-0.5, 1]], atol=1e-12)


def test_similarity_agrees_with_the_published_unbiased_hsic_estimator() -> None:
    def hsic(x_MF: np.ndarray, y_MF: np.ndarray) -> float:
        a, b = (z @ z.T * (1 - np.eye(len(z))) for z in (x_MF, y_MF))
        n = len(a)
        summed = np.trace(a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b).sum()
        return float(summed / (n * (n - 3)))

    features_KMF = torch.rand(3, 11, 5, generator=torch.Generator().manual_seed(0))
    x_KMF = features_KMF.double().numpy()
    expected = [[hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y)) for y in x_KMF] for x in x_KMF]
    np.testing.assert_allclose(similarity(features_KMF), expected, atol=1e-9)


def test_similarity_is_invariant_to_rotation_scale_and_shift() -> None:
    random = torch.Generator().manual_seed(0)
    features_MF, others_MF = torch.randn(2, 20, 6, generator=random)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=random))
    changed_MF = 3 * features_MF @ rotation + torch.randn(6, generator=random)
    found = similarity(torch.stack([features_MF, changed_MF, others_MF]))
    assert found[0, 1] == pytest.approx(1, abs=1e-6)
    assert found[0, 2] == pytest.approx(found[1, 2], abs=1e-6)
    assert abs(found[0, 2]) < 0.5
    stretched = similarity(torch.stack([features_MF, features_MF * torch.tensor([9.0, 1, 1, 1, 1, 1])]))
    assert stretched[0, 1] < 0.9  # stretching a single direction is not a scaling


def test_similarity_of_unrelated_features_is_near_zero_even_for_few_samples() -> None:
    # Biased CKA of these features would be about 0.9.
    found = similarity(torch.randn(40, 8, 64, generator=torch.Generator().manual_seed(0)))
    assert abs(found[np.triu_indices(40, 1)].mean()) < 0.02


def test_similarity_to_constant_or_infinite_features_is_undefined() -> None:
    features_KMF = torch.rand(4, 9, 3, generator=torch.Generator().manual_seed(0))
    features_KMF[0] = torch.tensor([0.1, 0.7, 1e6])  # constant over samples, but not exactly zero after centring
    features_KMF[1, 0, 0] = math.inf
    known = np.isfinite(similarity(features_KMF))
    assert known.tolist() == [[False] * 4, [False] * 4, [False, False, True, True], [False, False, True, True]]


@pytest.mark.parametrize(("samples", "features"), [(40, 12), (12, 40)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_effective_rank_of_a_matrix_of_known_rank(samples: int, features: int, rank: int) -> None:
    random = torch.Generator().manual_seed(rank)
    left, _ = torch.linalg.qr(torch.randn(samples, rank, generator=random))
    right, _ = torch.linalg.qr(torch.randn(features, rank, generator=random))
    assert effective_rank(left @ right.T) == rank  # equal singular values: all of them count


def test_effective_rank_covers_99_percent_of_the_singular_values() -> None:
    # Of 98 + 1.5 + 0.5, the first value is less than 0.99 of the sum, the first two are more.
    assert effective_rank(torch.diag(torch.tensor([98.0, 1.5, 0.5]))) == 2
    assert effective_rank(torch.diag(torch.tensor([99.2, 0.6, 0.2]))) == 1
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))


def test_dormant_neurons_are_below_tau_times_the_mean_activation() -> None:
    layer = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0], [-1.0], [0.02], [0.03]]))
        layer[0].bias.zero_()
    # For input 4 the activations are 4, 0, 0.08 and 0.12: the mean is 1.05, and 1/40 of the mean 0.02625.
    with mean_activations(layer) as activations:
        layer(torch.full((5, 1), 4.0))
    torch.testing.assert_close(activations, [torch.tensor([4.0, 0.0, 0.08, 0.12])])
    assert dormant_share(activations) == 0.25
    assert dormant_share(activations, tau=0.1) == 0.5  # up to 0.105
    assert dormant_share([*activations, torch.zeros(4)]) == 5 / 8  # a layer with zero output is dormant


def test_channel_of_an_image_counts_as_one_neuron() -> None:
    images = torch.zeros(2, 3, 4, 5)
    images[:, 1] = 1
    images[0, 2, 0, 0] = -40
    assert mean_activation(images).tolist() == [0, 1, 1]
    assert mean_activation(torch.tensor([[[1.0, -2.0]], [[3.0, 0.0]]])).tolist() == [2, 1]


def test_neurons_of_stacked_modules_are_counted_per_task() -> None:
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU()) for _ in range(3)]
    x_KB = torch.randn(3, 7, 2)
    per_task = PerTask(modules)
    with mean_activations(per_task) as activations:
        outputs_KB = per_task(x_KB)
    expected = []
    for module, x_B in zip(modules, x_KB, strict=True):
        hidden_B = module[:2](x_B)
        expected += [hidden_B.mean(0), module[2:](hidden_B).mean(0)]
    torch.testing.assert_close(activations, expected)
    torch.testing.assert_close(outputs_KB, torch.stack([module(x_B) for module, x_B in zip(modules, x_KB, strict=True)]))
    assert not per_task.one_by_one
    assert not any(module._forward_hooks for module in per_task.structure.modules())


# -- reports ------------------------------------------------------------------------------------------------------------------


class Quadratic(Agent):
    """Agent whose loss for task k is half the squared distance of the task's features from the task-specific goal `goal_KF[k]`."""

    def __init__(self, network: MultiTaskNetwork, goal_KF: torch.Tensor):
        self.network, self.goal_KF = network, goal_KF
        self.batch_size, self.samples_per_step, self.learning_starts, self.n_step = 4, 1.0, 0, 1

    def losses(self, batch: Batch) -> Losses:
        features_KBF = self.network.features(batch.observation.flatten(2, 3))
        loss_KB = 0.5 * (features_KBF - self.goal_KF[:, None]).square().sum(2)
        return Losses(loss_KB, loss_KB.detach(), loss_KB.detach().mean(1), torch.zeros_like(loss_KB))


class Vector(Sharing):
    """Structure with one feature vector for all tasks and observations, and uniform routing over `choices`."""

    def __init__(self, num_tasks: int, vector_F: torch.Tensor, choices: int = 0):
        super().__init__(MLP(hidden=[len(vector_F)]), [(2,)] * num_tasks)
        self.vector = nn.Parameter(vector_F)
        self.choices = choices

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.vector.expand(*observation.shape[:2], -1)

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.choices:
            return {}
        return {"gate": torch.full((self.num_tasks, self.choices), 1 / self.choices)}

    def parameter_counts(self) -> tuple[int, list[int]]:
        return self.vector.numel(), [0] * self.num_tasks


def diagnostics_of(sharing: Sharing, goal_KF: torch.Tensor, *, varied: bool = False) -> Diagnostics:
    """Diagnostics of a network with known gradients: the vector minus the goal of task k. Observations are ones, or random if `varied`."""
    K = len(goal_KF)
    replay_spec = ReplaySpec(K, 2, (2,), torch.float32, 1, 1, torch.device("cpu"), 0, 100)
    replay = UniformReplay(replay_spec, capacity=20)
    nothing = torch.zeros(K, 2, dtype=torch.bool)
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        observation = torch.randn(K, 2, 2, generator=random) if varied else torch.ones(K, 2, 2)
        action, reward = torch.zeros(K, 2, dtype=torch.int64), torch.zeros(K, 2)
        replay.add(Transition(observation, nothing, action, reward, nothing, nothing, nothing, reward))
    network = MultiTaskNetwork(sharing, PlainHead(goal_KF.shape[1], [2] * K), observation_scale=1.0)
    return Diagnostics(Quadratic(network, goal_KF), replay, [f"task{k}" for k in range(K)], seed=0)


def test_metrics_of_known_gradients() -> None:
    goal_KF = torch.tensor([[0.0, -4.0], [0.0, 3.0], [-3.0, -4.0]])
    report = diagnostics_of(Vector(3, torch.zeros(2)), goal_KF).report(10)
    metrics = {name: value for name, value in report.metrics.items() if name.startswith("grad/")}
    assert metrics == pytest.approx(
        {
            "grad/norm/task0": 4,
            "grad/norm/task1": 3,
            "grad/norm/task2": 5,
            "grad/cosine/task0~task1": -1,
            "grad/cosine/task0~task2": 0.8,
            "grad/cosine/task1~task2": -0.8,
            "grad/cosine/mean": -1 / 3,
            "grad/conflict": 2 / 3,
        }
    )


def test_metrics_of_known_features() -> None:
    report = diagnostics_of(Vector(2, torch.tensor([3.0, 0.0, 4.0])), torch.zeros(2, 3)).report(10)
    metrics = {name: value for name, value in report.metrics.items() if name.startswith("features/")}
    names = ["norm", "norm/task0", "norm/task1"]
    ranks = ["rank", "rank/task0", "rank/task1"]
    expected = dict.fromkeys(names, 5.0) | dict.fromkeys(ranks, 1.0) | {"dormant": 1 / 3}
    assert metrics == pytest.approx({f"features/{name}": value for name, value in expected.items()})


def test_task_without_a_gradient_is_in_no_pair() -> None:
    report = diagnostics_of(Vector(3, torch.zeros(2)), torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])).report(10)
    assert report.metrics["grad/norm/task1"] == 0
    assert report.metrics["grad/conflict"] == 0
    assert [name for name in report.metrics if "~" in name] == ["grad/cosine/task0~task2"]


def test_single_task_has_no_pairs() -> None:
    report = diagnostics_of(Vector(1, torch.zeros(2)), torch.ones(1, 2)).report(10)
    assert report.metrics["grad/norm/task0"] == pytest.approx(math.sqrt(2))
    assert not [name for name in report.metrics if name.startswith(("grad/cosine", "grad/conflict"))]
    assert report.pictures == {}
    assert not [name for name in report.metrics if name.startswith("features/cka")]


def test_pairs_of_57_tasks_are_only_in_the_heatmap() -> None:
    goal_KF = torch.randn(57, 3, generator=torch.Generator().manual_seed(0))
    report = diagnostics_of(Vector(57, torch.zeros(3), choices=5), goal_KF).report(10)
    assert PAIRED_TASKS < 57
    assert not [name for name in report.metrics if "~" in name]
    cosines = torch.cosine_similarity(goal_KF[:, None], goal_KF[None], dim=2)[tuple(torch.triu_indices(57, 57, 1))]
    assert report.metrics["grad/conflict"] == pytest.approx(float((cosines < 0).double().mean()))
    assert report.metrics["grad/cosine/mean"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    height, width, _ = report.pictures["grad/cosine"].shape
    assert 57 * 14 <= height < width < 1200
    assert ROUTED_METRICS < 57 * 5
    assert not [name for name in report.metrics if name.startswith("routing/")]
    assert "routing/gate" in report.pictures


def test_routing_is_in_metrics_and_heatmap() -> None:
    report = diagnostics_of(Vector(2, torch.zeros(3), choices=4), torch.ones(2, 3)).report(10)
    routed = {name: value for name, value in report.metrics.items() if name.startswith("routing/")}
    assert routed == {f"routing/gate/task{task}/{choice}": 0.25 for task in range(2) for choice in range(4)}
    assert "routing/gate" in report.pictures


@pytest.mark.parametrize("name", STRUCTURES)
def test_similarity_of_tasks_in_every_structure(name: str) -> None:
    torch.manual_seed(1)
    sharing = structure(name, MLP(hidden=[16, 12]), [(2,)] * 3)
    report = diagnostics_of(sharing, torch.randn(3, sharing.num_features), varied=True).report(10)
    pairs = [report.metrics[f"features/cka/task{a}~task{b}"] for a, b in ((0, 1), (0, 2), (1, 2))]
    assert report.metrics["features/cka"] == pytest.approx(sum(pairs) / 3)
    assert all(-1 <= value <= 1 + 1e-9 for value in pairs)
    if name == "hard":  # all tasks share one path
        assert pairs == pytest.approx([1, 1, 1])
    elif name in {"independent", "input_adapters", "task_embedding", "cross_stitch", "mtan", "ple"}:
        assert min(pairs) < 0.999  # paths of other structures are almost equal at initialization
    assert "features/cka" in report.pictures


def test_paths_of_tasks_are_compared_on_the_pooled_observations_of_all_tasks() -> None:
    learner = fill(learner_of())
    diagnostics = Diagnostics(learner.agent, learner.replay, ["pong", "qbert"], seed=0)
    seen: list[torch.Tensor] = []
    features = learner.agent.network.features

    def recorded(observation: torch.Tensor) -> torch.Tensor:
        seen.append(observation)
        return features(observation)

    learner.agent.network.features = recorded  # type: ignore[method-assign]
    diagnostics.report(10)
    of_tasks, pooled = seen[-2:]
    assert torch.equal(pooled[0], pooled[1])
    each = pooled.shape[1] // 2
    assert torch.equal(pooled[0], torch.cat([of_tasks[0, :each], of_tasks[1, :each]]))


@pytest.mark.parametrize("sharing", [HardSharing, IndependentSharing])
def test_dormant_fraction_covers_the_neurons_of_all_tasks(sharing: type[Sharing]) -> None:
    learner = fill(learner_of(sharing=sharing))
    network = learner.agent.network
    report = Diagnostics(learner.agent, learner.replay, ["pong", "qbert"], seed=0).report(10)
    with torch.no_grad(), mean_activations(network.sharing) as activations:
        network.features(learner.replay.sample(SAMPLES, 0).observation.flatten(2, 3))
    # Stems of width 8 per task, then a layer of width 6: shared or per task.
    assert [len(activation) for activation in activations] == ([8, 8, 6] if sharing is HardSharing else [8, 6, 8, 6])
    # The samples differ, so one or two neurons near the threshold may be on the other side.
    assert report.metrics["features/dormant"] == pytest.approx(dormant_share(activations), abs=2.5 / sum(map(len, activations)))
    assert ("grad/conflict" in report.metrics) == ("features/rank" in report.metrics) == (sharing is HardSharing)


@pytest.mark.parametrize("name", STRUCTURES)
def test_diagnostics_support_every_structure(name: str) -> None:
    sharing = structure(name, MLP(hidden=[8, 5]), [(2,)] * 3)
    with torch.no_grad():
        expected = sharing(torch.ones(3, 4, 2))
        with mean_activations(sharing) as activations:
            torch.testing.assert_close(sharing(torch.ones(3, 4, 2)), expected)
    assert name == "soft_modular" or len(activations) > 1
    report = diagnostics_of(sharing, torch.randn(3, sharing.num_features)).report(10)
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert ("grad/conflict" in report.metrics) == (name != "independent")
    for routing in [name for name in report.pictures if name.startswith("routing/")]:
        for task in range(3):
            shares = [value for metric, value in report.metrics.items() if metric.rpartition("/")[0] == f"{routing}/task{task}"]
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert len(shares) > 1


# -- no side effects ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [UniformReplay, PrioritizedReplay])
def test_report_has_no_side_effects_and_depends_only_on_the_step(replay: type[Replay]) -> None:
    learner = fill(learner_of(replay))
    learner.update(20)
    diagnostics = Diagnostics(learner.agent, learner.replay, ["pong", "qbert"], seed=0)

    def state() -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        parts = (learner, learner.replay, learner.agent, learner.agent.network, learner.optimizer)
        flatten({str(index): part.state_dict() for index, part in enumerate(parts)}, tensors)
        return {name: tensor.clone() for name, tensor in tensors.items()} | {"global": torch.get_rng_state()}

    before = state()
    first = diagnostics.report(20)
    after = state()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.grad is None for parameter in learner.agent.network.parameters())
    assert diagnostics.report(20).metrics == first.metrics
    assert diagnostics.report(30).metrics != first.metrics


def test_report_on_compiled_losses_does_not_recompile() -> None:
    from torch._dynamo.utils import counters

    learner = fill(learner_of())
    eager = Diagnostics(learner.agent, learner.replay, ["pong", "qbert"], seed=0).report(10)
    agent: Any = learner.agent
    agent.losses = torch.compile(agent.losses, dynamic=False, backend="aot_eager")  # fast backend; it frees buffers like a compiler
    learner.warm_up()
    compiled = counters["stats"]["unique_graphs"]
    report = Diagnostics(learner.agent, learner.replay, ["pong", "qbert"], seed=0).report(10)
    learner.update(20)
    assert counters["stats"]["unique_graphs"] == compiled > 0
    assert report.metrics == eager.metrics


def test_diagnostics_are_ready_once_the_replay_can_be_sampled() -> None:
    for learner, ready in ((learner_of(), False), (fill(learner_of()), True)):
        assert Diagnostics(learner.agent, learner.replay, ["pong", "qbert"], seed=0).ready == ready


# -- through the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(shared: Shared) -> Path:
    """Three tiny runs: with diagnostics, without, and with independent networks."""
    tiny = [*TINY, "steps_per_task=400", "eval.every=0", "replay=prioritized", "agent/value_scale=popart"]

    def train(folder: Path) -> None:
        here = MtrlHere(folder)
        here("train", *tiny, "run_dir=with", "log.diagnostics=150")
        here("train", *tiny, "run_dir=without", "log.diagnostics=0")
        here("train", *tiny, "run_dir=independent", "log.diagnostics=150", "network/sharing=independent")

    return shared.folder("diagnostics", train)


def diagnosed(run: Path) -> list[dict[str, float]]:
    return [row for row in rows(run) if "features/norm" in row]


def images(run: Path) -> Iterator[tuple[str, int]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            yield from ((value.tag, event.step) for value in event.summary.value if value.metadata.plugin_data.plugin_name == "images")


def test_run_writes_metrics_and_heatmaps(runs: Path) -> None:
    found = diagnosed(runs / "with")
    assert [row["step"] for row in found] == [152, 304, 400]
    pairs = [f"grad/cosine/{TASKS[a]}~{TASKS[b]}" for a, b in ((0, 1), (0, 2), (1, 2))]
    pairs += [pair.replace("grad/cosine", "features/cka") for pair in pairs]
    each = [f"{metric}/{task}" for metric in ("grad/norm", "features/norm", "features/rank") for task in TASKS]
    whole = [
        "grad/cosine/mean",
        "grad/conflict",
        "features/cka",
        "features/norm",
        "features/dormant",
        "features/rank",
        "perf/seconds/diagnostics",
    ]
    for row in found:
        assert row.keys() == {"step", "frames", "seconds", "updates", *pairs, *each, *whole}
        assert all(-1 <= row[pair] <= 1 for pair in pairs)
        assert row["grad/conflict"] == pytest.approx(sum(row[pair] < 0 for pair in pairs[:3]) / 3)
        assert all(row[name] > 0 for name in (*each, "features/rank"))
        assert 0 <= row["features/dormant"] < 1
    assert [step for tag, step in images(runs / "with") if tag == "grad/cosine"] == [152, 304, 400]


def test_nothing_is_written_when_diagnostics_are_off(runs: Path) -> None:
    assert diagnosed(runs / "without") == []
    assert list(images(runs / "without")) == []


def test_independent_tasks_have_no_gradient_cosines(runs: Path) -> None:
    found = diagnosed(runs / "independent")
    assert len(found) == 3
    left_out = ("grad/cosine", "grad/conflict", "grad/norm/")
    assert not [name for row in found for name in row if name.startswith(left_out) or name == "features/rank"]
    assert all(row[f"features/rank/{task}"] > 0 for row in found for task in TASKS)
    assert [(tag, step) for tag, step in images(runs / "independent")] == [("features/cka", step) for step in (152, 304, 400)]


def test_run_is_bit_identical_with_and_without_diagnostics(runs: Path) -> None:
    assert model(runs / "with") == model(runs / "without")


def test_resumed_run_writes_the_same_diagnostics(runs: Path, here: MtrlHere) -> None:
    run = shutil.copytree(runs / "with", here.folder / "run")
    before, bytes_before = learning_rows(run), model(run)
    newest = run / "checkpoints" / "400" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert "resuming from step 200" in here("resume", run).stdout
    assert learning_rows(run) == before
    assert model(run) == bytes_before
    assert [step for tag, step in images(run) if tag == "grad/cosine"] == [152, 304, 400]
