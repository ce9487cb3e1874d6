"""Sharing structures with experts, against loops over tasks, samples and experts. Properties of all structures are in test_sharing.py."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mtrl_cli.networks.bases import PaCo
from mtrl_cli.networks.experts import CARE, MOORE, PLE, MMoE, orthonormal
from mtrl_cli.networks.per_task import TaskOwned
from mtrl_cli.networks.sharing import Sharing
from mtrl_cli.networks.soft_moe import SoftMoE
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, Torso
from tests.helpers.experts import CASES, SAME, SAME_IMAGES, Shapes, read_by_experts, row
from tests.helpers.structures import VECTORS, counts, observations

KINDS = [MMoE, PLE, MOORE, CARE, SoftMoE, PaCo]
OF_EVERY_KIND = list(itertools.product(KINDS, CASES))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# -- properties of all structures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "case"), OF_EVERY_KIND)
def test_samples_do_not_affect_each_other(kind: type[Sharing], case: tuple[Torso, Shapes]) -> None:
    sharing, shapes = kind(*case), case[1]
    observation, replaced = observations(shapes), observations(shapes, seed=1)
    features = sharing(observation)
    assert features.shape == (len(shapes), 4, sharing.num_features)
    for task, sample in ((0, 2), (len(shapes) - 1, 0)):
        other = observation.clone()
        other[task, sample] = replaced[task, sample]
        changed = (sharing(other) - features).abs().amax(-1) > 1e-6
        assert changed.nonzero().tolist() == [[task, sample]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5]])
def test_single_task_network_gives_the_same_features(kind: type[Sharing], case: tuple[Torso, Shapes]) -> None:
    """A network of one task with the parameters of a network of several tasks."""
    torso, shapes = case
    sharing, single, observation = kind(torso, shapes), kind(torso, shapes[:1]), observations(shapes)
    if kind is PLE:  # which has fewer experts for fewer tasks
        assert single(observation[:1]).shape == (1, 4, sharing.num_features)
        return
    owned = {f"{path}.{name}" for path, module in sharing.named_modules() if isinstance(module, TaskOwned) for name in module.state_dict()}
    single.load_state_dict({name: tensor[:1] if name in owned else tensor for name, tensor in sharing.state_dict().items()})
    assert torch.allclose(single(observation[:1]), sharing(observation)[:1], atol=1e-5)


@pytest.mark.parametrize("kind", [MMoE, MOORE, CARE, SoftMoE, PaCo])
@pytest.mark.parametrize("number", [1, 2])
def test_number_of_experts_is_configurable(kind: type[Sharing], number: int) -> None:
    sharing = kind(MLP(hidden=[8, 6]), SAME, **{"bases" if kind is PaCo else "experts": number})
    assert sharing(observations(SAME)).shape == (3, 4, sharing.num_features)
    assert {share.shape for share in sharing.routing(observations(SAME)).values()} == {(3, number)}


# -- parameters, counted by hand ------------------------------------------------------------------------------------------------

STEM, BODY = 5 * 8, 9 * 6  # a layer of 8 for vectors of 4, and of 6 after it
OWN_STEMS = [5 * 8, 7 * 8, 3 * 8]


def test_mmoe_parameter_counts() -> None:
    torso, gate = MLP(hidden=[8, 6]), 9 * 2
    assert counts(MMoE(torso, SAME, experts=2)) == (STEM + 2 * BODY, [gate] * 3)
    assert counts(MMoE(torso, VECTORS, experts=2)) == (2 * BODY, [stem + gate for stem in OWN_STEMS])
    assert counts(MMoE(MLP(hidden=[6]), SAME, experts=2)) == (2 * 5 * 6, [5 * 2] * 3)


def test_ple_parameter_counts() -> None:
    torso = MLP(hidden=[8, 6])
    # Lower level: 2 experts for each of 3 tasks, a shared expert and its gate. Upper level: a shared expert.
    # Per task: upper experts and two gates over 3.
    assert counts(PLE(torso, SAME, task_experts=2)) == (7 * STEM + 5 * 7 + BODY, [5 * 3 + 2 * BODY + 9 * 3] * 3)
    # One level, because each task has its own stem.
    assert counts(PLE(torso, VECTORS, shared_experts=2)) == (2 * BODY, [stem + BODY + 9 * 3 for stem in OWN_STEMS])
    # Two levels of bodies: 8 to 7 and 7 to 6.
    deeper = PLE(MLP(hidden=[8, 7, 6]), VECTORS)
    assert counts(deeper) == (4 * 9 * 7 + 9 * 4 + 8 * 6, [stem + 9 * 2 + 8 * 6 + 8 * 2 for stem in OWN_STEMS])


def test_moore_parameter_counts() -> None:
    torso = MLP(hidden=[8, 6])
    assert counts(MOORE(torso, SAME, experts=3)) == (3 * (STEM + BODY), [3] * 3)
    assert counts(MOORE(torso, VECTORS, experts=3)) == (3 * BODY, [stem + 3 for stem in OWN_STEMS])


def test_care_parameter_counts() -> None:
    sharing = CARE(MLP(hidden=[8, 6]), SAME, experts=2, context=7)
    # Three layers of the context, two of the attention and its output.
    assert counts(sharing) == (2 * (STEM + BODY) + 3 * 8 * 7 + 2 * 8 * 7 + 8 * 2, [7] * 3)
    assert sharing.num_features == 6 + 7


def test_soft_moe_parameter_counts() -> None:
    vector = SoftMoE(MLP(hidden=[8, 6]), SAME, experts=2)
    assert counts(vector) == (STEM + 2 * BODY + 8 * 2, [0] * 3)
    assert vector.num_features == 6
    # Images of 10x10 have 64 tokens of 3 channels after the convolution: 13 slots for each of 5 experts.
    image = SoftMoE(MinAtarCNN(channels=3, features=6), SAME_IMAGES, experts=5)
    assert counts(image) == ((4 * 9 + 1) * 3 + 5 * (4 * 6 + 7 * 3) + 3 * 5 * 13, [0] * 3)
    assert image.num_features == 64 * 3


# -- each against a plain loop --------------------------------------------------------------------------------------------------


def layers(torso: Torso, shapes: Shapes, least: float) -> list[nn.Module]:
    """Layers of an expert: the blocks of the body, after the stem if they are too few and the stem can be shared."""
    blocks = list(torso.body(shapes[0]))
    return [torso.stem(shapes[0]), *blocks] if len(blocks) < least and len(set(shapes)) == 1 else blocks


def gate(linear: nn.Module, task: int, x: torch.Tensor) -> list[float]:
    """Gate weights of a task for one sample `[1, C, ...]`."""
    read = x[0].reshape(x.shape[1], -1).mean(1)
    if isinstance(linear, nn.Linear):
        return torch.softmax(linear.weight @ read + linear.bias, 0).tolist()
    return torch.softmax(read @ linear.weight[task] + linear.bias[task, 0], 0).tolist()


def assert_agrees(sharing: Sharing, shapes: Shapes, one: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Assert that features equal `one(task, sample)` for samples `[1, ...]` of each task."""
    observation = observations(shapes)
    features = sharing(observation)
    for task, sample in itertools.product(range(len(shapes)), range(2)):
        assert torch.allclose(features[task, sample], one(task, observation[task, sample : sample + 1]).flatten(), atol=1e-5)


