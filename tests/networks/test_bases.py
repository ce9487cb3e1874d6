"""PaCo against torsos with mixed parameters, and its initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtrl_cli.networks.bases import PaCo
from mtrl_cli.networks.torsos import MLP, Torso
from tests.helpers.experts import CASES, Shapes, read_by_experts
from tests.helpers.structures import VECTORS, counts, observations


def scattered(torso: Torso, shapes: Shapes, bases: int) -> PaCo:
    """PaCo with different sets in the basis, as after training."""
    torch.manual_seed(0)
    sharing = PaCo(torso, shapes, bases=bases)
    with torch.no_grad():
        for parameter in sharing.basis.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return sharing


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_paco_torso_has_mixed_parameters(torso: Torso, shapes: Shapes) -> None:
    sharing, observation = scattered(torso, shapes, bases=4), observations(shapes)
    features = sharing(observation)
    same = len(set(shapes)) == 1
    names = sorted(sharing.basis.stacked)
    for task in range(len(shapes)):
        single = nn.Sequential(*([torso.stem(shapes[0])] if same else []), *torso.body(shapes[0]))
        with torch.no_grad():
            for name, stacked in zip(sorted(name for name, _ in single.named_parameters()), names, strict=True):
                sets, weights = sharing.basis.stacked[stacked], sharing.weights.vectors[task]
                single.get_parameter(name).copy_(sum(weights[each] * sets[each] for each in range(4)))
        for sample in range(4):
            x = read_by_experts(sharing, torso, shapes, task, observation[task, sample : sample + 1])
            assert torch.allclose(features[task, sample], single(x)[0], atol=1e-4)


def test_paco_parameter_counts() -> None:
    torso = MLP(hidden=[8, 6])
    assert counts(PaCo(torso, [(4,)] * 3, bases=2)) == (2 * (5 * 8 + 9 * 6), [2] * 3)
    assert counts(PaCo(torso, VECTORS, bases=2)) == (2 * 9 * 6, [5 * 8 + 2, 7 * 8 + 2, 3 * 8 + 2])


@pytest.mark.parametrize("seed", range(5))
def test_paco_tasks_start_equal_and_diverge(seed: int) -> None:
    torch.manual_seed(seed)
    sharing = PaCo(MLP(hidden=[8, 6]), [(4,)] * 3, bases=3)
    assert torch.allclose(sharing.weights.vectors.sum(1), torch.ones(3), atol=1e-5)
    x = torch.randn(1, 10, 4).expand(3, -1, -1)
    features = sharing(x)
    assert torch.allclose(features[1:], features[:1].expand(2, -1, -1), atol=1e-5)
    optimizer = torch.optim.Adam(sharing.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (sharing(x) - torch.arange(3.0)[:, None, None]).square().mean().backward()
        optimizer.step()
    sets = sharing.basis.stacked["0:0:weight"]
    assert not torch.allclose(sets[0], sets[1])
    assert not torch.allclose(sharing(x)[0], sharing(x)[1], atol=1e-4)


def test_paco_mixes_in_float32_under_autocast() -> None:
    """Sets whose mixture cancels to a value that bfloat16 would lose."""
    sharing = PaCo(MLP(hidden=[6]), [(4,)] * 2, bases=2)
    with torch.no_grad():
        for parameter in sharing.basis.parameters():
            parameter[1] = -parameter[0]
            parameter[0] += 0.001
        sharing.weights.vectors.fill_(100.0)
    x = torch.ones(2, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = sharing(x.bfloat16())
    assert torch.allclose(features.float(), torch.full((2, 3, 6), 0.5), atol=0.01)  # 0.1 for each of 4 inputs and the bias
