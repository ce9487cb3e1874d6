"""Freezing and unfreezing: which parameters change, when, and with which optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtrl_cli.agents.dqn import DQN
from mtrl_cli.agents.value_scale import NoValueScale
from mtrl_cli.augmentation.base import Pipeline
from mtrl_cli.networks.heads import PlainHead
from mtrl_cli.networks.lora import add_adapters
from mtrl_cli.networks.matching import Source, load_matching, pieces_of
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import tagged
from mtrl_cli.networks.per_task import spectral_layers
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.tape import tape_for
from mtrl_cli.training.freezing import Freezing, layers_of
from mtrl_cli.training.learner import Learner
from mtrl_cli.training.optimizers import Adam
from tests.helpers.fake_tasks import stream_of, weights_of
from tests.helpers.learners import NAMES, SETTINGS, fill, learner_of, parameters
from tests.helpers.recorded_operations import RecordedOperations
from tests.helpers.structures import VECTORS, network_of, observations

ALL = None
Optimizers = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, fused=True),
    "adam with decay": lambda parameters: torch.optim.Adam(parameters, 0.01, weight_decay=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.5, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.1),
}


def everything(network: MultiTaskNetwork) -> dict[str, list[int] | None]:
    return dict.fromkeys(network.state_dict(), ALL)


def moved(network: MultiTaskNetwork, freezing: Freezing, optimizer: torch.optim.Optimizer, updates: int = 3) -> set[tuple[str | None, str]]:
    """Return the pieces changed by a few updates with random gradients."""
    tasks = list("abc")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(updates):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        freezing.before_step()
        optimizer.step()
        freezing.after_step()
    pieces = pieces_of(network, tasks).items()
    return {key for key, piece in pieces if not torch.equal(piece.of(network.state_dict()), piece.of(before))}


def kinds(network: MultiTaskNetwork, keys: set[tuple[str | None, str]]) -> set[tuple[str | None, str, int | None]]:
    pieces = pieces_of(network, list("abc"))
    return {(key[0], pieces[key].kind, pieces[key].layer) for key in keys}


STEMS = {(task, "torso", 0) for task in "abc"}
HEADS = {(task, "heads", None) for task in "abc"}
BODY = {(None, "torso", 1), (None, "torso", 2)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        ("none", set()),
        ("torso", STEMS | BODY),
        ("torso:1", STEMS),
        ("torso:2", STEMS | {(None, "torso", 1)}),
        ("all_but_heads", STEMS | BODY),
    ],
)
def test_frozen_parameters_keep_their_bytes_and_all_others_change(freeze: str, still: set[Any], name: str) -> None:
    network = network_of("hard", "abc")
    freezing = Freezing(network, freeze=freeze)
    freezing.freeze(everything(network))
    changed = moved(network, freezing, OPTIMIZERS[name](list(network.parameters())))
    assert kinds(network, changed) == (STEMS | BODY | HEADS) - still
    assert freezing.count == sum(
        piece.of(network.state_dict()).numel() for key, piece in pieces_of(network, list("abc")).items() if key not in changed
    )


def test_parameters_of_the_sharing_structure_are_frozen_only_by_all_but_heads() -> None:
    for freeze, moves in (("torso", True), ("all_but_heads", False)):
        network = network_of("film", "abc")
        freezing = Freezing(network, freeze=freeze)
        freezing.freeze(everything(network))
        changed = moved(network, freezing, torch.optim.AdamW(network.parameters()))
        assert any(kind == "sharing" for _, kind, _ in kinds(network, changed)) == moves


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sharing", ["hard", "input_adapters", "film", "independent"])
def test_fresh_parameters_are_never_frozen(sharing: str, name: str) -> None:
    """Two tasks to three: the new task's stem and head are trained, although they are rows of partly frozen tensors."""
    source, network = network_of(sharing, "ab", seed=1), network_of(sharing, "abc", seed=2)
    found = load_matching(Source(source, list("ab"), list("ab"), list("ab")), network, list("abc"))
    freezing = Freezing(network, freeze="all_but_heads")
    freezing.freeze(found.rows)
    optimizer = OPTIMIZERS[name](list(network.parameters()))
    changed = moved(network, freezing, optimizer)
    fresh = {
        (task, kind, layer)
        for task, kind, layer in ((each.task, each.kind, each.layer) for each in found.outcomes if each.status == "fresh")
    }
    assert kinds(network, changed) == fresh | HEADS
    assert ("c", "torso", 0) in fresh