def weighted(weights: list[float], outputs: list[torch.Tensor]) -> torch.Tensor:
    assert len(weights) == len(outputs)
    return sum((weight * output for weight, output in zip(weights, outputs, strict=True)), torch.zeros(()))


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_mmoe_equals_gated_sum_of_experts(torso: Torso, shapes: Shapes) -> None:
    sharing = MMoE(torso, shapes, experts=3)
    experts = [row(sharing.experts, index, nn.Sequential(*layers(torso, shapes, 1))) for index in range(3)]

    def one(task: int, sample: torch.Tensor) -> torch.Tensor:
        x = read_by_experts(sharing, torso, shapes, task, sample)
        return weighted(gate(sharing.gate.linear, task, x), [expert(x) for expert in experts])

    assert_agrees(sharing, shapes, one)


@pytest.mark.parametrize(("torso", "shapes"), CASES)
@pytest.mark.parametrize(("shared", "own"), [(1, 1), (2, 3)])
def test_ple_equals_loop_over_levels_and_experts(torso: Torso, shapes: Shapes, shared: int, own: int) -> None:
    sharing, tasks = PLE(torso, shapes, shared_experts=shared, task_experts=own), range(len(shapes))
    below = len(layers(torso, shapes, 2)) // 2
    assert (sharing.lower is None) == (not below)
    upper = lambda: nn.Sequential(*layers(torso, shapes, 2)[below:])  # noqa: E731
    uppers = {(task, each): row(sharing.task_experts[each], task, upper()) for task in tasks for each in range(own)}
    shareds = [row(sharing.shared_experts, each, upper()) for each in range(shared)]
    lower = nn.Sequential(*layers(torso, shapes, 2)[:below])
    lowers = [row(sharing.lower.experts, each, copy.deepcopy(lower)) for each in range(len(tasks) * own + shared)] if below else []

    def one(task: int, sample: torch.Tensor) -> torch.Tensor:
        x = of_task = of_all = read_by_experts(sharing, torso, shapes, task, sample)
        if below:
            outputs = [expert(x) for expert in lowers]
            mine = outputs[task * own : (task + 1) * own] + outputs[len(tasks) * own :]
            of_task = weighted(gate(sharing.lower.gate.linear, task, x), mine)
            of_all = weighted(gate(sharing.lower.shared_gate.linear, task, x), outputs)
        outputs = [uppers[task, each](of_task) for each in range(own)] + [expert(of_all) for expert in shareds]
        return weighted(gate(sharing.gate.linear, task, of_task), outputs)

    assert_agrees(sharing, shapes, one)


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_moore_equals_mixture_of_qr_factors(torso: Torso, shapes: Shapes) -> None:
    """Against a QR decomposition per sample, with the signs of Gram-Schmidt."""
    sharing = MOORE(torso, shapes, experts=3)
    recipe = nn.Sequential(*layers(torso, shapes, 9))
    assert isinstance(recipe[-1][-1], nn.ReLU)
    recipe[-1][-1] = nn.Identity()
    experts = [row(sharing.experts, index, copy.deepcopy(recipe)) for index in range(3)]

    def one(task: int, sample: torch.Tensor) -> torch.Tensor:
        x = read_by_experts(sharing, torso, shapes, task, sample)
        q, r = torch.linalg.qr(torch.stack([expert(x)[0] for expert in experts], 1))
        return torch.tanh(q * r.diagonal().sign() @ sharing.task_weights.vectors[task])

    assert_agrees(sharing, shapes, one)


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_care_equals_attention_from_task_context(torso: Torso, shapes: Shapes) -> None:
    sharing = CARE(torso, shapes, experts=3, context=7)
    encoders = [row(sharing.experts, index, nn.Sequential(*layers(torso, shapes, 9))) for index in range(3)]

    def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module.weight @ x + module.bias

    def one(task: int, sample: torch.Tensor) -> torch.Tensor:
        x = read_by_experts(sharing, torso, shapes, task, sample)
        context = sharing.embedding.vectors[task]
        for index in (1, 3, 5):
            context = linear(sharing.context[index], context.relu())
        logits = context
        for index in (0, 2, 4):
            logits = linear(sharing.attention[index], logits if index == 0 else logits.relu())
        return torch.cat([weighted(logits.softmax(0).tolist(), [encoder(x)[0] for encoder in encoders]), context])

    assert_agrees(sharing, shapes, one)


