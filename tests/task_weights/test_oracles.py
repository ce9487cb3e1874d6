"""Task weightings against independent results: TorchJD on the full Jacobian of a network, cases by hand, properties."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torchjd import aggregation, scalarization

from mtrl_cli.networks.heads import PlainHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.task_weights.base import TaskWeights
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.task_weights.gram import projected, random_orders, shortest, vaccinated
from tests.helpers.fake_tasks import GivenGradients, weights_of

K = 4


class Case:
    """A small network with a head per task, a batch per task, and conflicting losses."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.network = MultiTaskNetwork(HardSharing(MLP(hidden=[7, 6]), [(5,)] * K), PlainHead(6, [3] * K), 1.0)
        self.input, self.target = torch.randn(K, 8, 5), torch.randn(K, 8, 3) * torch.arange(1.0, K + 1)[:, None, None]
        self.shared, self.own = self.network.shared_parameters(), self.network.own_parameters()

    def loss_K(self) -> torch.Tensor:
        return (self.network(self.input) - self.target).square().mean((1, 2))

    def jacobian(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Derivatives of the losses in all parameters, `[K, P]`, computed independently of the code under test."""
        by_parameter = torch.autograd.functional.jacobian(
            lambda *values: (
                (
                    torch.func.functional_call(self.network, dict(zip(self.names(parameters), values, strict=True)), (self.input,))
                    - self.target
                )
                .square()
                .mean((1, 2))
            ),
            tuple(parameters),
        )
        return torch.cat([each.flatten(1) for each in by_parameter], 1)

    def names(self, parameters: list[nn.Parameter]) -> list[str]:
        by_id = {id(parameter): name for name, parameter in self.network.named_parameters()}
        return [by_id[id(parameter)] for parameter in parameters]

    def backward(self, weights: TaskWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of shared and own parameters, each flattened."""
        self.network.zero_grad()
        weights.backward(AutogradGradients(self.loss_K(), self.shared, self.own))
        return tuple(torch.cat([each.grad.flatten() for each in group if each.grad is not None]) for group in (self.shared, self.own))  # type: ignore[return-value]


def normalised_nash(J: torch.Tensor) -> torch.Tensor:
    weighting = aggregation.NashMTL(len(J), max_norm=0.0, optim_niter=20).weighting
    weight_K = weighting(J)  # from the rows, not from a root of their Gram matrix
    return weight_K @ J / weight_K.sum()


def normalised_fairgrad(J: torch.Tensor) -> torch.Tensor:
    weight_K = aggregation.FairGrad(1.0).gramian_weighting(J @ J.T)
    return weight_K @ J / weight_K.sum()


# TorchJD's results on the full Jacobian, on the scale of the mean.
ORACLES: dict[str, Any] = {
    "mgda": aggregation.MGDA(epsilon=1e-9, max_iters=250),
    "imtl_g": aggregation.IMTLG(),
    "aligned_mtl": aggregation.AlignedMTL(),
    "cagrad": lambda J: aggregation.CAGrad(c=0.5)(J) / 1.5,
    "upgrad": aggregation.UPGrad(),
    "nash_mtl": normalised_nash,
    "fairgrad": normalised_fairgrad,
}


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ORACLES)
def test_gradients_equal_torchjd_on_the_full_jacobian(name: str, seed: int) -> None:
    case = Case(seed)
    of_shared, of_own = case.backward(weights_of(name, K))
    J = case.jacobian(case.shared).double()
    expected = ORACLES[name](J).float()
    assert (J @ J.T).min() < 0, "there is a conflict"
    torch.testing.assert_close(of_shared, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    torch.testing.assert_close(of_own, case.jacobian(case.own).mean(0), rtol=1e-4, atol=1e-6)  # as with uniform weights


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_vectorised_projections_equal_torchjd_loops(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several updates, because GradVac's targets move."""
    case, weights = Case(seed), weights_of(name, K, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    oracle: Any = aggregation.PCGrad() if name == "pcgrad" else aggregation.GradVac(beta=0.5)
    for _ in range(4):
        orders = random_orders(K, generator).tolist()
        # PCGrad permutes all tasks and skips the task itself; GradVac permutes the positions of the others.
        drawn = [[*order, i] if name == "pcgrad" else [j - (j > i) for j in order] for i, order in enumerate(orders)]
        of_shared, _ = case.backward(weights)
        J = case.jacobian(case.shared)
        with monkeypatch.context() as patched:
            remaining = iter(drawn)
            patched.setattr(torch, "randperm", lambda count, remaining=remaining: torch.tensor(next(remaining)))
            # GradVac adds a constant to products of norms.
            length = J.norm() / K**0.5
            expected = oracle(J / length) * length / K
        torch.testing.assert_close(of_shared, expected, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for parameter in case.shared:
                parameter += 0.02 * torch.randn_like(parameter)


def test_graddrop_equals_torchjd_and_keeps_one_sign_per_entry() -> None:
    case, weights = Case(0), weights_of("graddrop", K, seed=3)
    of_shared, _ = case.backward(weights)
    J = case.jacobian(case.shared)
    torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3))))
    torch.testing.assert_close(of_shared, aggregation.GradDrop()(J) / K, rtol=1e-4, atol=1e-7)
    positive, negative = J.clamp(min=0).sum(0) / K, J.clamp(max=0).sum(0) / K
    assert (torch.isclose(of_shared, positive, atol=1e-6) | torch.isclose(of_shared, negative, atol=1e-6)).all()
    agreed = (J >= 0).all(0) | (J <= 0).all(0)
    torch.testing.assert_close(of_shared[agreed], J.mean(0)[agreed], rtol=1e-4, atol=1e-7)


