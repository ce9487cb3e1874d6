"""Warm starts: matching parameters by task and name between sharing structures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mtrl_cli.networks.heads import DuelingHead, PlainHead
from mtrl_cli.networks.lora import add_adapters
from mtrl_cli.networks.matching import Loaded, Source, load_matching, pieces_of
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import tagged
from mtrl_cli.networks.torsos import MLP, Torso
from tests.helpers.structures import ACTIONS, CNN, IMAGE, MLP_TORSO, STRUCTURES, VECTOR, network_of, observations, structure


def taken(source: MultiTaskNetwork, theirs: str, network: MultiTaskNetwork, mine: str, heads: Sequence[str] | None = None) -> Loaded:
    known = [task for task in mine if task in theirs]
    return load_matching(Source(source, list(theirs), known, known if heads is None else heads), network, list(mine))


def statuses(found: Loaded) -> dict[tuple[str | None, str, int | None], str]:
    return {(each.task, each.kind, each.layer): each.status for each in found.outcomes}


def tensor(network: MultiTaskNetwork, tasks: str, task: str | None, name: str) -> torch.Tensor:
    return pieces_of(network, list(tasks))[task, name].of(network.state_dict())


@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("torso", [MLP_TORSO, CNN], ids=["vectors", "images"])
def test_pieces_cover_every_parameter_once_without_padding(sharing: str, torso: Torso) -> None:
    network = network_of(sharing, "abc", torso)
    observation = {name: torch.zeros(value.shape) for name, value in network.state_dict().items()}
    for piece in pieces_of(network, list("abc")).values():
        piece.of(observation).add_(1)
    assert max(float(times.max()) for times in observation.values()) == 1
    assert sum(int(times.sum()) for times in observation.values()) == network.parameter_counts().total


@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("torso", [MLP_TORSO, CNN], ids=["vectors", "images"])
def test_same_tasks_load_everything(sharing: str, torso: Torso) -> None:
    source, network = network_of(sharing, "abc", torso, 1), network_of(sharing, "abc", torso, 2)
    found = taken(source, "abc", network, "abc")
    assert {each.status for each in found.outcomes} == {"loaded"}
    assert set(found.rows.values()) == {None}
    observation = observations([(IMAGE if torso is CNN else VECTOR)[task] for task in "abc"])
    assert torch.equal(source(observation), network(observation))


@pytest.mark.parametrize("sharing", [name for name in STRUCTURES if name not in ("cross_stitch", "ple")])
def test_known_tasks_keep_their_values_among_other_tasks(sharing: str) -> None:
    """Two tasks load into three in another order, with a new one. The mixing of cross-stitch columns is not loaded."""
    source, network = network_of(sharing, "ab", seed=1), network_of(sharing, "bca", seed=2)
    before = network(observations([VECTOR[task] for task in "bca"]))
    found = taken(source, "ab", network, "bca")
    assert {statuses(found)[task, "heads", None] for task in "ab"} == {"loaded"}
    assert statuses(found)["c", "heads", None] == "fresh"
    observation = observations([VECTOR[task] for task in "bca"])
    swapped = torch.zeros(2, 4, 6)
    swapped[0, :, :4], swapped[1] = observation[2, :, :4], observation[0]
    values, expected = network(observation), source(swapped)
    for here, there, task in ((2, 0, "a"), (0, 1, "b")):
        mine, theirs = values[here, :, : ACTIONS[task]], expected[there, :, : ACTIONS[task]]
        assert torch.allclose(mine, theirs, atol=1e-6), task
        assert not torch.equal(before[here], values[here])


def test_new_task_loads_only_the_shared_body() -> None:
    source, network = network_of("hard", "abc", seed=1), network_of("hard", "d", seed=2)
    fresh = tensor(network, "d", None, "sharing.stem.0.weight").clone()
    found = taken(source, "abc", network, "d")
    of = statuses(found)
    assert of[None, "torso", 1] == of[None, "torso", 2] == "loaded"
    assert of[None, "torso", 0] == of["d", "heads", None] == "fresh"
    assert [of[task, kind, layer] for task in "abc" for kind, layer in (("torso", 0), ("heads", None))] == ["left"] * 6
    assert torch.equal(fresh, tensor(network, "d", None, "sharing.stem.0.weight"))
    assert not any("stem" in name or "head" in name for name in found.rows)


def test_shared_stem_and_per_task_stems_load_into_each_other() -> None:
    shared, own = network_of("hard", "ab", CNN, 1), network_of("input_adapters", "bc", CNN, 2)
    taken(shared, "ab", own, "bc")
    for task in "bc":
        assert torch.equal(tensor(own, "bc", task, "sharing.stem.0.weight"), tensor(shared, "ab", None, "sharing.stem.0.weight"))
    own, only, other, two = (
        network_of(*each) for each in (("input_adapters", "bc", CNN, 3), *(("hard", t, CNN, 4) for t in ("c", "d", "bc")))
    )
    for network, tasks, fate in ((only, "c", "loaded"), (other, "d", "fresh"), (two, "bc", "fresh")):
        assert statuses(taken(own, "bc", network, tasks))[None, "torso", 0] == fate
    assert torch.equal(tensor(only, "c", None, "sharing.stem.0.weight"), tensor(own, "bc", "c", "sharing.stem.0.weight"))


def test_loaded_rows_are_reported() -> None:
    source, network = network_of("input_adapters", "ab", seed=1), network_of("input_adapters", "bca", seed=2)
    found = taken(source, "ab", network, "bca")
    assert found.rows["sharing.stem.stacked.0:weight"] == found.rows["head.linear.weight"] == [0, 2]
    assert found.rows["sharing.body.0.0.weight"] is None


def test_head_is_loaded_as_a_whole_or_not_at_all() -> None:
    source, network = network_of("hard", "ab", seed=1, kind=DuelingHead), network_of("hard", "ab", seed=2, kind=DuelingHead)
    before = network.head.state_dict()["value.bias"].clone()
    found = taken(source, "ab", network, "ab", heads=["b"])
    assert found.heads == ["b"]
    assert torch.equal(network.head.state_dict()["value.bias"][0], before[0])
    assert torch.equal(network.head.state_dict()["value.bias"][1], source.head.state_dict()["value.bias"][1])
    assert next(each.reason for each in found.outcomes if each.task == "a" and each.kind == "heads") == "different actions or head"


def test_layer_with_one_mismatched_tensor_stays_fresh() -> None:
    """With other channels the weight of the first layer differs, so its bias and normalisation stay fresh too."""
    wide = MultiTaskNetwork(structure("hard", tagged(CNN), [(7, 10, 10)]), PlainHead(5, [2]), 1.0)
    source = network_of("hard", "a", CNN, seed=1)
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    found = taken(source, "a", wide, "a")
    assert [name for name, value in wide.state_dict().items() if torch.equal(value, before[name]) and "norm" not in name][:2] == [
        "sharing.stem.0.weight",
        "sharing.stem.0.bias",
    ]
    assert "sharing.stem.0.bias" not in found.rows
    assert "shape 3x7x3x3, in the source 3x4x3x3" in [each.reason for each in found.outcomes]


@pytest.mark.parametrize(
    ("there", "here"), [("hard", "film"), ("film", "mtan"), ("hard", "independent"), ("input_adapters", "independent")]
)
def test_structures_with_the_torsos_layers_load_them(there: str, here: str) -> None:
    source, network = network_of(there, "ab", seed=1), network_of(here, "ab", seed=2)
    found = taken(source, "ab", network, "ab")
    assert all(each.status == "loaded" for each in found.outcomes if each.kind == "torso" and each.status != "left")
    task = "a" if here == "independent" else None
    first = "sharing.body.0.0.weight"
    assert torch.equal(tensor(network, "ab", task, first), tensor(source, "ab", None, first))


def test_singular_vectors_are_loaded_with_their_weight() -> None:
    """From hard sharing to a torso per task: the new task's stem is fresh and the last layer is loaded."""
    torso = MLP(hidden=[8, 7, 5], spectral_norm=True)
    source, network = network_of("hard", "ab", torso, 1), network_of("independent", "cd", torso, 2)
    layer = next(name.removesuffix(".left") for name in source.state_dict() if name.endswith(".left"))
    taken(source, "ab", network, "cd")
    for name in ("weight", "left", "right"):
        wanted = source.state_dict()[f"{layer}.{name}"]
        assert all(torch.equal(tensor(network, "cd", task, f"{layer}.{name}"), wanted) for task in "cd")


def test_experts_do_not_load_into_one_torso() -> None:
    found = taken(network_of("mmoe", "ab", CNN, 1), "ab", network_of("independent", "cd", CNN, 2), "cd")
    assert {each.status for each in found.outcomes if each.kind == "torso" and each.layer} == {"fresh", "left"}


def test_adapters_are_matched_by_task() -> None:
    source, network = network_of("hard", "ab", seed=1), network_of("hard", "ca", seed=2)
    plain = set(source.state_dict())
    for each in (source, network):
        add_adapters(each.sharing, 2)
    assert plain < set(source.state_dict())
    with torch.no_grad():
        source.get_parameter("sharing.body.0.0.adapter.up").normal_()
    found = taken(source, "ab", network, "ca")
    assert statuses(found)["a", "adapters", None] == "loaded"
    assert torch.equal(tensor(network, "ca", "a", "sharing.body.0.0.adapter.up"), tensor(source, "ab", "a", "sharing.body.0.0.adapter.up"))
    assert not tensor(network, "ca", "c", "sharing.body.0.0.adapter.up").any()