def test_frozen_rows_of_shared_parameters_have_zero_task_gradients() -> None:
    """PLE stores task experts and shared experts in one tensor; a source with another task provides some of its rows."""
    source, network = network_of("ple", "ab", seed=1), network_of("ple", "bc", seed=2)
    found = load_matching(Source(source, list("ab"), ["b"], ["b"]), network, list("bc"))
    freezing = Freezing(network, freeze="torso")
    freezing.freeze(found.rows)
    shared, own = network.shared_parameters(), network.own_parameters()
    observation = torch.rand(2, 4, 6)
    trained = freezing.row_masks(shared)
    assert trained
    loss_K = network.outputs(observation)[..., :2].square().mean((1, 2))
    rows = AutogradGradients(loss_K, shared, own, trained).rows().split([parameter.numel() for parameter in shared], 1)
    for index, mask in trained.items():
        row_KP = rows[index].view(2, *shared[index].shape)
        assert not (row_KP * ~mask).any()
        assert (row_KP * mask).any()


def test_selected_layers_include_the_stem() -> None:
    network = network_of("hard", "abc")
    assert layers_of(network) == 3
    freezing = Freezing(network, freeze="torso:2")
    freezing.freeze(everything(network))
    assert {"sharing.stem.stacked.0:weight", "sharing.body.0.0.weight"} <= freezing.frozen
    assert "sharing.body.1.0.weight" not in freezing.frozen


def test_all_layers_are_unfrozen_at_the_given_step() -> None:
    network = network_of("film", "abc")
    freezing = Freezing(network, freeze="all_but_heads", unfreeze_at=100)
    freezing.freeze(everything(network))
    optimizer = torch.optim.AdamW(network.parameters())
    freezing.before_update(99)
    assert kinds(network, moved(network, freezing, optimizer)) == HEADS
    assert freezing.is_active
    assert not freezing.is_unfrozen
    freezing.before_update(102)
    assert kinds(network, moved(network, freezing, optimizer)) >= BODY | STEMS | HEADS
    assert freezing.is_unfrozen
    assert freezing.count == 0
    expected = "unfroze layers 1, 2, 3 of the torso and the sharing structure at step 100; all parameters are trained"
    assert freezing.describe_unfreezing() == expected


@pytest.mark.parametrize(("freeze", "layers"), [("torso:4", 3), ("torso:9", 3)])
def test_more_layers_than_the_torso_has_are_refused(freeze: str, layers: int) -> None:
    with pytest.raises(ValueError, match=f"has {layers} layers"):
        Freezing(network_of("hard", "ab"), freeze=freeze)


def test_state_of_another_network_is_refused() -> None:
    network = network_of("input_adapters", "abc")
    freezing = Freezing(network, freeze="torso", unfreeze_at=5)
    freezing.freeze({"sharing.stem.stacked.0:weight": [0, 2], "sharing.body.0.0.weight": ALL})
    other = Freezing(network, freeze="torso", unfreeze_at=5)
    other.load_state_dict(freezing.state_dict())
    assert other.count == freezing.count == 8 * 4 + 8 * 2 + 8 * 7
    for wrong in ({"nowhere": ALL}, {"sharing.stem.stacked.0:weight": [3]}):
        with pytest.raises(ValueError, match="not of this network"):
            other.load_state_dict({"loaded": wrong, "is_unfrozen": False})


# -- in the learner -------------------------------------------------------------------------------------------------------------


def frozen_learner(weighting: str = "uniform", recorder: Any = None, **keys: Any) -> Learner:
    """A learner of two tasks with hard sharing and all parameters loaded."""
    torch.manual_seed(0)
    replay = fill(learner_of()).replay
    network = MultiTaskNetwork(HardSharing(tagged(MLP(hidden=[8, 6])), [(5,), (3,)]), PlainHead(6, [4, 2]), 1.0)
    agent = DQN(network, NoValueScale(stream_of(NAMES)), NAMES, lambda function: function, **SETTINGS)
    optimizer = Adam(list(network.parameters()), lr=0.01, eps=1e-4, weight_decay=0.01, max_grad_norm=1.0)
    weights = weights_of(weighting, num_tasks=2)
    sample = replay.gather(*torch.zeros(2, 2, 2, dtype=torch.int64), torch.ones(2, 2)).observation.flatten(2, 3)

    def tape() -> Any:
        shared = network.shared_parameters()
        return tape_for(network, shared, network.own_parameters(), sample) if shared and weights.needs != "losses" else None

    return Learner(
        agent, replay, Pipeline(), weights, optimizer, NAMES, callbacks=[Freezing(network, **keys)], make_tape=tape, recorder=recorder
    )


def freeze(learner: Learner, loaded: dict[str, list[int] | None]) -> None:
    freezing = learner.callbacks[0]
    assert isinstance(freezing, Freezing)
    freezing.freeze(loaded)
    learner.rebuild()


def changed(learner: Learner, steps: range) -> set[str]:
    before = parameters(learner)
    for step in steps:
        learner.update(step)
    return {name.rsplit(".", 1)[0] for name, value in parameters(learner).items() if not torch.equal(value, before[name])}