def test_graddrop_weight_is_the_kept_share() -> None:
    """Task 0 has 9/10 of its squared norm in the first entry, where both agree.

    In the second entry the larger side wins with probability 3/4.
    """
    gradients = [GivenGradients(torch.tensor([[3.0, 1.0], [1.0, -3.0]])) for _ in range(400)]
    weights = weights_of("graddrop", 2)
    pairs = [tuple(round(each, 5) for each in weights.backward(gradient).tolist()) for gradient in gradients]
    kept = {(0.45, 0.5): [4 / 2, -3 / 2], (0.5, 0.05): [4 / 2, 1 / 2]}
    assert set(pairs) == set(kept)
    assert all(gradient.result_P.tolist() == pytest.approx(kept[pair]) for pair, gradient in zip(pairs, gradients, strict=True))
    assert 270 < pairs.count((0.45, 0.5)) < 330


# -- by hand --------------------------------------------------------------------------------------------------------------------


def test_pcgrad_of_two_tasks_by_hand() -> None:
    """g = (1, 0), h = (-1, 1).

    g without its component along h is (1, 0) + h / 2 = (0.5, 0.5); h without its component along g is (0, 1). Their mean.
    """
    gradients = GivenGradients(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    weights_of("pcgrad", 2).backward(gradients)
    assert gradients.result_P.tolist() == pytest.approx([0.25, 0.75])


def test_gradvac_moves_a_cosine_to_its_target() -> None:
    """With beta 1, the cosines of one call are the targets of the next. Each target is reached, including PCGrad's zero."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        J = torch.randn(2, 5, generator=generator)
        target_KK = torch.rand(2, 2, generator=generator)
        gram_KK = J @ J.T
        weight_K, found_KK = vaccinated(gram_KK, target_KK, torch.tensor([[1], [0]]))
        cosine = gram_KK[0, 1] / (gram_KK[0, 0] * gram_KK[1, 1]).sqrt()
        assert found_KK[0, 1] == pytest.approx(float(cosine), abs=1e-5)
        changed = []
        for i, j in ((0, 1), (1, 0)):
            row = J[i]
            if cosine < target_KK[i, j]:  # the step in the plane of the two gradients: equation 6
                phi, sine = float(target_KK[i, j]), (1 - target_KK[i, j] ** 2).sqrt()
                step = J[i].norm() * (phi * (1 - cosine**2).sqrt() - cosine * sine) / (J[j].norm() * sine)
                row = J[i] + step * J[j]
                assert torch.cosine_similarity(row, J[j], dim=0) == pytest.approx(phi, abs=1e-4)
            changed.append(row)
        torch.testing.assert_close(weight_K @ J, torch.stack(changed).mean(0), rtol=1e-3, atol=1e-4)


def test_mgda_of_two_tasks_by_hand() -> None:
    """The point nearest to the origin on the segment from (2, 0) to (0, 1): weights 1/5 and 4/5."""
    gradients = GivenGradients(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert weights_of("mgda", 2).backward(gradients).tolist() == pytest.approx([0.2, 0.8])


def test_nash_mtl_and_fairgrad_of_orthogonal_tasks_by_hand() -> None:
    """G a = 1 / a with G = diag(4, 1): a = (1/2, 1), divided by its sum."""
    for name in ("nash_mtl", "fairgrad"):
        gradients = GivenGradients(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        assert weights_of(name, 2).backward(gradients).tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-3), name


def test_nash_mtl_weights_solve_the_bargaining_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        J = torch.randn(5, 30, generator=generator)
        weight_K = weights_of("nash_mtl", 5).backward(GivenGradients(J)).double()
        product_K = weight_K * ((J @ J.T).double() @ weight_K)  # a (G a) = 1, up to the common factor
        assert (product_K / product_K.mean()).sub(1).abs().max() < 0.02


def test_nash_mtl_solves_only_when_due() -> None:
    weights = weights_of("nash_mtl", 3, every=3)
    generator = torch.Generator().manual_seed(0)
    solved, used = [], []
    for _ in range(7):
        gradients = GivenGradients(torch.randn(3, 6, generator=generator))
        used.append(weights.backward(gradients).tolist())
        solved.append("gram" in gradients.calls)
    assert solved == [True, False, False, True, False, False, True]
    assert used[0] == used[1] == used[2] != used[3] == used[4] == used[5] != used[6]


def test_imtl_g_has_equal_projections_onto_all_tasks() -> None:
    J = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    gradients = GivenGradients(J)
    assert weights_of("imtl_g", 4).backward(gradients).sum() == pytest.approx(1, abs=1e-4)
    onto_K = (J / J.norm(dim=1, keepdim=True)) @ gradients.result_P
    assert onto_K.tolist() == pytest.approx([float(onto_K[0])] * 4, rel=1e-3)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_mtl_makes_singular_values_equal(scale: str) -> None:
    J = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    U, S, V = torch.linalg.svd(J, full_matrices=False)
    wanted = {"min": S.min(), "median": S.median(), "rmse": S.square().mean().sqrt()}[scale]
    gradients = GivenGradients(J)
    weights_of("aligned_mtl", 3, scale=scale).backward(gradients)
    torch.testing.assert_close(gradients.result_P, (wanted * U @ V).mean(0), rtol=1e-3, atol=1e-4)


def test_gradnorm_by_hand() -> None:
    """Norms 3 and 1 with weights 1 and 1: the first is above the mean, 2, the second below. Adam's first step is lr in both directions."""
    weights = weights_of("gradnorm", 2, lr=0.025, alpha=1.0)
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert weights.backward(GivenGradients(rows, torch.tensor([2.0, 2.0]))).tolist() == [0.5, 0.5]
    assert weights.backward(GivenGradients(rows, torch.tensor([2.0, 2.0]))).tolist() == pytest.approx([0.975 / 2, 1.025 / 2])
    # The first loss fell to a tenth, the second is unchanged: rates 0.1 / 0.55 and 1 / 0.55 give different targets.
    slower = weights_of("gradnorm", 2, lr=0.025, alpha=1.0)
    equal = torch.eye(2)
    slower.backward(GivenGradients(equal, torch.tensor([1.0, 1.0])))
    slower.backward(GivenGradients(equal, torch.tensor([0.1, 1.0])))
    weight_K = slower.backward(GivenGradients(equal, torch.tensor([0.1, 1.0])))
    assert weight_K[1] > 0.5 > weight_K[0]


def test_db_mtl_by_hand() -> None:
    """Losses 1 and 4, gradients (2, 0) and (0, 4).

    Gradients of log losses: (2, 0) and (0, 1), scaled to (2, 0) and (0, 2): factors 1 and 1/2.
    """
    weights = weights_of("db_mtl", 2, beta=0.5)
    gradients = GivenGradients(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([1.0, 4.0]))
    weight_K = weights.backward(gradients)
    assert gradients.result_P.tolist() == pytest.approx([2 / 1.5, 2 / 1.5])
    assert weight_K.tolist() == pytest.approx([1.0 / 1.5, 0.5 / 1.5])  # of (2, 0) and of (0, 4)
    # Then (0, 6) and (0, 4) at losses 1 and 1: averages (1, 3) and (0, 2.5), the second scaled to norm sqrt(10).
    gradients = GivenGradients(torch.tensor([[0.0, 6.0], [0.0, 4.0]]), torch.tensor([1.0, 1.0]))
    weights.backward(gradients)
    factors = 1 + 10**0.5 / 2.5 * (0.25 + 1) / 2  # times the averaged inverses of the losses
    assert gradients.result_P.tolist() == pytest.approx([1 / factors, (3 + 10**0.5) / factors])


def test_dwa_after_two_epochs_by_hand() -> None:
    """Epochs of two updates with means (3, 4) and (1.5, 4): rates 1/2 and 1, temperature 2."""
    weights = weights_of("dwa", 2, epoch=2, temperature=2.0)
    rows = torch.eye(2)
    for losses in ([2.0, 4.0], [4.0, 4.0], [1.0, 3.0], [2.0, 5.0]):
        assert weights.backward(GivenGradients(rows, torch.tensor(losses))).tolist() == [0.5, 0.5]
    expected = torch.tensor([0.25, 0.5]).softmax(0)
    for losses in ([9.0, 8.0], [9.0, 8.0]):
        torch.testing.assert_close(weights.backward(GivenGradients(rows, torch.tensor(losses))), expected)
    torch.testing.assert_close(weights.backward(GivenGradients(rows, torch.ones(2))), torch.tensor([3.0, 1.0]).softmax(0))


def test_random_weights_are_softmax_of_normal_draws() -> None:
    weights = weights_of("random", 2)
    drawn = torch.stack([weights.backward(GivenGradients(torch.eye(2))) for _ in range(2000)])
    difference = drawn[:, 0].log() - drawn[:, 1].log()  # of two normal draws
    assert difference.mean().abs() < 0.1
    assert difference.std() == pytest.approx(2**0.5, rel=0.05)


# -- against TorchJD's scalarizers ----------------------------------------------------------------------------------------------


def by_scalarizer(scalarizer: Any, loss_K: torch.Tensor) -> torch.Tensor:
    """Weights of the losses in a scalarizer's gradient."""
    loss_K = loss_K.clone().requires_grad_()
    (weight_K,) = torch.autograd.grad(scalarizer(loss_K), loss_K)
    return weight_K


def test_famo_equals_torchjd_over_several_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, oracle = weights_of("famo", 3, lr=0.1, weight_decay=0.01), scalarization.FAMO(3, lr=0.1, weight_decay=0.01)
    for _ in range(5):
        before_K, after_K = torch.rand(2, 3, generator=generator) + 0.05
        weight_K = weights.backward(GivenGradients(torch.eye(3), before_K))
        torch.testing.assert_close(weight_K, by_scalarizer(oracle, before_K), rtol=1e-4, atol=1e-6)
        weights.after_step(after_K)
        oracle.update(after_K)


def test_famo_of_two_steps_by_hand() -> None:
    """Losses 1 and 2 with equal logits give weights 1/L, divided by their sum.

    The first loss halves, the second stays. Adam's first step lowers the first logit and raises the second, by lr each.
    """
    weights = weights_of("famo", 2, lr=0.1, weight_decay=0.0)
    loss_K = torch.tensor([1.0, 2.0])
    assert weights.backward(GivenGradients(torch.eye(2), loss_K)).tolist() == pytest.approx([2 / 3, 1 / 3])
    weights.after_step(torch.tensor([0.5, 2.0]))
    z_K = torch.tensor([-0.1, 0.1]).softmax(0)
    expected = (z_K / loss_K) / (z_K / loss_K).sum()
    torch.testing.assert_close(weights.backward(GivenGradients(torch.eye(2), loss_K)), expected, rtol=1e-4, atol=1e-6)


def test_uncertainty_equals_kendall_loss_trained_with_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, oracle = weights_of("uncertainty", 3, lr=0.05), scalarization.UW(3)
    adam = torch.optim.Adam(oracle.parameters(), lr=0.05)
    for _ in range(6):
        loss_K = torch.rand(3, generator=generator) * torch.tensor([0.1, 1.0, 10.0])
        expected = by_scalarizer(oracle, loss_K)
        torch.testing.assert_close(weights.backward(GivenGradients(torch.eye(3), loss_K)), expected / expected.sum())
        adam.zero_grad()
        oracle(loss_K).backward()
        adam.step()


@pytest.mark.parametrize("mu", [0.01, 0.1, 1.0])
def test_stch_equals_torchjd(mu: float) -> None:
    for seed in range(5):
        loss_K = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        expected = by_scalarizer(scalarization.STCH(mu), loss_K)
        torch.testing.assert_close(
            weights_of("stch", mu=mu).backward(GivenGradients(torch.eye(3), loss_K)), expected * 3, rtol=1e-4, atol=1e-6
        )


# -- properties -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_small_step_of_mgda_lowers_every_loss(seed: int) -> None:
    case = Case(seed)
    before_K = case.loss_K().detach()
    case.backward(weights_of("mgda", K))
    with torch.no_grad():
        for parameter in case.shared:  # heads are not changed, because each lowers only its own loss
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    assert (case.loss_K() < before_K).all()


def test_mgda_is_the_shortest_weighted_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        J = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        weight_K = torch.from_numpy(shortest((J @ J.T).numpy(), 2000))
        assert weight_K.sum() == pytest.approx(1)
        assert weight_K.min() >= 0
        others = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((500,))
        assert (weight_K @ J).norm() <= (others @ J).norm(dim=1).min() + 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_upgrad_conflicts_with_no_task(seed: int) -> None:
    case = Case(seed)
    of_shared, _ = case.backward(weights_of("upgrad", K))
    J = case.jacobian(case.shared)
    assert (J @ J.T).min() < 0
    assert (J @ of_shared >= -1e-3 * J.norm() * of_shared.norm()).all()


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "upgrad", "graddrop"])
def test_gradients_without_conflict_give_the_mean(name: str) -> None:
    J = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    gradients = GivenGradients(J)
    weights_of(name, 4).backward(gradients)
    torch.testing.assert_close(gradients.result_P, J.mean(0), rtol=1e-3, atol=1e-4)


