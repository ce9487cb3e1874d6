"""Properties of every task weighting: scale, degenerate input, randomness, state, refused configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cvxpy.error import SolverError
from qpsolvers.exceptions import QPError

from mtrl_cli.checkpoints.state_tree import flatten
from mtrl_cli.machine import extras
from mtrl_cli.task_weights.base import Tasks, TaskWeights
from mtrl_cli.task_weights.scores import ScoreGap
from tests.helpers.command import MtrlHere
from tests.helpers.fake_tasks import ALL_WEIGHTS, GivenGradients, tasks_of, weights_of
from tests.helpers.learners import NAMES, fill, learner_of, parameters, resumed_from, round_trip, rows
from tests.helpers.loops import NAMES as GAMES
from tests.helpers.loops import loop_of, run
from tests.helpers.replay_reference import transition

# Options with which a few updates have the effect of thousands.
QUICK: dict[str, dict[str, Any]] = {
    "static": {"weights": {"t1": 3.0}},
    "uncertainty": {"lr": 0.5},
    "dwa": {"epoch": 2},
    "nash_mtl": {"every": 3},
    "score_gap": {"half_life": 2},
}
BY_LOSSES = ["static", "random", "uncertainty", "dwa", "famo", "stch", "score_gap", "gradnorm"]
SOLVERS = ["cagrad", "fairgrad", "nash_mtl", "upgrad"]


def random_gradients(number: int, num_tasks: int = 3) -> GivenGradients:
    """Rows of different norms with some conflicts, and losses."""
    generator = torch.Generator().manual_seed(number)
    rows_KP = torch.randn(num_tasks, 5, generator=generator) * torch.arange(1, num_tasks + 1)[:, None]
    return GivenGradients(rows_KP, torch.rand(num_tasks, generator=generator) + 0.1)


def updates(weights: TaskWeights, numbers: range) -> list[torch.Tensor]:
    """Gradient and weights of each update, concatenated."""
    given = []
    for number in numbers:
        gradients = random_gradients(number, len(weights.tasks))
        if number % 3 == 1:
            weights.update_scores({"t0": 2.0 * number})
        weight_K = weights.backward(gradients)
        if weights.uses_losses_after_step:
            weights.after_step(gradients.loss_K * torch.linspace(0.5, 1.1, len(gradients.loss_K)))
        given.append(torch.cat([gradients.result_P, weight_K]))
    return given


# -- one scale ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_equal_gradients_give_that_gradient(name: str, num_tasks: int) -> None:
    """Changing the method does not change the step size, also after several updates."""
    weights = weights_of(name, num_tasks)
    row_P = torch.tensor([3.0, -1.0, 0.5, 2.0]) / 7
    for update in range(30):
        losses = torch.logspace(-2, 0, num_tasks) if update % 2 else torch.full((num_tasks,), 0.3)
        gradients = GivenGradients(row_P.repeat(num_tasks, 1), losses)
        weight_K = weights.backward(gradients)
        torch.testing.assert_close(gradients.result_P, row_P, rtol=1e-4, atol=1e-5)
        assert weight_K.sum() == pytest.approx(1, abs=1e-4)
        if weights.uses_losses_after_step:
            weights.after_step(gradients.loss_K)


@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_method_uses_only_the_gradients_that_it_declares(name: str) -> None:
    weights = weights_of(name)
    assert weights.needs in ("losses", "gram", "rows")
    gradients = random_gradients(0)
    weights.backward(gradients)
    assert set(gradients.calls) & {"gram", "rows"} == ({weights.needs} - {"losses"})
    how = "weigh" if name in (*BY_LOSSES, "uniform") else "replace" if weights.needs == "rows" else "combine"
    assert gradients.calls[-1] == how


@pytest.mark.parametrize("name", [name for name in ALL_WEIGHTS if name != "uniform"])
def test_gradients_differ_from_uniform_weights(name: str) -> None:
    given = updates(weights_of(name, **QUICK.get(name, {})), range(6))[-1]
    plain = updates(weights_of("uniform"), range(6))[-1]
    assert (given[:5] - plain[:5]).abs().max() > 0.01
    assert torch.isfinite(given).all()


@pytest.mark.parametrize("name", BY_LOSSES)
def test_loss_weights_sum_to_one_and_are_not_negative(name: str) -> None:
    for given in updates(weights_of(name, **QUICK.get(name, {})), range(20)):
        assert given[5:].sum() == pytest.approx(1, abs=1e-5)
        assert (given[5:] >= 0).all()


# -- degenerate input -----------------------------------------------------------------------------------------------------------

DEGENERATE = {
    "a zero row": [[1.0, 2.0], [0.0, 0.0], [2.0, -1.0]],
    "zero": [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
    "two equal": [[1.0, 2.0], [1.0, 2.0], [-1.0, 0.5]],
    "opposite": [[1.0, 2.0], [-1.0, -2.0]],
    "opposite and of other length": [[1.0, 2.0], [-3.0, -6.0]],
    "opposite, and a zero row": [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]],
    "one": [[1.0, 2.0]],
    "one zero": [[0.0, 0.0]],
    "tiny": [[1e-9, 2e-9], [2e-9, -3e-9]],
    "tiny and large": [[1e-7, 0.0], [1e3, 1e3]],
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_degenerate_gradients_give_finite_weights(name: str, case: str) -> None:
    rows_KP = torch.tensor(DEGENERATE[case])
    weights = weights_of(name, len(rows_KP))
    for loss_K in (torch.ones(len(rows_KP)), torch.zeros(len(rows_KP)), torch.ones(len(rows_KP))):
        gradients = GivenGradients(rows_KP, loss_K)
        assert torch.isfinite(weights.backward(gradients)).all()
        assert torch.isfinite(gradients.result_P).all()
        if weights.uses_losses_after_step:
            weights.after_step(loss_K)


@pytest.mark.parametrize("name", [name for name in ALL_WEIGHTS if weights_of(name).needs == "gram" and name != "gradnorm"])
def test_zero_gradients_give_uniform_weights(name: str) -> None:
    assert weights_of(name).backward(GivenGradients(torch.zeros(3, 4))).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("name", [name for name in ALL_WEIGHTS if weights_of(name).needs == "gram"])
def test_non_finite_gradient_is_visible_and_not_kept_in_state(name: str) -> None:
    weights = weights_of(name)
    gradients = GivenGradients(torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [3.0, -1.0]]))
    weights.backward(gradients)
    assert not torch.isfinite(gradients.result_P).all(), "the learner reports it"
    tensors: dict[str, torch.Tensor] = {}
    flatten(weights.state_dict(), tensors)
    assert all(torch.isfinite(tensor.double()).all() for tensor in tensors.values())


@pytest.mark.parametrize("error", [SolverError("no"), QPError("no"), ValueError("no"), torch.linalg.LinAlgError("no")])
@pytest.mark.parametrize("name", SOLVERS)
def test_solver_failure_gives_uniform_weights_for_one_update(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, plain = (weights_of(name, **{"nash_mtl": {"every": 1}}.get(name, {})) for _ in range(2))

    def fail(*arguments: Any) -> torch.Tensor:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(weights, "_weighting", fail)
        assert weights.backward(random_gradients(0)).tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(weights.backward(random_gradients(1)), plain.backward(random_gradients(1)))


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("name", [name for name in ALL_WEIGHTS if weights_of(name).needs == "gram"])
def test_weights_do_not_depend_on_the_common_gradient_scale(name: str, scale: float) -> None:
    """Small constants that libraries add to matrices would matter for small losses."""
    gradients = random_gradients(4)
    scaled = GivenGradients(gradients.rows_KP * scale, gradients.loss_K)
    torch.testing.assert_close(weights_of(name).backward(scaled), weights_of(name).backward(gradients), rtol=1e-3, atol=1e-4)


# -- randomness -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_draws_are_separate_from_torchs_default_generator(name: str) -> None:
    """Draws neither change nor depend on torch's default generator. Another seed gives other draws."""
    given = []
    for outside, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        given.append(torch.stack(updates(weights_of(name, seed=seed), range(5))))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2]) == (name not in ("random", "pcgrad", "gradvac", "graddrop"))


