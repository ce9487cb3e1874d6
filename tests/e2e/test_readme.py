"""README: its command lines compose, and its example of a custom pack and network trains."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.command import ROOT, Mtrl, MtrlHere

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
LINES = [line for language, text in BLOCKS if not language for line in text.replace("\\\n", " ").splitlines()]
TRAINING = [line for line in LINES if line.startswith("mtrl train ") and "run_dir=R" not in line]
MANY = [line for line in LINES if line.startswith(("mtrl sweep ", "mtrl study "))]
FAST = [line for line in LINES if line.startswith(("mtrl bench ", "torchrun "))]


@pytest.mark.parametrize("line", TRAINING)
def test_every_training_command_composes(line: str, here: MtrlHere) -> None:
    assert "steps_per_task" in here(*shlex.split(line, comments=True)[1:], "--dry-run").stdout


@pytest.mark.parametrize("line", FAST)
def test_every_bench_and_torchrun_command_composes(line: str, here: MtrlHere) -> None:
    """`mtrl bench` and torchrun commands accept the overrides of `mtrl train`."""
    words = [word for word in shlex.split(line, comments=True) if "=" in word and not word.startswith("-")]
    assert "steps_per_task" in here("train", *words, "--dry-run").stdout


def test_transfer_study_composes(here: MtrlHere) -> None:
    """Except for `seeds`, `mtrl transfer` accepts the overrides of `mtrl train` after its run."""
    (line,) = (line for line in LINES if line.startswith("mtrl transfer "))
    run, *words = shlex.split(line)[2:]
    assert "=" not in run
    assert "steps_per_task" in here("train", *(word for word in words if not word.startswith("seeds=")), "--dry-run").stdout


@pytest.mark.parametrize("line", MANY)
def test_every_sweep_and_study_can_be_planned(line: str, here: MtrlHere) -> None:
    """Each run composes, and samplers, pruners and metrics are compatible."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "--dry-run"]
    assert "trials, " in here(*words, "--dry-run").stdout


def test_readme_contains_commands_of_each_kind() -> None:
    assert len(MANY) >= 4
    assert len(TRAINING) >= 6
    assert len(FAST) == 3


def test_custom_components_train_as_documented(mtrl: Mtrl) -> None:
    """A custom pack, torso, sharing structure and weighting in one run."""
    texts = [text for language, text in BLOCKS if language in ("yaml", "python")]
    names = re.findall(r"`(my_\w+(?:/\w+)*\.(?:yaml|py))`", README)
    assert len(names) == 7
    for name, text in zip(names, texts, strict=True):
        path = mtrl.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (command,) = (line for line in LINES if line.startswith("PYTHONPATH=. mtrl train"))
    small = ["steps_per_task=300", "agent.learning_starts=100", "eval.episodes=1", "eval.max_steps=20", "run_dir=run", "device=cpu"]
    printed = mtrl(*shlex.split(command)[2:], *small, PYTHONPATH=".").stdout
    assert "CartPole-v1" in printed
    assert "trusted_packages" in printed
    assert "sharing.offset." in str(load_file(mtrl.folder / "run" / "checkpoints" / "304" / "model.safetensors").keys())
    rows = [json.loads(line) for line in (mtrl.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    weights = [[row["weight/CartPole-v1"], row["weight/Acrobot-v1"]] for row in rows if "weight/CartPole-v1" in row]
    assert weights
    assert all(sum(pair) == pytest.approx(1) and pair[0] != pytest.approx(0.5) for pair in weights)
    # The printed evaluation command works.
    (evaluate,) = (line for line in printed.splitlines() if line.startswith("evaluate "))
    words = [word for word in shlex.split(evaluate)[2:] if not word.startswith(("video", "eval."))]
    mtrl(*words, "eval.episodes=1", "eval.max_steps=5", PYTHONPATH=".")
    assert list(Path(mtrl.folder / "run" / "eval").iterdir())
    # PQN enables LayerNorm, which a custom torso need not support.
    of_pqn = [
        "agent=pqn",
        "agent.rollout_length=4",
        "steps_per_task=300",
        "eval.episodes=1",
        "eval.max_steps=5",
        "run_dir=pqn",
        "device=cpu",
    ]
    assert "CartPole-v1" in mtrl(*shlex.split(command)[2:], *of_pqn, PYTHONPATH=".").stdout


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_files_named_in_a_document_exist(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    folders = (ROOT, ROOT / "mtrl_cli")
    named = [name.rstrip("/") for name in re.findall(r"`([\w./*]+/[\w.*]*)`", text)]
    named = [name for name in named if any((folder / name.split("/")[0]).is_dir() for folder in folders)]
    named += re.findall(r"docs/\w+\.(?:md|svg)", text)
    assert named
    written_by_runs = ("checkpoints/latest", "checkpoints/best", "checkpoints/replay", "runs/sharing/", "runs/transfer/")
    missing = [name for name in named if not any(list(folder.glob(name)) for folder in folders)]
    assert [name for name in missing if not name.startswith(written_by_runs)] == []
