"""Resets of the network: changed parameters, unchanged parameters, and exact resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtrl_cli.agents.value_scale import PopArt
from mtrl_cli.networks.heads import DuelingHead
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.networks.parts import tagged
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP
from mtrl_cli.training.resets import Resets
from tests.helpers.command import MtrlHere
from tests.helpers.fake_tasks import stream_of
from tests.helpers.learners import NAMES, fill, learner_of, parameters
from tests.helpers.structures import STRUCTURES, structure
from tests.helpers.tiny_runs import CLASSIC, learning_rows, model


def fresh(number: int) -> MultiTaskNetwork:
    """New parameters for the networks of `learner_of`."""
    torch.manual_seed(1000 + number)
    return MultiTaskNetwork(HardSharing(MLP(hidden=[8, 6]), [(5,), (3,)]), DuelingHead(6, [4, 2]), observation_scale=1.0)


def resets_of(make: Callable[[int], MultiTaskNetwork] = fresh, **settings: Any) -> Resets:
    plain: dict[str, Any] = {"every": 10, "shrink": 0.25, "parts": ["torso", "sharing", "heads"], "last_step": 1e9}
    return Resets(fresh=make, **(plain | settings))


def attached(resets: Resets, learner: Any) -> Resets:
    """Add resets to the callbacks of a learner."""
    learner.callbacks.append(resets)
    resets.learner = learner
    return resets


def learned(**settings: Any) -> Any:
    """A learner after some updates, with a target network that lags behind and tagged torso layers."""
    learner = fill(learner_of(target_period=100, **settings))
    learner.agent.network.sharing = HardSharing(tagged(MLP(hidden=[8, 6])), [(5,), (3,)])
    other = learner_of(target_period=100, **settings)
    learner.agent.network.load_state_dict(other.agent.network.state_dict())
    learner.agent.target_network = copy.deepcopy(learner.agent.network).requires_grad_(False)
    learner.optimizer = type(learner.optimizer)(
        list(learner.agent.network.parameters()), lr=0.01, eps=1e-4, weight_decay=0.01, max_grad_norm=1.0
    )
    for step in range(5):
        learner.update(step)
    return learner


def test_reset_interpolates_each_parameter_and_syncs_the_target() -> None:
    learner = learned()
    resets = attached(resets_of(), learner)
    resets.before_update(9)  # no update was made before
    before = parameters(learner)
    resets.before_update(12)
    new = fresh(1).state_dict()
    target = learner.agent.target_network.state_dict()
    for name, value in parameters(learner).items():
        assert torch.allclose(value, 0.25 * before[name] + 0.75 * new[name], atol=1e-6), name
        assert torch.equal(target[name], value)
    for state in learner.optimizer.state_dict().values():
        assert all(not value.any() for value in state.values())
    assert resets.made == 1


def test_other_parts_and_frozen_parameters_keep_their_values_and_optimizer_state() -> None:
    learner = learned()
    resets = attached(resets_of(parts=["torso"], shrink=0.0), learner)
    learner.agent.network.sharing.body[0][0].weight.requires_grad_(False)
    resets.before_update(0)
    before, target = parameters(learner), copy.deepcopy(learner.agent.target_network.state_dict())
    resets.before_update(10)
    new, states = fresh(1).state_dict(), learner.optimizer.state_dict()
    for index, (name, value) in enumerate(parameters(learner).items()):
        is_reset = name.startswith("sharing") and name != "sharing.body.0.0.weight"
        assert torch.equal(value, new[name] if is_reset else before[name]), name
        assert torch.equal(learner.agent.target_network.state_dict()[name], value if is_reset else target[name])
        assert bool(states[str(index)]["exp_avg_sq"].any()) != is_reset


def test_resets_happen_at_the_first_update_past_each_multiple_up_to_the_last_step() -> None:
    learner, created = learned(), []

    def make(number: int) -> MultiTaskNetwork:
        created.append(number)
        return fresh(number)

    resets = attached(resets_of(make, last_step=60.0), learner)
    for step in (25, 29, 30, 31, 39, 52, 58, 65, 66, 70, 90):
        resets.before_update(step)
    assert created == [3, 5, 6]  # 30, 50 (which passes 40 as well) and 60; none at 25, the first update, and none from 70
    assert resets.made == 3


def test_restored_resets_continue_their_interval() -> None:
    learner = learned()
    resets, twin = (attached(resets_of(), learner) for _ in range(2))
    resets.before_update(9)
    twin.load_state_dict(resets.state_dict())
    twin.before_update(10)
    assert twin.made == 1
    untouched = attached(resets_of(), learner)
    untouched.load_state_dict(resets_of().state_dict())
    untouched.before_update(10)
    assert untouched.made == 0


@pytest.mark.parametrize("name", STRUCTURES)
def test_complete_reset_replaces_all_parameters_of_every_structure(name: str) -> None:
    """Includes padding, which stays zero, and the singular vectors of spectrally normalized layers."""

    def make(number: int) -> MultiTaskNetwork:
        torso = tagged(MLP(hidden=[8, 6, 5], layer_norm=True, spectral_norm=name != "paco"))
        sharing = structure(name, torso, [(5,), (3,)], seed=number)
        return MultiTaskNetwork(sharing, DuelingHead(sharing.num_features, [4, 2]), 1.0)

    learner = learned()
    resets = attached(resets_of(make, shrink=0.0), learner)
    learner.agent.network = make(7)
    learner.agent.target_network = copy.deepcopy(learner.agent.network).requires_grad_(False)
    learner.agent._target_spectral_layers = []
    resets.before_update(0)
    resets.before_update(10)
    new = dict(make(1).named_parameters())
    for path, parameter in learner.agent.network.named_parameters():
        assert torch.equal(parameter, new[path]), path
    for path, value in learner.agent.network.state_dict().items():
        if path.endswith(("left", "right")):
            assert torch.allclose(value.abs(), make(1).state_dict()[path].abs(), atol=0.2), path


def test_learning_continues_after_resets_with_popart() -> None:
    learner = learned()
    learner.agent.value_scale = PopArt(stream_of(NAMES, num_envs=3))
    attached(resets_of(shrink=0.0), learner)
    for step in range(5, 40):
        learner.update(step)
    learner.metrics.check_finite()
    assert learner.read_metrics()["resets"] == 3
    assert all(value.isfinite().all() for value in parameters(learner).values())


# -- through the command line -------------------------------------------------------------------------------------------------

PQN = [*[word for word in CLASSIC if not word.startswith(("agent.", "replay."))], "agent=pqn", "env.num_envs=8", "agent.rollout_length=11"]
SHORT = ["steps_per_task=800", "checkpoint.every=320", "eval.every=0", "eval.episodes=1", "compile=false"]
CASES = {
    "adamw": ["optimizer=adamw", "optimizer.schedule=cosine", "optimizer.warm_up=650", "optimizer.factors.torso=0.1"],
    "rmsprop": ["optimizer=rmsprop", "network.spectral_norm=true", "network/sharing=independent", "agent.target_tau=0.01"],
    "sgd": ["optimizer=sgd", "network.dropout=0.2", "network/sharing=mmoe", "network.sharing.experts=2", "task_weights=pcgrad"],
    "tape": ["network.dropout=0.3", "task_weights=pcgrad", "replay=prioritized", "resets.every=350", "resets.parts=[torso]"],
    "resets": ["network.dropout=0.1", "network.spectral_norm=true", "resets.every=350", "resets.shrink=0.3", "resets.until=1"],
}


@pytest.mark.parametrize("case", [*CASES, "pqn"])
def test_run_resumed_from_the_previous_checkpoint_ends_with_the_same_bytes(case: str, here: MtrlHere) -> None:
    """The newest checkpoint is damaged, so the last 160 steps are repeated from a loaded state."""
    words = [*CLASSIC, *CASES[case]] if case in CASES else [*PQN, *CASES["resets"]]
    here("train", *words, *SHORT, "run_dir=run")
    run = here.folder / "run"
    before, rows = model(run), learning_rows(run)
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    torch.manual_seed(99)  # torch's global generator must not affect the run
    assert "falling back to checkpoint" in here("resume", "run").stdout
    assert model(run) == before
    assert learning_rows(run) == rows
    if "resets.every=350" in words:
        assert max(row.get("resets", 0) for row in rows) == (2 if "resets.until=1" in words else 1)
    if case == "rmsprop":  # the model contains the singular vectors of its normalized layers
        here("eval", "run", "eval.max_steps=10")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resets.every=700"], "resets.until=0.8"),
        (["resets.every=100", "resets.shrink=1"], "resets.shrink=1"),
        (["resets.every=100", "resets.parts=[]"], "resets.parts=[]"),
        (["resets.parts=[trunk]"], "torso, sharing or heads"),
        (["optimizer.factors.trunk=0.1"], "torso, sharing or heads"),
        (["optimizer.warm_up=900"], "steps_per_task=800"),
        (["optimizer.schedule=cosine", "optimizer.lr_final=1"], "optimizer.lr_final=0"),
        (["optimizer=sgd", "optimizer.eps=1e-5"], "optimizer.eps"),
        (["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=true"], "optimizer.momentum"),
        (["network.dropout=1"], "a fraction from 0 to 0.9"),
        (["network.dropout=0.1", "task_weights=famo"], "FAMO"),
        (["network.spectral_norm=true", "network/sharing=paco"], "network/sharing=paco"),
    ],
)
def test_invalid_setting_is_refused_in_two_lines(words: list[str], message: str, here: MtrlHere) -> None:
    refused = here("train", *CLASSIC, *SHORT, *words, "run_dir=run", code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2
    assert not (here.folder / "run").exists()
