"""What one network can take from another: by task and by name, under any sharing structure."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mtrl_cli.networks.heads import DuelingHead, PlainHead
from mtrl_cli.networks.lora import add_adapters
from mtrl_cli.networks.matching import Source, Taken, pieces_of, take
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import tagged
from mtrl_cli.networks.torsos import MLP, Torso
from tests.helpers.structures import ACTIONS, CNN, IMAGE, MLP_TORSO, STRUCTURES, VECTOR, network_of, observations, structure


def taken(source: MultiTaskNetwork, theirs: str, network: MultiTaskNetwork, mine: str, heads: Sequence[str] | None = None) -> Taken:
    known = [task for task in mine if task in theirs]
    return take(Source(source, list(theirs), known, known if heads is None else heads), network, list(mine))


def fates(found: Taken) -> dict[tuple[str | None, str, int | None], str]:
    return {(each.task, each.kind, each.layer): each.fate for each in found.outcomes}


def tensor(network: MultiTaskNetwork, tasks: str, task: str | None, name: str) -> torch.Tensor:
    return pieces_of(network, list(tasks))[task, name].of(network.state_dict())


@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("torso", [MLP_TORSO, CNN], ids=["vectors", "images"])
def test_every_parameter_is_in_one_piece_and_padding_in_none(sharing: str, torso: Torso) -> None:
    network = network_of(sharing, "abc", torso)
    seen = {name: torch.zeros(value.shape) for name, value in network.state_dict().items()}
    for piece in pieces_of(network, list("abc")).values():
        piece.of(seen).add_(1)
    assert max(float(times.max()) for times in seen.values()) == 1
    assert sum(int(times.sum()) for times in seen.values()) == network.parameter_counts().total


@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("torso", [MLP_TORSO, CNN], ids=["vectors", "images"])
def test_between_networks_of_the_same_tasks_everything_is_taken(sharing: str, torso: Torso) -> None:
    source, network = network_of(sharing, "abc", torso, 1), network_of(sharing, "abc", torso, 2)
    found = taken(source, "abc", network, "abc")
    assert {each.fate for each in found.outcomes} == {"loaded"}
    assert set(found.rows.values()) == {None}
    seen = observations([(IMAGE if torso is CNN else VECTOR)[task] for task in "abc"])
    assert torch.equal(source(seen), network(seen))


@pytest.mark.parametrize("sharing", [name for name in STRUCTURES if name not in ("cross_stitch", "ple")])
def test_known_tasks_say_the_same_in_another_company(sharing: str) -> None:
    """Two tasks to three in another order, among them a new one. (What mixes the columns of all tasks cannot come along.)"""
    source, network = network_of(sharing, "ab", seed=1), network_of(sharing, "bca", seed=2)
    before = network(observations([VECTOR[task] for task in "bca"]))
    found = taken(source, "ab", network, "bca")
    assert {fates(found)[task, "heads", None] for task in "ab"} == {"loaded"}
    assert fates(found)["c", "heads", None] == "fresh"
    seen = observations([VECTOR[task] for task in "bca"])
    swapped = torch.zeros(2, 4, 6)
    swapped[0, :, :4], swapped[1] = seen[2, :, :4], seen[0]
    said, expected = network(seen), source(swapped)
    for here, there, task in ((2, 0, "a"), (0, 1, "b")):
        mine, theirs = said[here, :, : ACTIONS[task]], expected[there, :, : ACTIONS[task]]
        assert torch.allclose(mine, theirs, atol=1e-6), task
        assert not torch.equal(before[here], said[here])


def test_three_tasks_to_a_new_one_takes_the_body_and_leaves_what_is_theirs() -> None:
    source, network = network_of("hard", "abc", seed=1), network_of("hard", "d", seed=2)
    fresh = tensor(network, "d", None, "sharing.stem.0.weight").clone()
    found = taken(source, "abc", network, "d")
    of = fates(found)
    assert of[None, "torso", 1] == of[None, "torso", 2] == "loaded"
    assert of[None, "torso", 0] == of["d", "heads", None] == "fresh"
    assert [of[task, kind, layer] for task in "abc" for kind, layer in (("torso", 0), ("heads", None))] == ["left"] * 6
    assert torch.equal(fresh, tensor(network, "d", None, "sharing.stem.0.weight"))
    assert not any("stem" in name or "head" in name for name in found.rows)


def test_a_shared_stem_becomes_each_tasks_own_and_ones_own_that_of_the_only_task() -> None:
    shared, own = network_of("hard", "ab", CNN, 1), network_of("input_adapters", "bc", CNN, 2)
    taken(shared, "ab", own, "bc")
    for task in "bc":
        assert torch.equal(tensor(own, "bc", task, "sharing.stem.0.weight"), tensor(shared, "ab", None, "sharing.stem.0.weight"))
    own, only, other, two = (
        network_of(*each) for each in (("input_adapters", "bc", CNN, 3), *(("hard", t, CNN, 4) for t in ("c", "d", "bc")))
    )
    for network, tasks, fate in ((only, "c", "loaded"), (other, "d", "fresh"), (two, "bc", "fresh")):
        assert fates(taken(own, "bc", network, tasks))[None, "torso", 0] == fate
    assert torch.equal(tensor(only, "c", None, "sharing.stem.0.weight"), tensor(own, "bc", "c", "sharing.stem.0.weight"))


def test_rows_of_a_tensor_that_are_loaded_are_told() -> None:
    source, network = network_of("input_adapters", "ab", seed=1), network_of("input_adapters", "bca", seed=2)
    found = taken(source, "ab", network, "bca")
    assert found.rows["sharing.stem.stacked.0:weight"] == found.rows["head.linear.weight"] == [0, 2]
    assert found.rows["sharing.body.0.0.weight"] is None


def test_a_head_is_kept_whole_or_not_at_all() -> None:
    source, network = network_of("hard", "ab", seed=1, kind=DuelingHead), network_of("hard", "ab", seed=2, kind=DuelingHead)
    before = network.head.state_dict()["value.bias"].clone()
    found = taken(source, "ab", network, "ab", heads=["b"])
    assert found.heads == ["b"]
    assert torch.equal(network.head.state_dict()["value.bias"][0], before[0])
    assert torch.equal(network.head.state_dict()["value.bias"][1], source.head.state_dict()["value.bias"][1])
    assert next(each.why for each in found.outcomes if each.task == "a" and each.kind == "heads") == "other actions or head"


def test_a_layer_of_which_one_tensor_does_not_fit_is_fresh_as_a_whole() -> None:
    """Other channels: the weight of the first layer differs, and its bias and normalisation stay with it."""
    wide = MultiTaskNetwork(structure("hard", tagged(CNN), [(7, 10, 10)]), PlainHead(5, [2]), 1.0)
    source = network_of("hard", "a", CNN, seed=1)
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    found = taken(source, "a", wide, "a")
    assert [name for name, value in wide.state_dict().items() if torch.equal(value, before[name]) and "norm" not in name][:2] == [
        "sharing.stem.0.weight",
        "sharing.stem.0.bias",
    ]
    assert "sharing.stem.0.bias" not in found.rows
    assert "other shape: 3x7x3x3, in the source 3x4x3x3" in [each.why for each in found.outcomes]


@pytest.mark.parametrize(
    ("there", "here"), [("hard", "film"), ("film", "mtan"), ("hard", "independent"), ("input_adapters", "independent")]
)
def test_other_structures_that_keep_the_torsos_layers_take_them(there: str, here: str) -> None:
    source, network = network_of(there, "ab", seed=1), network_of(here, "ab", seed=2)
    found = taken(source, "ab", network, "ab")
    assert all(each.fate == "loaded" for each in found.outcomes if each.kind == "torso" and each.fate != "left")
    task = "a" if here == "independent" else None
    first = "sharing.body.0.0.weight"
    assert torch.equal(tensor(network, "ab", task, first), tensor(source, "ab", None, first))


def test_singular_vectors_go_with_the_weight_that_they_are_of_also_where_layers_are_stacked() -> None:
    """From hard sharing to a torso per task, where the new task's stem is fresh and the last layer is loaded."""
    torso = MLP(hidden=[8, 7, 5], spectral_norm=True)
    source, network = network_of("hard", "ab", torso, 1), network_of("independent", "cd", torso, 2)
    layer = next(name.removesuffix(".left") for name in source.state_dict() if name.endswith(".left"))
    taken(source, "ab", network, "cd")
    for name in ("weight", "left", "right"):
        wanted = source.state_dict()[f"{layer}.{name}"]
        assert all(torch.equal(tensor(network, "cd", task, f"{layer}.{name}"), wanted) for task in "cd")


def test_experts_are_nothing_to_one_torso() -> None:
    found = taken(network_of("mmoe", "ab", CNN, 1), "ab", network_of("independent", "cd", CNN, 2), "cd")
    assert {each.fate for each in found.outcomes if each.kind == "torso" and each.layer} == {"fresh", "left"}


def test_adapters_of_low_rank_go_by_task_and_the_layers_keep_their_names() -> None:
    source, network = network_of("hard", "ab", seed=1), network_of("hard", "ca", seed=2)
    plain = set(source.state_dict())
    for each in (source, network):
        add_adapters(each.sharing, 2)
    assert plain < set(source.state_dict())
    with torch.no_grad():
        source.get_parameter("sharing.body.0.0.adapter.up").normal_()
    found = taken(source, "ab", network, "ca")
    assert fates(found)["a", "adapters", None] == "loaded"
    assert torch.equal(tensor(network, "ca", "a", "sharing.body.0.0.adapter.up"), tensor(source, "ab", "a", "sharing.body.0.0.adapter.up"))
    assert not tensor(network, "ca", "c", "sharing.body.0.0.adapter.up").any()