@pytest.mark.parametrize(("torso", "shapes"), [*CASES, (ImpalaCNN(features=6), [(2, 20, 20)] * 2)])
def test_soft_moe_equals_loop_over_slots_and_tokens(torso: Torso, shapes: Shapes) -> None:
    """Against the formula, slot by slot and token by token."""
    sharing = SoftMoE(torso, shapes, experts=5)
    *before, last = layers(torso, shapes, 1)
    with torch.no_grad():
        for own, parameter in zip(nn.Sequential(*before).parameters(), sharing.before.parameters(), strict=True):
            own.copy_(parameter)
    slots_CS = sharing.slots
    of_images = len(shapes[0]) == 3
    if of_images:  # Flatten, Linear, maybe LayerNorm, ReLU
        last = nn.Sequential(nn.Linear(len(slots_CS), torso.num_features), *last[2:], nn.Linear(torso.num_features, len(slots_CS)))
    experts = [row(sharing.experts, index, copy.deepcopy(last)) for index in range(5)]

    def one(task: int, sample: torch.Tensor) -> torch.Tensor:
        x = nn.Sequential(*before)(read_by_experts(sharing, torso, shapes, task, sample))[0]
        tokens = list(x.reshape(len(slots_CS), -1).T)
        per_expert = -(-len(tokens) // 5)
        assert slots_CS.shape[1] == 5 * per_expert
        logit_TS = torch.stack([token @ slots_CS for token in tokens]).exp()
        made = []
        for slot in range(5 * per_expert):
            mixed = weighted((logit_TS[:, slot] / logit_TS[:, slot].sum()).tolist(), tokens)
            made.append(experts[slot // per_expert](mixed[None])[0])
        return torch.stack([weighted((logits / logits.sum()).tolist(), made) for logits in logit_TS])

    assert_agrees(sharing, shapes, one)


# -- gates and orthogonality ----------------------------------------------------------------------------------------------------


def test_mmoe_routing_is_the_mean_gate() -> None:
    sharing, observation = MMoE(MLP(hidden=[8, 6]), SAME, experts=4), observations(SAME)
    gates = [[gate(sharing.gate.linear, task, sharing.stem(observation[task, [sample]])) for sample in range(4)] for task in range(3)]
    assert torch.allclose(sharing.routing(observation)["experts"], torch.tensor(gates).mean(1), atol=1e-6)


@pytest.mark.parametrize("shapes", [SAME, SAME_IMAGES])
def test_expert_with_all_weight_determines_features(shapes: Shapes) -> None:
    """If the slots of one expert have all the weight, only that expert affects the features."""
    sharing = SoftMoE(MLP(hidden=[8, 6]) if shapes is SAME else MinAtarCNN(channels=3, features=6), shapes, experts=2)
    observation = observations(shapes)
    with torch.no_grad():
        sharing.stem[0].bias += 10.0  # every token is far from zero
        sharing.slots[:, : sharing.slots.shape[1] // 2] += 100.0
        features = sharing(observation)
        for parameter in sharing.experts.parameters():
            parameter[1] += 1.0
        assert torch.equal(sharing(observation), features)
        for parameter in sharing.experts.parameters():
            parameter[0] += 1.0
        assert not torch.allclose(sharing(observation), features)
    assert torch.allclose(sharing.routing(observation)["experts"], torch.tensor([1.0, 0.0]).expand(3, 2))


@pytest.mark.parametrize("seed", range(20))
def test_gram_schmidt_gives_orthonormal_vectors_in_the_same_span(seed: int) -> None:
    torch.manual_seed(seed)
    experts, features = 1 + seed % 5, 5 + seed
    x_EBF = torch.randn(experts, 7, features) * 10 ** torch.randn(experts, 7, 1)
    v_EBF = orthonormal(x_EBF)
    products = torch.einsum("ebf,dbf->bed", v_EBF, v_EBF)
    assert torch.allclose(products, torch.eye(experts).expand_as(products), atol=1e-4)
    # Each input is a combination of the results up to its own, with a positive coefficient for its own.
    combined = torch.einsum("ebf,dbf->bed", x_EBF, v_EBF)
    assert torch.allclose(torch.einsum("bed,dbf->ebf", combined.tril(), v_EBF), x_EBF, rtol=1e-3, atol=1e-4)
    assert (combined.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("same", [0, 1])
def test_equal_experts_give_finite_gradients(same: int) -> None:
    x_EBF = torch.randn(3, 2, 8)
    x_EBF[2] = x_EBF[same] * 2
    x_EBF.requires_grad_()
    v_EBF = orthonormal(x_EBF)
    v_EBF.square().sum().backward()
    assert v_EBF.isfinite().all()
    assert x_EBF.grad is not None
    assert x_EBF.grad.isfinite().all()


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_moore_experts_are_orthonormal_for_every_sample(torso: Torso, shapes: Shapes) -> None:
    """Weights that select one expert give its unit vector before tanh."""
    sharing, observation = MOORE(torso, shapes), observations(shapes)
    vectors = []
    with torch.no_grad():
        for expert in range(4):
            sharing.task_weights.vectors.copy_(torch.eye(4)[expert].expand(len(shapes), -1))
            vectors.append(sharing(observation).clamp(-1 + 1e-6, 1 - 1e-6).atanh())
    products = torch.einsum("ekbf,dkbf->kbed", torch.stack(vectors), torch.stack(vectors))
    assert torch.allclose(products, torch.eye(4).expand_as(products), atol=1e-3)


def test_moore_refuses_more_experts_than_features() -> None:
    with pytest.raises(ValueError, match=r"network\.sharing\.experts must be at most the number of features, 6, got 7"):
        MOORE(MLP(hidden=[8, 6]), SAME, experts=7)