HEAD, LAYER, STEM = "head.linear", "sharing.body.0.0", "sharing.stem.stacked"


@pytest.mark.parametrize("weighting", ["uniform", "pcgrad", "cagrad", "dwa", "graddrop", "imtl_g"])
@pytest.mark.parametrize(("frozen", "trained"), [("torso", set()), ("torso:1", {LAYER})])
def test_frozen_layers_do_not_move_with_any_task_weights_recorded_or_not(weighting: str, frozen: str, trained: set[str]) -> None:
    learners = [frozen_learner(weighting, recorder, freeze=frozen, unfreeze_at=10) for recorder in (None, RecordedOperations)]
    for learner in learners:
        freeze(learner, everything(learner.agent.network))
        assert changed(learner, range(10)) == {HEAD, *trained}
        assert learner.read_metrics()["transfer/frozen"] == (5 + 3) * 8 + 16 + (0 if trained else 8 * 6 + 6)
        assert changed(learner, range(10, 20)) == {HEAD, LAYER, STEM}
        assert learner.read_metrics()["transfer/frozen"] == 0
        learner.metrics.check_finite()
    eager, recorded = map(parameters, learners)
    assert all(torch.equal(value, recorded[name]) for name, value in eager.items())


def test_unfrozen_parameters_start_with_fresh_optimizer_state_even_if_partly_trained_before() -> None:
    """The first step of an unfrozen tensor is that of a new Adam optimizer, whose step count starts at 1."""
    learner = frozen_learner(freeze="torso", unfreeze_at=6)
    rows: dict[str, list[int] | None] = dict.fromkeys(learner.agent.network.state_dict(), ALL)
    freeze(learner, rows | {name: [1] for name in rows if "stem" in name})
    stem = learner.agent.network.get_parameter("sharing.stem.stacked.0:weight")
    before = stem.detach().clone()
    for step in range(6):
        learner.update(step)
    assert torch.equal(stem[1], before[1])
    assert not torch.equal(stem[0], before[0])
    assert learner.optimizer.state_dict()
    learner.update(6)
    counts = {float(state["step"]) for index, state in learner.optimizer.state_dict().items()}
    assert counts == {1.0, 7.0}
    assert not torch.equal(stem[1], before[1])


def test_gradients_of_frozen_rows_are_zeroed_before_clipping() -> None:
    network = network_of("input_adapters", "ab")
    freezing = Freezing(network, freeze="torso")
    freezing.freeze({"sharing.stem.stacked.0:weight": [1]})
    stem = network.get_parameter("sharing.stem.stacked.0:weight")
    stem.grad = torch.ones_like(stem)
    freezing.before_step()
    assert stem.grad[0].all()
    assert not stem.grad[1].any()


def test_low_rank_adapters_of_a_frozen_torso_are_trained() -> None:
    network = network_of("hard", "abc")
    add_adapters(network.sharing, 2)
    freezing = Freezing(network, freeze="torso")
    freezing.freeze(everything(network))
    changed = kinds(network, moved(network, freezing, torch.optim.AdamW(network.parameters())))
    assert changed == HEADS | {(task, "adapters", None) for task in "abc"}
    assert len(VECTORS) == 3
    assert not network.shared_parameters()


@pytest.mark.parametrize("sharing", ["hard", "independent"])
def test_singular_vectors_of_frozen_layers_are_kept(sharing: str) -> None:
    """Includes stacked layers with some rows frozen. Outputs for loaded tasks stay the same."""
    torso = MLP(hidden=[8, 7, 5], spectral_norm=True)
    source, network = network_of(sharing, "ab", torso, seed=1), network_of(sharing, "abc", torso, seed=2)
    found = load_matching(Source(source, list("ab"), list("ab"), list("ab")), network, list("abc"))
    seen = observations([VECTORS[0], VECTORS[1], VECTORS[2]])
    assert torch.allclose(network(seen)[:2, :, :2], source(seen[:2])[:, :, :2], atol=1e-6)
    freezing = Freezing(network, freeze="torso")
    freezing.freeze(found.rows)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    changed = moved(network, freezing, torch.optim.AdamW(network.parameters(), 0.1))
    for layer in spectral_layers(network):
        layer.power_step()
    freezing.after_step()
    vectors = {key: piece for key, piece in pieces_of(network, list("abc")).items() if piece.tensor in before}
    assert vectors
    for key, piece in vectors.items():
        assert torch.equal(piece.of(network.state_dict()), piece.of(before)) == (key[0] != "c"), key
    changed = {key for key in changed if key not in vectors}
    assert kinds(network, changed) == {(each.task, each.kind, each.layer) for each in found.outcomes if each.status == "fresh"} | HEADS
