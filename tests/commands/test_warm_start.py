"""Warm starts (`init_from=RUN`) through the command line: loading, freezing and unfreezing, errors, and exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtrl_cli.build import network as build_network
from mtrl_cli.build import run as build_run
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.config import compose
from tests.helpers.command import MtrlHere
from tests.helpers.shared import Shared
from tests.helpers.tiny_runs import learning_rows

SMALL = [
    "env=classic_pack",
    "env.num_envs=4",
    "steps_per_task=240",
    "agent.learning_starts=40",
    "agent.batch_size=8",
    "agent.samples_per_step=2",
    "network.hidden=[16,16]",
    "eval.every=0",
    "eval.episodes=1",
    "eval.max_steps=20",
    "checkpoint.every=20",
    "checkpoint.keep=99",
    "log.every=80",
    "log.diagnostics=120",
    "device=cpu",
]
TWO, THIRD = "env.tasks=[CartPole-v1,Acrobot-v1]", "env.tasks=[MountainCar-v0]"
NEVER = ["steps_per_task=16", "agent.learning_starts=16", "checkpoint.every=0", "log.diagnostics=0"]
"""Overrides for a run without updates: it ends with the parameters it starts with."""


@pytest.fixture
def sources(shared: Shared) -> Path:
    """Two runs of two tasks: `two`, and `popart`, which normalises values."""

    def train(folder: Path) -> None:
        MtrlHere(folder)("train", *SMALL, TWO, "run_dir=two")
        MtrlHere(folder)("train", *SMALL, TWO, "run_dir=popart", "agent/value_scale=popart", "replay=prioritized")

    return shared.folder("warm-start", train)


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def model(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    latest = (run / "checkpoints" / "latest").read_text().strip()
    return load_file(run / "checkpoints" / str(step or latest) / "model.safetensors")


def bytes_of(run: Path) -> list[bytes]:
    return [(run / "checkpoints" / "240" / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


def network_of(run: Path) -> Any:
    config = build_run.for_evaluation(compose.load(run / "config.yaml"), "cpu")
    pack, network, _ = build_run.make_evaluation(config)
    build_network.load_weights(network, CheckpointStore(run / "checkpoints", keep=1, with_replay=False).load("latest")[1], str(run))
    return [task.name for task in pack.tasks], network


# -- loading --------------------------------------------------------------------------------------------------------------------


def test_new_task_is_added_to_two_loaded_tasks(here: MtrlHere, sources: Path) -> None:
    done = here("train", *SMALL, *NEVER, f"init_from={sources / 'two'}", "run_dir=run")
    printed = lines(done.stdout)
    for line in (
        f"From {sources / 'two' / 'checkpoints' / '240'}",
        "stem of each torso CartPole-v1, Acrobot-v1 256 loaded",
        "stem of each torso MountainCar-v0 80 fresh (new task)",
        "torso all tasks 304 loaded",
        "head CartPole-v1, Acrobot-v1 85 loaded",
        "head MountainCar-v0 51 fresh (new task)",
    ):
        assert line in printed
    assert f"init_from: {sources / 'two' / 'checkpoints' / '240'}\n" in (here.folder / "run" / "config.yaml").read_text()
    source, found = model(sources / "two"), model(here.folder / "run")
    assert torch.equal(found["sharing.body.0.0.weight"], source["sharing.body.0.0.weight"])
    assert torch.equal(found["head.linear.weight"][:2, :, :2], source["head.linear.weight"][:, :, :2])
    state = CheckpointStore(here.folder / "run" / "checkpoints", keep=1, with_replay=False).load("latest")[1]
    assert all(torch.equal(value, state["agent"]["target_network"][name]) for name, value in found.items())


def test_outputs_for_the_same_tasks_are_bit_identical_and_checkpoints_can_be_chosen(here: MtrlHere, sources: Path) -> None:
    here("train", *SMALL, *NEVER, TWO, f"init_from={sources / 'two'}", "run_dir=run", "seed=3")
    here("train", *SMALL, *NEVER, TWO, f"init_from={sources / 'two' / 'checkpoints' / '100'}", "run_dir=older")
    here("train", *SMALL, *NEVER, TWO, f"init_from={sources / 'two' / 'checkpoints' / 'best'}", "run_dir=best")
    observation = torch.randn(2, 5, 6)
    outputs = {name: network_of(path)[1](observation) for name, path in (("source", sources / "two"), ("run", here.folder / "run"))}
    assert torch.equal(outputs["run"], outputs["source"])
    assert torch.equal(network_of(here.folder / "best")[1](observation), outputs["source"])
    older, there = model(here.folder / "older"), model(sources / "two", 100)
    assert all(torch.equal(value, there[name]) for name, value in older.items())


def test_different_task_loads_only_the_torso(here: MtrlHere, sources: Path) -> None:
    done = here("train", *SMALL, THIRD, f"init_from={sources / 'two'}", "transfer.freeze=torso", "run_dir=run")
    printed = lines(done.stdout)
    assert "torso all tasks 304 loaded" in printed
    assert "stem of each torso CartPole-v1, Acrobot-v1 256 left" in printed
    assert "frozen 304 parameters" in printed
    source, found, first = model(sources / "two"), model(here.folder / "run"), model(here.folder / "run", 20)
    assert all(torch.equal(value, source[name]) for name, value in found.items() if "body" in name)
    assert not any(torch.equal(value, first[name]) for name, value in found.items() if "body" not in name)


def test_value_scale_is_loaded_or_converted(here: MtrlHere, sources: Path) -> None:
    """From PopArt to PopArt, the statistics of loaded tasks are kept; to no value scale, heads are rescaled to raw rewards."""
    source = [sources / "popart", "agent/value_scale=popart"]
    here("train", *SMALL, *NEVER, f"init_from={source[0]}", source[1], "run_dir=same")
    to_none = here("train", *SMALL, *NEVER, f"init_from={source[0]}", "run_dir=none", TWO)
    assert "heads converted to unscaled rewards" in to_none.stdout
    there, same = (
        CheckpointStore(path / "checkpoints", keep=1, with_replay=False).load("latest")[1]["agent"]["value_scale"]
        for path in (source[0], here.folder / "same")
    )
    assert torch.equal(same["moments"][:, :2], there["moments"])
    assert torch.equal(same["weight"], torch.cat([there["weight"], torch.zeros(1)]).double())
    mean, square = there["moments"]
    scale = (square - there["weight"] * mean.square()).clamp_min(0).sqrt().clamp_min(1e-4)
    observation = torch.randn(2, 5, 6)
    normalised, raw = (network_of(path)[1](observation) for path in (source[0], here.folder / "none"))
    expected = normalised * scale.float()[:, None, None] + mean.float()[:, None, None]
    assert torch.allclose(raw, expected, atol=1e-4)
    assert scale.min() > 0
    assert not torch.allclose(raw[:, :, :2], normalised[:, :, :2])


def test_matching_parts_are_loaded_into_other_structures_and_heads(here: MtrlHere, sources: Path) -> None:
    for number, (words, line) in enumerate(
        [
            (["network/sharing=film"], "torso all tasks 304 loaded"),
            (["network/sharing=input_adapters"], "head CartPole-v1, Acrobot-v1 85 loaded"),
            (["network/head=dueling"], "head CartPole-v1, Acrobot-v1 119 fresh (different actions or head)"),
            (["network/sharing=independent"], "layer 2 of each torso CartPole-v1, Acrobot-v1 608 loaded"),
        ]
    ):
        done = here("train", *SMALL, *NEVER, TWO, *words, f"init_from={sources / 'two'}", f"run_dir=run{number}")
        assert line in lines(done.stdout), done.stdout


# -- errors ---------------------------------------------------------------------------------------------------------------------


def break_source(sources: Path, folder: Path, how: str) -> str:
    """Create a broken copy of the source and return the value of `init_from`."""
    run = folder / "source"
    shutil.copytree(sources / "two", run)
    last = run / "checkpoints" / "240"
    if how == "damaged":
        data = (last / "model.safetensors").read_bytes()
        (last / "model.safetensors").write_bytes(data[:-8] + bytes(8))
        return "source/checkpoints/240"
    if how == "unfinished":
        (last / "COMPLETE").unlink()
        return "source/checkpoints/240"
    if how == "never saved":
        shutil.rmtree(run / "checkpoints")
    if how == "newer":
        for file in (run / "checkpoints").glob("*/state.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    if how == "strange":
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("mtrl_cli.networks.torsos.MLP", "os.path.join"))
    if how == "other tasks":
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("- Acrobot-v1", "- MountainCar-v0"))
    return "source"


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("damaged", "240"),
        ("unfinished", "240"),
        ("never saved", "no checkpoint"),
        ("newer", "format"),
        ("strange", "os.path.join"),
        ("other tasks", "Acrobot-v1"),
    ],
)
def test_unreadable_source_is_refused_in_two_lines(here: MtrlHere, sources: Path, how: str, word: str) -> None:
    refused = here("train", *SMALL, f"init_from={break_source(sources, here.folder, how)}", "run_dir=run", code=2)
    assert len(refused.stderr.strip().splitlines()) <= 2, refused.stderr
    assert word in refused.stderr
    assert not (here.folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_from=nowhere"], ["nowhere"]),
        (["init_from=SOURCE/checkpoints/77"], ["no checkpoint 77", "20, 40"]),
        (["init_from=SOURCE", "network.hidden=[16,8]"], ["[16, 16]", "[16, 8]", "MLP"]),
        (["init_from=SOURCE", "network.layer_norm=false"], ["layer_norm=true", "layer_norm=false"]),
        (["init_from=SOURCE", "network/sharing=mmoe", THIRD], ["MMoE", "HardSharing"]),
        (["init_from=SOURCE", "transfer.freeze=torso:3"], ["torso:3", "2 layers"]),
        (["init_from=SOURCE", "transfer.freeze=body"], ["transfer.freeze must be", "all_but_heads", "got 'body'"]),
        (["transfer.freeze=torso"], ["transfer.freeze", "init_from=RUN"]),
        (["transfer.replay=true"], ["transfer.replay", "init_from=RUN"]),
        (["init_from=SOURCE", "transfer.unfreeze_at=10"], ["unfreeze_at", "freeze=none"]),
        (
            ["init_from=SOURCE", "transfer.freeze=torso", "transfer.unfreeze_at=100000000"],
            ["transfer.unfreeze_at must be at most steps_per_task", "got 100000000"],
        ),
        (["init_from=SOURCE", "transfer.freeze=torso", "transfer.adapters=lora", "transfer.rank=1000000000000"], ["transfer.rank"]),
        (["init_from=SOURCE", "transfer.adapters=lora"], ["lora", "requires transfer.freeze=torso, got transfer.freeze=none"]),
        (["init_from=SOURCE", "transfer.adapters=lora", "transfer.freeze=torso", "network/sharing=mmoe"], ["lora", "MMoE"]),
        (["init_from=SOURCE", "transfer.adapters=lora", "transfer.freeze=torso", "network/sharing=independent"], ["lora", "Independent"]),
        (["init_from=SOURCE", "transfer.replay=true"], ["env.tasks", "MountainCar-v0"]),
        (["init_from=SOURCE", "transfer.replay=true", TWO, "env.num_envs=8"], ["env.num_envs", "4", "8"]),
        (["init_from=SOURCE", "transfer.replay=true", TWO, "agent=pqn", "network.layer_norm=true"], ["rollouts"]),
    ],
)
def test_invalid_transfer_is_refused_before_a_folder_is_created(
    here: MtrlHere, sources: Path, words: list[str], message: list[str]
) -> None:
    given = [word.replace("SOURCE", str(sources / "two")) for word in words]
    refused = here(
        "train", *(SMALL if "agent=pqn" not in words else [w for w in SMALL if not w.startswith("agent.")]), *given, "run_dir=run", code=2
    )
    assert len(refused.stderr.strip().splitlines()) <= 2, refused.stderr
    assert all(word in refused.stderr for word in message), refused.stderr
    assert not (here.folder / "run").exists()


# -- unfreezing and resuming ----------------------------------------------------------------------------------------------------

FROZEN = ["transfer.freeze=torso", "transfer.unfreeze_at=100", "task_weights=pcgrad"]


@pytest.fixture
def unfrozen(sources: Path, shared: Shared) -> Path:
    """A run of three tasks with a torso that is frozen until step 100."""
    trained = shared.run(*SMALL, *FROZEN, f"init_from={sources / 'two'}")
    printed = lines(trained.printed)
    assert "unfroze layers 1, 2 of the torso at step 100; all parameters are trained" in printed
    assert "task weights: the tasks share no trained parameters until step 100, so PCGrad equals uniform" in printed
    return trained.path


def test_parameters_change_only_after_unfreezing(unfrozen: Path, sources: Path) -> None:
    source = model(sources / "two")
    body, stem = "sharing.body.0.0.weight", "sharing.stem.stacked.0:weight"
    for step in range(20, 260, 20):
        found = model(unfrozen, step)
        assert torch.equal(found[body], source[body]) == (step <= 100), step
        assert torch.equal(found[stem][:2], source[stem][:2]) == (step <= 100), step
    assert not torch.equal(model(unfrozen, 80)[stem][2], model(unfrozen, 40)[stem][2])  # the stem of the new task is never frozen
    frozen = [(row["step"], row["transfer/frozen"]) for row in learning_rows(unfrozen) if "transfer/frozen" in row]
    assert frozen == [(80, 560.0), (160, 0.0), (240, 0.0)]


@pytest.mark.parametrize("step", [0, 80, 100, 120])
def test_run_killed_before_or_after_unfreezing_resumes_with_the_same_bytes(here: MtrlHere, unfrozen: Path, step: int) -> None:
    run = here.folder / "run"
    shutil.copytree(unfrozen, run)
    for path in (run / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    if step == 0:
        shutil.rmtree(run / "checkpoints")
    printed = here("resume", "run").stdout
    assert ("starting from the beginning" if step == 0 else f"resuming from step {step}") in printed
    assert ("unfroze layers 1, 2 of the torso at step 100" in printed) == (step <= 100)
    assert bytes_of(run) == bytes_of(unfrozen)
    assert learning_rows(run) == learning_rows(unfrozen)


@pytest.mark.parametrize(
    "words", [["optimizer=adamw", "optimizer.weight_decay=0.5"], ["optimizer=sgd", "resets.every=60", "network.dropout=0.1"]]
)
def test_weight_decay_and_resets_do_not_change_frozen_parameters_and_resume_is_exact(
    here: MtrlHere, sources: Path, words: list[str]
) -> None:
    here("train", *SMALL, *words, f"init_from={sources / 'two'}", "transfer.freeze=torso", "transfer.unfreeze_at=160", "run_dir=run")
    run, source = here.folder / "run", model(sources / "two")
    body, stem, vector = "sharing.body.0.0.weight", "sharing.stem.stacked.0:weight", "sharing.stem.stacked.1:weight"
    for step in (20, 100, 160):
        found = model(run, step)
        assert torch.equal(found[body], source[body])
        assert torch.equal(found[stem][:2], source[stem][:2])
        assert torch.equal(found[vector][:2], source[vector][:2])
    assert not torch.equal(found[stem][2], model(run, 20)[stem][2])
    assert not torch.equal(model(run)[body], source[body])
    before = bytes_of(run)
    for path in (run / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > 140:
            shutil.rmtree(path)
    here("resume", "run")
    assert bytes_of(run) == before


def test_source_is_not_needed_after_the_first_checkpoint(here: MtrlHere, sources: Path) -> None:
    shutil.copytree(sources / "two", here.folder / "source")
    here("train", *SMALL, TWO, "init_from=source", "transfer.freeze=torso:1", "run_dir=run")
    before = bytes_of(here.folder / "run")
    shutil.rmtree(here.folder / "source")
    shutil.rmtree(here.folder / "run" / "checkpoints" / "240")
    here("resume", "run")
    assert bytes_of(here.folder / "run") == before
    shutil.rmtree(here.folder / "run" / "checkpoints")
    assert "source" in here("resume", "run", code=2).stderr


def test_or_resume_reports_a_different_source(here: MtrlHere, sources: Path) -> None:
    command = ["train", *SMALL, *NEVER, TWO, "run_dir=run", "--or-resume"]
    here(*command, f"init_from={sources / 'two'}")
    assert "init_from" not in here(*command, f"init_from={sources / 'two'}").stdout
    assert "ignored from this command: init_from" in here(*command, f"init_from={sources / 'popart'}").stdout


def test_low_rank_adapters_train_resume_evaluate_and_can_be_a_source(here: MtrlHere, sources: Path) -> None:
    done = here("train", *SMALL, TWO, f"init_from={sources / 'two'}", "transfer.freeze=torso", "transfer.adapters=lora", "run_dir=run")
    assert "adapter CartPole-v1, Acrobot-v1 256 fresh (zero at the start)" in lines(done.stdout)
    run = here.folder / "run"
    source, found, before = model(sources / "two"), model(run), bytes_of(run)
    assert all(torch.equal(found[name], value) for name, value in source.items() if name.startswith("sharing"))
    assert found["sharing.body.0.0.adapter.up"].any()
    shutil.rmtree(run / "checkpoints" / "240")
    here("resume", "run")
    assert bytes_of(run) == before
    assert "Validation at step 240" in here("eval", "run", "eval.episodes=1").stdout
    words = [f"init_from={run}", "transfer.freeze=torso", "transfer.adapters=lora"]
    here("train", *SMALL, *NEVER, TWO, *words, "run_dir=again")
    assert all(torch.equal(value, found[name]) for name, value in model(here.folder / "again").items())
    assert "adapter CartPole-v1, Acrobot-v1 256 left" in lines(here("train", *SMALL, *NEVER, TWO, words[0], "run_dir=plain").stdout)


@pytest.mark.parametrize(("replay", "capacity", "held"), [("uniform", 160, 160), ("prioritized", 400, 240)])
def test_loaded_replay_is_learned_from_at_once(here: MtrlHere, sources: Path, replay: str, capacity: int, held: int) -> None:
    words = [TWO, f"init_from={sources / 'popart'}", "agent/value_scale=popart", f"replay={replay}", "transfer.replay=true"]
    done = here("train", *SMALL, *words, f"replay.capacity={capacity}", "steps_per_task=200", "run_dir=run")
    assert f"replay {held} transitions per task of the source; learning starts at once" in lines(done.stdout)
    run = here.folder / "run"
    updates = {row["step"]: row["updates"] for row in learning_rows(run)}
    assert updates[80] == 76 * 2 // 8
    before = [(run / "checkpoints" / "200" / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
    for step in (200, 180, 160):
        shutil.rmtree(run / "checkpoints" / str(step))
    assert "resuming from step 140" in here("resume", "run").stdout
    assert [(run / "checkpoints" / "200" / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")] == before


def test_loading_a_missing_replay_or_rollouts_is_refused(here: MtrlHere) -> None:
    here("train", *SMALL, TWO, "checkpoint.replay=false", "run_dir=source")
    refused = here("train", *SMALL, TWO, "init_from=source", "transfer.replay=true", "run_dir=run", code=2)
    assert "without its replay" in refused.stderr
    here(
        "train", *[word for word in SMALL if not word.startswith("agent.")], TWO, "agent=pqn", "agent.rollout_length=8", "run_dir=rollouts"
    )
    refused = here("train", *SMALL, TWO, "init_from=rollouts", "transfer.replay=true", "run_dir=run", code=2)
    assert "rollouts" in refused.stderr
    assert "torso all tasks 304 loaded" in lines(here("train", *SMALL, *NEVER, TWO, "init_from=rollouts", "run_dir=run").stdout)


def test_bench_ignores_the_source(here: MtrlHere) -> None:
    done = here("bench", *SMALL, "init_from=nowhere", "transfer.freeze=torso", "--seconds", "0.1")
    assert "init_from, transfer.freeze and transfer.replay are ignored" in done.stderr