def test_cagrad_with_c_0_is_the_mean_and_else_lies_in_its_ball() -> None:
    J = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for c in (0.0, 0.3, 0.9):
        gradients = GivenGradients(J)
        weights_of("cagrad", 4, c=c).backward(gradients)
        away = (gradients.result_P * (1 + c) - J.mean(0)).norm()
        assert away == pytest.approx(c * float(J.mean(0).norm()), rel=1e-2, abs=1e-4)
        least = (J @ gradients.result_P).min() * (1 + c)
        assert least >= (J @ J.mean(0)).min() - 1e-3, "the least improved task improves no less than with the mean"


def test_pcgrad_draws_every_order() -> None:
    seen = {tuple(order) for seed in range(60) for order in random_orders(3, torch.Generator().manual_seed(seed)).tolist()}
    assert seen == {pair for k in range(3) for pair in itertools.permutations([j for j in range(3) if j != k])}
    gram_KK = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.4], [-0.5, -0.4, 1.0]])
    forth, back = (projected(gram_KK, torch.tensor(order)) for order in ([[1, 2], [0, 2], [0, 1]], [[2, 1], [2, 0], [1, 0]]))
    assert not torch.allclose(forth, back)


def test_cagrad_uses_the_mean_if_its_direction_is_undefined() -> None:
    """A task without a gradient, or gradients that sum to zero: the result is the centre of the ball around the mean."""
    for rows in ([[1.0, 2.0], [0.0, 0.0], [2.0, -1.0]], [[1.0, 0.0], [-1.0, 0.0], [0.0, 1e-6]]):
        gradients = GivenGradients(torch.tensor(rows))
        assert weights_of("cagrad", 3, c=0.5).backward(gradients).tolist() == pytest.approx([1 / 3 / 1.5] * 3)


def test_imtl_g_is_uniform_if_gradients_cancel() -> None:
    torch.manual_seed(0)
    rows_KP = torch.randn(3, 40)
    rows_KP[2] = -rows_KP[0] - rows_KP[1] + 1e-4 * torch.randn(40)
    for rows in (rows_KP, torch.tensor([[1.0, 2.0], [-1.0, -2.0]])):
        weights = weights_of("imtl_g", len(rows))
        assert weights.backward(GivenGradients(rows)).tolist() == pytest.approx([1 / len(rows)] * len(rows))


def test_nash_mtl_retries_a_failed_solution_in_the_next_update() -> None:
    weights, plain = weights_of("nash_mtl", 3, every=50), weights_of("nash_mtl", 3, every=50)
    zero_row = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, -1.0]])
    assert weights.backward(GivenGradients(zero_row)).tolist() == pytest.approx([1 / 3] * 3)
    rows = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.1, 1.0], [2.0, -1.0, 0.3]])
    found_K = plain.backward(GivenGradients(rows))
    assert found_K.std() > 0.01
    torch.testing.assert_close(weights.backward(GivenGradients(rows)), found_K)
    torch.testing.assert_close(weights.backward(GivenGradients(zero_row)), found_K)  # kept, as it is not due