# -- state ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_restored_weighting_continues_bit_for_bit(name: str, before: int) -> None:
    uninterrupted, fresh = weights_of(name, **QUICK.get(name, {})), weights_of(name, seed=9, **QUICK.get(name, {}))
    updates(uninterrupted, range(before))
    fresh.load_state_dict(round_trip(uninterrupted.state_dict()))
    for mine, theirs in zip(updates(uninterrupted, range(before, before + 8)), updates(fresh, range(before, before + 8)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_training_with_restored_weighting_continues_bit_for_bit(name: str) -> None:
    """In a learner with a network of two tasks, with shared and own parameters."""

    def learner(weights_seed: int) -> Any:
        made = learner_of(weights_seed=weights_seed)
        made.task_weights = weights_of(name, 2, **{**QUICK, "static": {"weights": {"t0": 3.0}}}.get(name, {}))
        return made

    uninterrupted = fill(learner(0))
    for step in range(5):
        uninterrupted.update(step)
    resumed = resumed_from(uninterrupted, learner(1))
    for each in (uninterrupted, resumed):
        for step, row in enumerate(rows(4, start=20)):
            each.replay.add(transition(row))
            each.update(5 + step)
        each.metrics.check_finite()
    for key, tensor in parameters(uninterrupted).items():
        assert torch.equal(tensor, resumed.agent.network.state_dict()[key]), key
    metrics = uninterrupted.read_metrics()
    assert metrics == resumed.read_metrics()
    assert all(f"weight/{task}" in metrics for task in NAMES)


# -- scores ---------------------------------------------------------------------------------------------------------------------


def test_score_gap_by_hand() -> None:
    """Reference scores are 10, 20 and 30; random play scores 0."""
    weights = weights_of("score_gap", temperature=0.5, half_life=1)
    weights.update_scores({"t0": 5.0, "t1": 25.0})  # normalised 0.5, 1 (clipped), and missing
    gap_K = torch.tensor([0.75, 0.5, 1.0])  # half of the way from 1 to 0.5, 0 and 1
    torch.testing.assert_close(weights.backward(random_gradients(0)), (gap_K / 0.5).softmax(0))
    weights.update_scores({"t0": -4.0, "t1": 20.0, "t2": 30.0})
    gap_K = torch.tensor([0.875, 0.25, 0.5])
    torch.testing.assert_close(weights.backward(random_gradients(0)), (gap_K / 0.5).softmax(0))


def test_score_gap_does_not_depend_on_how_often_scores_arrive() -> None:
    once, often = weights_of("score_gap", half_life=3), weights_of("score_gap", half_life=3)
    for update in range(6):
        for weights in [once] if update else [once, often]:
            weights.update_scores({"t1": 10.0})
        for _ in range(5 * (update % 2)):
            often.update_scores({"t1": 10.0})
        assert torch.equal(once.backward(random_gradients(update)), often.backward(random_gradients(update)))


def test_loop_passes_training_scores_to_score_gap() -> None:
    loop = loop_of()
    weights = loop.learner.task_weights = ScoreGap(tasks_of(GAMES), temperature=0.5, half_life=1)
    loop.reset()
    run(loop, 60)
    recent = loop.statistics.recent()
    assert len(recent) == len(GAMES)
    gap_K = [1 - min(1.0, max(0.0, recent[name] / (10.0 * (k + 1)))) for k, name in enumerate(GAMES)]
    assert weights.state_dict()["newest_K"].tolist() == pytest.approx(gap_K)
    assert max(gap_K) > min(gap_K)


def test_score_gap_is_bounded_and_uniform_at_both_ends() -> None:
    weights = weights_of("score_gap", 2, temperature=0.5, half_life=1)
    assert weights.backward(random_gradients(0, 2)).tolist() == [0.5, 0.5]
    weights.update_scores({"t0": 1e9, "t1": -1e9})
    for _ in range(60):
        weight_K = weights.backward(random_gradients(0, 2))
    assert float(weight_K[1] / weight_K[0]) == pytest.approx(torch.tensor(2.0).exp().item(), rel=1e-5)
    weights.update_scores({"t0": 10.0, "t1": 20.0})
    for _ in range(60):
        weight_K = weights.backward(random_gradients(0, 2))
    assert weight_K.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("random", "reference"), [(None, 1.0), (0.0, None), (1.0, 1.0)])
def test_score_gap_refuses_a_task_without_a_reference(random: float | None, reference: float | None) -> None:
    tasks = Tasks(("known", "unknown"), (0.0, random), (1.0, reference), 0, torch.device("cpu"))
    with pytest.raises(ValueError) as error:
        ScoreGap(tasks, temperature=1.0, half_life=1)
    assert "unknown" in str(error.value)
    assert "\n" not in str(error.value)


def test_static_weights_are_set_by_task_name() -> None:
    weights = weights_of("static", weights={"t1": 4.0, "t2": 0.0})
    assert weights.backward(random_gradients(0)).tolist() == pytest.approx([0.2, 0.8, 0.0])
    for wrong, word in (
        ({"t9": 1.0}, "t9"),
        (dict.fromkeys(tasks_of(["t0", "t1", "t2"]).names, 0.0), "must be above 0 for at least one task, got 0 for all"),
    ):
        with pytest.raises(ValueError, match=word):
            weights_of("static", weights=wrong)


# -- refused configurations, and messages -----------------------------------------------------------------------------------------

TINY = ["env=classic_pack", "steps_per_task=64", "agent.learning_starts=16", "network.hidden=[8]", "eval.episodes=1", "eval.max_steps=5"]


@pytest.mark.parametrize("name", SOLVERS)
def test_missing_solver_is_reported_before_the_run_folder_exists(name: str, here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda package: None)
    done = here("train", *TINY, f"task_weights={name}", "run_dir=run", code=2)
    monkeypatch.chdir(here.folder)
    assert str(extras.missing(f"task_weights={name}", "a convex solver", "solvers")) in done.stderr
    assert not (here.folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task_weights=score_gap", "env=gymnasium", "env.tasks=[CartPole-v1,CartPole-v0]"], "CartPole-v0"),
        (["task_weights=static", "task_weights.weights={Pong: 2}"], "Pong"),
        (["task_weights=static", "task_weights.weights={CartPole-v1: -1}"], "task_weights.weights"),
        (["task_weights=nash_mtl", "task_weights.every=0"], "task_weights.every must be a positive integer, got 0"),
    ],
)
def test_invalid_configuration_is_refused_before_the_run_folder_exists(words: list[str], message: str, here: MtrlHere) -> None:
    done = here("train", *TINY, *words, "run_dir=run", code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (here.folder / "run").exists()


def test_gradient_method_without_shared_parameters_equals_uniform_with_a_note(here: MtrlHere) -> None:
    independent = [*TINY, "network/sharing=independent"]
    done = here("train", *independent, "task_weights=gradvac", "run_dir=gradvac")
    assert (done.stdout + done.stderr).count("the tasks share no parameters, so GradVac equals uniform") == 1
    assert "share no parameters" not in here("train", *independent, "run_dir=uniform").stdout
    gradvac, uniform = (Path(here.folder, name, "checkpoints", "64", "model.safetensors").read_bytes() for name in ("gradvac", "uniform"))
    assert gradvac == uniform
