"""Sharing structures, and stacked modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mtrl_cli.networks.per_task import PerTask, Stacked, TaskLinear, TaskOwned, TaskVectors, parameter_counts
from mtrl_cli.networks.sharing import HardSharing, IndependentSharing, Sharing, blocks_of, output_shapes
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, NatureCNN, Torso
from tests.helpers.structures import IMAGES, STRUCTURES, VECTORS, Shapes, UngroupedTorso, counts, observations, structure

CASES = [
    (MLP(hidden=[8, 5]), VECTORS),
    (MLP(hidden=[8], layer_norm=True), VECTORS),
    (MinAtarCNN(channels=3, features=5), IMAGES),
    (MinAtarCNN(channels=3, features=5, layer_norm=True), [(4, 10, 10)] * 3),
    (MLP(hidden=[8, 5]), [(4,)] * 3),
]


EVERY_TORSO = [
    (MLP(hidden=[12, 9]), VECTORS),
    (MLP(hidden=[12, 9, 9], layer_norm=True), [(4,)] * 3),
    (MLP(hidden=[8]), VECTORS),
    (MLP(hidden=[8]), [(4,)] * 3),
    (MinAtarCNN(channels=3, features=8), IMAGES),
    (MinAtarCNN(channels=3, features=8, layer_norm=True), [(4, 10, 10)] * 3),
    (UngroupedTorso(), VECTORS),
    (UngroupedTorso(), [(4,)] * 3),
    (ImpalaCNN(features=5), [(4, 9, 9), (2, 9, 9), (3, 9, 9)]),
    (NatureCNN(features=5, width=0.1), [(4, 36, 36)] * 3),
]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- PerTask ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_per_task_equals_a_loop_over_modules(torso: Torso, shapes: Shapes) -> None:
    """Values and gradients, against a Python loop."""
    modules = [nn.Sequential(torso.stem(shape), torso.body(shape)) for shape in shapes]
    together = PerTask(modules)
    observation = observations(shapes)
    out = together(observation)
    for task, (module, shape) in enumerate(zip(modules, shapes, strict=True)):
        assert torch.allclose(out[task], module(observation[task, :, : shape[0]]), atol=1e-5)
        module(observation[task, :, : shape[0]]).square().sum().backward()
    out.square().sum().backward()
    for name, parameter in together.stacked.items():
        assert parameter.grad is not None
        for task, module in enumerate(modules):
            own = module.get_parameter(name.replace(":", ".")).grad
            assert own is not None
            place = tuple(slice(size) for size in own.shape)
            assert torch.allclose(parameter.grad[task][place], own, atol=1e-4)
            padding = parameter.grad[task].clone()
            padding[place] = 0
            assert not padding.any()


def test_single_stacked_module_equals_its_module() -> None:
    module = nn.Linear(3, 2)
    together, x = PerTask([module]), torch.randn(1, 5, 3)
    assert torch.allclose(together(x)[0], module(x[0]))
    assert together.sizes == [8]


def test_copy_is_independent_of_its_original() -> None:
    together = PerTask([nn.Linear(3, 2), nn.Linear(2, 2)])
    twin, x = copy.deepcopy(together), observations([(3,), (2,)])
    before = together(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(together(x), before)
    assert not torch.allclose(twin(x), before)
    twin.load_state_dict(together.state_dict())
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_padding_stays_zero_while_training(weight_decay: float) -> None:
    together = PerTask([nn.Linear(size, 5) for size in (4, 6, 2)])
    optimizer = torch.optim.Adam(together.parameters(), lr=0.1, weight_decay=weight_decay)
    for seed in range(5):
        together(observations(VECTORS, seed=seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = together.stacked["weight"]
    assert weight.shape == (3, 5, 6)
    for task, size in enumerate((4, 6, 2)):
        assert not weight[task, :, size:].any()
        assert weight[task, :, :size].all()


@pytest.mark.parametrize("number", [1, 3])
def test_broadcast_applies_all_modules_to_one_input(number: int) -> None:
    modules = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(number)]
    stacked, x = Stacked(modules), torch.randn(5, 3)
    out = stacked.broadcast(x)
    assert torch.allclose(out, torch.stack([module(x) for module in modules]), atol=1e-6)
    assert torch.allclose(stacked(x.expand(number, -1, -1)), out, atol=1e-6)


def test_per_task_modules_are_task_owned() -> None:
    modules = [nn.Linear(3, 2), nn.Linear(1, 2)]
    assert isinstance(PerTask(modules), TaskOwned)
    assert not isinstance(Stacked(modules), TaskOwned)


def test_parameters_are_counted_without_padding() -> None:
    parts = nn.ModuleDict(
        {
            "shared": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)),  # 8 + 15
            "experts": Stacked([nn.Linear(3, 2), nn.Linear(1, 2)]),  # 8 + 4
            "stems": PerTask([nn.Linear(4, 3), nn.Linear(1, 3)]),  # 15 | 6
            "deep": nn.ModuleList([TaskLinear(2, [4, 1]), TaskVectors(torch.zeros(2, 6))]),  # 12 + 6 | 3 + 6
        }
    )
    assert parameter_counts(parts, 2) == (35, [33, 15])
    assert parameter_counts(nn.Linear(1, 1), 3) == (2, [0, 0, 0])


# -- parts of a torso -----------------------------------------------------------------------------------------------------------


def test_child_without_parameters_joins_the_block_before_it() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    body = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Tanh(), nn.ReLU())
    blocks = blocks_of(body)
    assert [[type(child).__name__ for child in block] for block in blocks] == [["Flatten", "Linear", "ReLU"], ["Linear", "Tanh", "ReLU"]]
    x = torch.randn(5, 4)
    assert torch.equal(nn.Sequential(*blocks)(x), body(x))
    assert output_shapes(blocks, (4,)) == [(3,), (2,)]
    assert blocks_of(nn.Sequential()) == []
    assert [len(block) for block in blocks_of(nn.Sequential(nn.ReLU(), nn.Flatten()))] == [2]


@pytest.mark.parametrize(
    ("torso", "shape", "shapes"),
    [
        (NatureCNN(), (4, 84, 84), [(64, 9, 9), (64, 7, 7), (512,)]),
        (ImpalaCNN(), (4, 84, 84), [(16, 42, 42), (32, 21, 21), (32, 11, 11), (256,)]),
        (MinAtarCNN(), (6, 10, 10), [(128,)]),
        (MLP(hidden=[8, 7, 6]), (3,), [(7,), (6,)]),
        (MLP(hidden=[8]), (3,), []),
    ],
)
def test_shapes_between_blocks(torso: Torso, shape: tuple[int, ...], shapes: Shapes) -> None:
    stem, blocks = torso.stem(shape), blocks_of(torso.body(shape))
    assert output_shapes([stem, *blocks], shape)[1:] == shapes


# -- every sharing structure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("torso", "shapes"), EVERY_TORSO)
def test_features_are_task_major_and_depend_on_their_task_only(name: str, torso: Torso, shapes: Shapes) -> None:
    sharing, observation = structure(name, torso, shapes), observations(shapes)
    features = sharing(observation)
    assert features.shape == (3, 4, sharing.num_features)
    for task in range(3):
        other = observation.clone()
        other[task] = observations(shapes, seed=1)[task]
        changed = (sharing(other) != features).flatten(1).any(1)
        assert changed.tolist() == [each == task for each in range(3)]


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("torso", [MLP(hidden=[8, 5]), MLP(hidden=[8]), MinAtarCNN(channels=3, features=5)])
def test_structure_works_for_a_single_task(name: str, torso: Torso) -> None:
    shape = (4,) if torso.observation_kind == "vector" else (4, 10, 10)
    sharing, observation = structure(name, torso, [shape]), observations([shape])
    features = sharing(observation)
    assert features.shape == (1, 4, sharing.num_features)
    features.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in sharing.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("torso", "shapes"), EVERY_TORSO)
def test_owned_parameters_have_gradients_of_one_task_and_shared_of_several(name: str, torso: Torso, shapes: Shapes) -> None:
    sharing, observation = structure(name, torso, shapes), observations(shapes, batch=32)
    features = sharing(observation)
    parameters = dict(sharing.named_parameters())
    owned = {id(each) for module in sharing.modules() if isinstance(module, TaskOwned) for each in module.parameters()}
    moved_by = dict.fromkeys(parameters, 0)
    for task in range(3):
        loss = features[task].square().sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
        for (key, parameter), grad in zip(parameters.items(), grads, strict=True):
            moved_by[key] += int(grad.any())
            if id(parameter) in owned:
                assert grad.flatten(1).any(1).tolist() == [each == task for each in range(3)], key
    assert all(moved_by[key] >= 2 for key, parameter in parameters.items() if id(parameter) not in owned), moved_by


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("torso", "shapes"), EVERY_TORSO)
def test_counts_include_all_parameters_without_padding(name: str, torso: Torso, shapes: Shapes) -> None:
    sharing = structure(name, torso, shapes)
    shared, own = counts(sharing)
    longest = [max(shapes)] * 3
    padded = structure(name, torso, longest)
    # Only stems depend on the shape: padding is the difference to the largest stem.
    padding = sum(count(torso.stem(longest[0])) - count(torso.stem(shape)) for shape in shapes)
    assert shared + sum(own) == count(sharing) - padding
    padded_shared, padded_own = counts(padded)
    assert padded_shared + sum(padded_own) == count(padded)
    assert len(set(padded_own)) == 1


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("torso", "shapes"), [EVERY_TORSO[0], EVERY_TORSO[5]])
def test_state_dict_round_trip(name: str, torso: Torso, shapes: Shapes) -> None:
    sharing, other = structure(name, torso, shapes), structure(name, torso, shapes, seed=1)
    observation = observations(shapes)
    assert not torch.allclose(other(observation), sharing(observation))
    other.load_state_dict(sharing.state_dict())
    assert torch.equal(other(observation), sharing(observation))


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_overfits_a_small_batch(name: str) -> None:
    sharing = structure(name, MLP(hidden=[16, 16]), VECTORS)
    head = TaskLinear(sharing.num_features, [2] * 3)
    observation, target = observations(VECTORS, batch=4), torch.randn(3, 4, 2)
    optimizer = torch.optim.Adam([*sharing.parameters(), *head.parameters()], lr=0.01)
    losses: list[float] = []
    while not losses or (losses[-1] > 0.01 * losses[0] and len(losses) < 300):
        loss = (head(sharing(observation)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("torso", "shapes"), EVERY_TORSO[1:6])
def test_bfloat16_features_are_close(name: str, torso: Torso, shapes: Shapes) -> None:
    sharing, observation = structure(name, torso, shapes), observations(shapes)
    exact = sharing(observation).detach()
    with torch.autocast("cpu", torch.bfloat16):
        fast = sharing(observation.bfloat16())
        routing = sharing.routing(observation.bfloat16())
    assert not torch.equal(fast.float(), exact)
    assert torch.allclose(fast.float(), exact, atol=0.03 * float(exact.abs().max()))
    for routed, where in routing.items():
        assert torch.allclose(where.float(), sharing.routing(observation)[routed], atol=0.03)
    fast.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in sharing.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("torso", "shapes"), EVERY_TORSO[:5])
def test_routing_is_a_distribution_for_each_task(name: str, torso: Torso, shapes: Shapes) -> None:
    sharing, observation = structure(name, torso, shapes), observations(shapes)
    with torch.no_grad():
        for parameter in sharing.parameters():
            parameter.mul_(3)  # far from the uniform start
    for where in sharing.routing(observation).values():
        assert where.dim() == 2
        assert len(where) == 3
        assert (where >= 0).all()
        assert torch.allclose(where.sum(1), torch.ones(3), atol=1e-5)


# -- hard sharing and none --------------------------------------------------------------------------------------------------------


def test_hard_sharing_of_one_shape_shares_the_whole_torso() -> None:
    torso = MLP(hidden=[8, 5])
    sharing = HardSharing(torso, [(4,)] * 3)
    observation = observations([(4,)] * 3)
    reference = nn.Sequential(sharing.stem, sharing.body)
    for task in range(3):
        assert torch.allclose(sharing(observation)[task], reference(observation[task]), atol=1e-6)
    assert counts(sharing) == (5 * 8 + 9 * 5, [0, 0, 0])


def test_hard_sharing_of_different_shapes_shares_the_body() -> None:
    torso = MLP(hidden=[8, 5])
    sharing = HardSharing(torso, VECTORS)
    observation = observations(VECTORS)
    assert counts(sharing) == (9 * 5, [5 * 8, 7 * 8, 3 * 8])
    stemmed = sharing.stem(observation)
    for task in range(3):
        assert torch.allclose(sharing(observation)[task], sharing.body(stemmed[task]), atol=1e-6)


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_independent_counts_equal_separate_torsos(torso: Torso, shapes: Shapes) -> None:
    separate = [count(torso.stem(shape)) + count(torso.body(shape)) for shape in shapes]
    assert counts(IndependentSharing(torso, shapes)) == (0, separate)


@pytest.mark.parametrize("kind", [HardSharing, IndependentSharing])
def test_nature_parameter_counts(kind: type[Sharing]) -> None:
    shared, own = counts(kind(NatureCNN(), [(4, 84, 84)] * 2))
    assert (shared, own) == ((1_684_128, [0, 0]) if kind is HardSharing else (0, [1_684_128] * 2))


def test_independent_torsos_are_initialised_differently() -> None:
    sharing = IndependentSharing(MLP(hidden=[8, 5]), [(4,)] * 2)
    same = torch.randn(1, 6, 4).expand(2, -1, -1)
    features = sharing(same)
    assert not torch.allclose(features[0], features[1])
