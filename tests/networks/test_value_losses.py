"""Losses of heads, against results by hand and plain Python versions of the papers' formulas."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch

from mtrl_cli.networks.value_losses import cross_entropy, gaussian_histogram, huber, project, quantile_huber


def test_huber_by_hand() -> None:
    error = torch.tensor([0.0, 0.5, -1.0, 2.0, -3.0])
    # threshold 1: e^2 / 2 to 1, then |e| - 1/2
    assert huber(error, 1.0).tolist() == [0.0, 0.125, 0.5, 1.5, 2.5]
    # threshold 2: e^2 / 2 to 2, then 2 (|e| - 1)
    assert huber(error, 2.0).tolist() == [0.0, 0.125, 0.5, 2.0, 4.0]
    assert huber(error, 0.0).tolist() == [0.0, 0.125, 0.5, 2.0, 4.5]


@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
def test_huber_agrees_with_torch(threshold: float) -> None:
    error = torch.linspace(-5, 5, 101)
    expected = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=threshold)
    assert torch.allclose(huber(error, threshold), expected)


def test_huber_gradient_is_the_clipped_error() -> None:
    error = torch.tensor([-4.0, -0.5, 0.5, 4.0], requires_grad=True)
    huber(error, 1.0).sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [-1.0, -0.5, 0.5, 1.0]


# -- c51 ------------------------------------------------------------------------------------------------------------------------


def projected(probability: list[float], location: list[float], v_min: float, v_max: float) -> list[float]:
    """Bellemare et al. 2017, algorithm 1: divide each mass between the neighbouring atoms."""
    width = (v_max - v_min) / (len(probability) - 1)
    mass = [0.0] * len(probability)
    for share, value in zip(probability, location, strict=True):
        place = (min(max(value, v_min), v_max) - v_min) / width
        lower, upper = math.floor(place), math.ceil(place)
        if lower == upper:
            mass[lower] += share
        else:
            mass[lower] += share * (upper - place)
            mass[upper] += share * (place - lower)
    return mass


def test_projection_by_hand() -> None:
    """Atoms -1, 0, 1.

    Half of the mass is at 0.25: three quarters of it go to 0, a quarter to 1. The rest, at 7 and -1, goes to the ends.
    """
    mass = project(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 7.0, -1.0]), -1.0, 1.0)
    assert mass.tolist() == pytest.approx([0.2, 0.375, 0.425])


@pytest.mark.parametrize("seed", range(5))
def test_projection_agrees_with_the_papers_algorithm(seed: int) -> None:
    draw = random.Random(seed)
    atoms, v_min = draw.choice([2, 5, 51]), draw.uniform(-20, 0)
    v_max = v_min + draw.uniform(0.5, 30)
    torch.manual_seed(seed)
    probability = torch.randn(3, 4, atoms).softmax(-1)
    location = v_min + (v_max - v_min) * (1.6 * torch.rand(3, 4, atoms) - 0.3)  # some outside the range
    mass = project(probability, location, v_min, v_max)
    for index in [(k, b) for k in range(3) for b in range(4)]:
        expected = projected(probability[index].tolist(), location[index].tolist(), v_min, v_max)
        assert mass[index].tolist() == pytest.approx(expected, abs=1e-5)


def test_projection_keeps_mass_and_the_mean_within_the_range() -> None:
    torch.manual_seed(0)
    probability, atoms = torch.randn(200, 51).softmax(-1), torch.linspace(-10, 10, 51)
    location = 20 * torch.rand(200, 51) - 10
    mass = project(probability, location, -10.0, 10.0)
    assert torch.allclose(mass.sum(-1), torch.ones(200), atol=1e-5)
    assert torch.allclose(mass @ atoms, (probability * location).sum(-1), atol=1e-4)
    beyond = project(probability, location + 40, -10.0, 10.0)
    assert torch.allclose(beyond[:, -1], torch.ones(200), atol=1e-5)


def test_projection_of_a_distribution_on_the_atoms_is_the_identity() -> None:
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert project(probability, torch.tensor([-3.0, -1.0, 1.0, 3.0]), -3.0, 3.0).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


# -- hl_gauss ---------------------------------------------------------------------------------------------------------------------


def histogram(value: float, edges: list[float], sigma: float) -> list[float]:
    """Differences of the normal distribution function, normalised to the range."""

    def below(x: float) -> float:
        return (1 + math.erf((x - value) / sigma / math.sqrt(2))) / 2

    return [(below(upper) - below(lower)) / (below(edges[-1]) - below(edges[0])) for lower, upper in pairwise(edges)]


@pytest.mark.parametrize("ratio", [0.25, 0.75, 2.0])
def test_histogram_agrees_with_the_normal_distribution(ratio: float) -> None:
    edges = torch.linspace(-10, 10, 102)
    values = torch.linspace(-10, 10, 57)
    probability = gaussian_histogram(values, edges, ratio * 20 / 101)
    for row, value in zip(probability, values.tolist(), strict=True):
        assert row.tolist() == pytest.approx(histogram(value, edges.tolist(), ratio * 20 / 101), abs=2e-5)
    assert torch.allclose(probability.sum(-1), torch.ones(57), atol=1e-5)


def test_histogram_mean_is_the_clipped_value() -> None:
    """The mean over bins is the value, except for truncated tails near the ends."""
    edges, width = torch.linspace(-10, 10, 102), 20 / 101
    centres = (edges[1:] + edges[:-1]) / 2
    values = torch.linspace(-9.2, 9.2, 401)  # five sigma within
    assert torch.allclose(gaussian_histogram(values, edges, 0.75 * width) @ centres, values, atol=0.02 * width)
    ends = gaussian_histogram(torch.tensor([-1e9, -10.0, 10.0, 1e9, torch.inf]), edges, 0.75 * width)
    assert ends.isfinite().all()
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], ends[3])
    assert (ends[:2] @ centres + 10).abs().max() < 1.2 * width


def test_cross_entropy_by_hand() -> None:
    """Logits ln 1, ln 3: probabilities 1/4 and 3/4."""
    loss = cross_entropy(torch.tensor([0.0, math.log(3)]), torch.tensor([0.5, 0.5]))
    assert loss.item() == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))


# -- quantiles --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("number", "samples"), [(1, 1), (3, 3), (5, 2)])
def test_quantile_loss_agrees_with_a_double_loop(threshold: float, number: int, samples: int) -> None:
    torch.manual_seed(number)
    quantile, target = torch.randn(2, 3, number), 2 * torch.randn(2, 3, samples)
    loss = quantile_huber(quantile, target, threshold)
    for k in range(2):
        for b in range(3):
            expected = 0.0
            for i, predicted in enumerate(quantile[k, b].tolist()):
                for sample in target[k, b].tolist():
                    error = sample - predicted
                    weight = (1 - (i + 0.5) / number) if error < 0 else (i + 0.5) / number
                    if not threshold:
                        size = abs(error)
                    elif abs(error) <= threshold:
                        size = error**2 / 2 / threshold
                    else:
                        size = abs(error) - threshold / 2
                    expected += weight * size / samples
            assert loss[k, b].item() == pytest.approx(expected, abs=1e-5)


def test_quantile_loss_is_smallest_at_the_quantiles() -> None:
    """The quantiles of 0, 1, ..., 99 at 1/8, 3/8, 5/8 and 7/8 lie between 12 and 13, 37 and 38, ..."""
    target = torch.arange(100.0)
    quantile = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([quantile], lr=1.0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 50 * 0.98**step
        optimizer.zero_grad()
        quantile_huber(quantile, target, 0.0).backward()
        optimizer.step()
    assert quantile.tolist() == pytest.approx([12, 37, 62, 87], abs=1.5)
