"""`mtrl transfer`: trials, runs, report, resume and errors."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrl_cli.config.compose import load
from mtrl_cli.reports.transfer import HEADINGS
from mtrl_cli.studies import transfer
from mtrl_cli.sweeps import plan as sweep_plan
from tests.helpers.command import Mtrl, MtrlHere
from tests.helpers.tiny_runs import rows

pytest.importorskip("matplotlib")

SMALL = [
    "env=classic_pack",
    "agent.learning_starts=100",
    "agent.batch_size=16",
    "agent.samples_per_step=2",
    "eval.episodes=2",
    "eval.max_steps=40",
    "eval.epsilon=0.0",  # random actions depend on the position of a task
    "eval.test_episodes=3",
    "log.every=200",
    "log.diagnostics=0",
    "device=cpu",
]
SOURCE = [*SMALL, "env.tasks=[CartPole-v1,Acrobot-v1]", "network.hidden=[24,16]", "steps_per_task=160", "eval.every=80"]
STUDY = [*SMALL, "env.tasks=[MountainCar-v0,CartPole-v1]", "steps_per_task=240", "transfer.freeze=torso"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny trained run on two tasks."""
    folder = tmp_path_factory.mktemp("source")
    MtrlHere(folder)("train", *SOURCE, "run_dir=run")
    return folder / "run"


@pytest.fixture(scope="module")
def study(source: Path) -> tuple[Path, str]:
    """Return a study of that run, and its output."""
    done = MtrlHere(source.parent)("transfer", source, *STUDY, "seeds=2", "launcher.jobs=2", "run_dir=study")
    return source.parent / "study", done.stdout


def trials(listing: str) -> list[dict[str, str]]:
    """Return the values of the trials that a dry run lists, by key."""
    rows = [line.split() for line in listing.splitlines() if re.match(r"\d+ +(waiting +- +- +)?init_from=", line)]
    return [dict(word.split("=", 1) for word in words if "=" in word) for words in rows]


def evaluations(run: Path, name: str) -> list[tuple[int, float]]:
    """Return a metric of a run's evaluations, by step."""
    return [(int(row["step"]), row[name]) for row in rows(run) if name in row]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# -- the trials -----------------------------------------------------------------------------------------------------------------


def test_each_seed_has_a_fine_tuned_run_and_one_from_scratch(source: Path, here: MtrlHere) -> None:
    listing = here("transfer", source, *STUDY, "seeds=2", "--dry-run").stdout
    path = str(source / "checkpoints" / "160")
    assert trials(listing) == [
        {"init_from": origin, "transfer.freeze": freeze, "seed": seed}
        for seed in ("0", "1")
        for origin, freeze in ((path, "torso"), ("null", "none"))
    ]
    assert "network: torso, sharing, head as in the source" in listing
    assert "network=mlp network/sharing=hard network/head=plain 'network.hidden=[24,16]' eval.at_start=true eval.every=24" in listing
    assert list(here.folder.iterdir()) == []


def test_given_parts_of_the_network_replace_those_of_the_source(source: Path, here: MtrlHere) -> None:
    words = ["network/sharing=film", "network/head=dueling", "eval.every=60", "seeds=1", "--dry-run"]
    listing = here("transfer", source, *STUDY, *words).stdout
    assert "network: torso as in the source; network/sharing as given; network/head as given" in listing
    assert "network/sharing=hard" not in listing
    assert "eval.every=24" not in listing


def test_several_values_of_transfer_are_for_fine_tuned_runs_only(source: Path, here: MtrlHere) -> None:
    words = [word for word in STUDY if not word.startswith("transfer.")]
    listing = here("transfer", source, *words, "transfer.freeze=none,torso", "optimizer.lr=0.1,0.2", "seeds=1", "--dry-run").stdout
    found = [(each["init_from"] != "null", each["transfer.freeze"], each["optimizer.lr"]) for each in trials(listing)]
    own = [(True, "none"), (True, "torso"), (False, "none")]
    assert found == [(*each, rate) for rate in ("0.1", "0.2") for each in own]


def test_resumed_study_keeps_its_checkpoint_though_the_source_was_trained_further(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*STUDY, f"run_dir={tmp_path / 'study'}"]
    begun = transfer.make(source, words).plan
    monkeypatch.setattr(transfer.CheckpointStore, "load", lambda *arguments, **options: (320, {}))
    assert transfer.make(source, words).plan.points[0]["init_from"] == f"{source}/checkpoints/320"
    (tmp_path / "study").mkdir()
    sweep_plan.save(begun, tmp_path / "study", ["mtrl", "transfer"])
    assert transfer.make(source, words).plan.points == begun.points


# -- runs and report ------------------------------------------------------------------------------------------------------------


def test_runs_have_the_network_of_the_source_and_the_same_budget(study: tuple[Path, str], source: Path) -> None:
    folder, _ = study
    runs = sorted(folder.glob("trials/*"))
    assert len(runs) == 4
    for number, path in enumerate(runs):
        config = load(path / "config.yaml")
        assert read(path / "run.json")["status"] == "completed"
        assert config["network"] == load(source / "config.yaml")["network"]
        assert config["seed"] == number // 2
        is_tuned = number % 2 == 0
        assert config["init_from"] == (str(source / "checkpoints" / "160") if is_tuned else None)
        assert config["transfer"]["freeze"] == ("torso" if is_tuned else "none")
        steps = [step for step, _ in evaluations(path, "eval/return/CartPole-v1")]
        assert (steps[0], steps[-1], len(steps)) == (0, 240, 11)


def test_fine_tuned_run_starts_with_the_final_network_of_the_source(study: tuple[Path, str], source: Path) -> None:
    """CartPole is a task of both runs: its zero-shot evaluation equals the source's last evaluation, episode by episode."""
    runs = {"source": (source, 160), "tuned": (study[0] / "trials" / "0002", 0), "scratch": (study[0] / "trials" / "0003", 0)}
    returns = {name: read(run / "eval" / f"{step}.json")["tasks"]["CartPole-v1"]["returns"] for name, (run, step) in runs.items()}
    assert returns["tuned"] == returns["source"]
    assert returns["scratch"] != returns["source"]


def test_report_has_the_metrics_of_the_runs(study: tuple[Path, str]) -> None:
    report = study[0] / "report"
    rows = {row["task"]: row for row in csv.DictReader((report / "transfer.csv").read_text().splitlines())}
    assert list(rows) == ["MountainCar-v0", "CartPole-v1", "mean over tasks"]
    for task, row in rows.items():
        name = "mean" if task == "mean over tasks" else task
        curves, finals = [], []
        for kind in (0, 1):
            runs = [study[0] / "trials" / f"{2 * seed + kind:04d}" for seed in (0, 1)]
            curves.append(np.array([[value for _, value in evaluations(run, f"eval/score/{name}")] for run in runs]))
            finals.append(np.mean([evaluations(run, f"test/score/{name}")[0][1] for run in runs]))
        expected = {
            "zero_shot": curves[0][:, 0].mean(),
            "jump_start": (curves[0] - curves[1])[:, 0].mean(),
            "final_fine_tuned": finals[0],
            "final_scratch": finals[1],
            "final_difference": finals[0] - finals[1],
        }
        assert {key: float(row[HEADINGS[key]]) for key in expected} == pytest.approx(expected)
        assert float(row["zero-shot low"]) <= expected["zero_shot"] <= float(row["zero-shot high"])
    for kind in ("md", "svg", "png"):
        assert (report / f"transfer.{kind}").stat().st_size > 200
    assert "Fine-tuned compared with from scratch" in (report / "index.html").read_text()
    assert {"transfer.csv", "transfer.svg"} <= set(read(report / "report.json")["files"])


def test_same_command_repeats_nothing_and_report_shows_transfer(study: tuple[Path, str], source: Path, here: MtrlHere) -> None:
    folder = Path(shutil.copytree(study[0], here.folder / "study"))
    before = {path: path.read_bytes() for path in folder.glob("trials/*/**/*") if path.is_file() and path.name != ".lock"}
    here("transfer", source, *STUDY, "seeds=2", "run_dir=study")
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(folder / "report")
    here("report", "study")
    assert (folder / "report" / "transfer.csv").read_bytes() == (study[0] / "report" / "transfer.csv").read_bytes()


def test_interrupted_study_resumes_with_the_same_results(study: tuple[Path, str], source: Path, mtrl: Mtrl) -> None:
    words = [source, *STUDY, "seeds=1", "run_dir=study", "checkpoint.every=40"]
    process = mtrl.start("transfer", *words)
    while not (mtrl.folder / "study" / "trials" / "0000" / "checkpoints" / "latest").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 143
    assert "or with the same command" in printed
    MtrlHere(mtrl.folder)("transfer", *words)
    for trial in ("0000", "0001"):
        ends = [read(path / "trials" / trial / "eval" / "test.json")["last"]["tasks"] for path in (mtrl.folder / "study", study[0])]
        assert ends[0] == ends[1]
    assert "One seed" in (mtrl.folder / "study" / "report" / "index.html").read_text()


# -- errors ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["env.tasks=[CartPole-v1,MountainCar-v0]"], ["steps_per_task=248"], ["transfer.freeze=none"], ["seed=1"]]
)
def test_other_values_for_an_existing_study_are_refused(study: tuple[Path, str], source: Path, here: MtrlHere, words: list[str]) -> None:
    key = words[0].partition("=")[0]
    base = [word for word in STUDY if word.partition("=")[0] != key]
    refused = here("transfer", source, *base, *words, "seeds=2", f"run_dir={study[0]}", code=2)
    assert str(study[0]) in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2


def test_another_source_for_an_existing_study_is_refused(study: tuple[Path, str], source: Path, here: MtrlHere) -> None:
    other = shutil.copytree(source, here.folder / "other")
    assert "init_from" in here("transfer", other, *STUDY, "seeds=2", f"run_dir={study[0]}", code=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "env=classic_pack"], "nowhere does not exist"),
        (["SOURCE", "steps_per_task=200"], "env is missing"),
        (["SOURCE", "env=classic_pak"], "Did you mean 'env=classic_pack'?"),
        (["SOURCE", "env=minatar_pack", "device=cpu"], "nothing can be transferred"),
        (["SOURCE", "env=classic_pack", "seeds=0"], "got 0"),
        (["SOURCE", "env=classic_pack", "init_from=run"], "init_from"),
        (["SOURCE", "env=classic_pack", "eval.test_episodes=0"], "eval.test_episodes=0"),
        (["SOURCE", "env=classic_pack", "eval.at_start=false"], "eval.at_start"),
        (["SOURCE", "env=classic_pack", "early_stopping.metric=eval/score/mean"], "early_stopping"),
        (["SOURCE", "env=classic_pack", "optimizer.lr=interval(0.001,0.1)"], "Give values, or use mtrl sweep"),
        (["SOURCE", "env=classic_pack", "sweep.trials=3"], "a study chooses the trials"),
        (["SOURCE/checkpoints/5", "env=classic_pack"], "no checkpoint 5"),
        (["SOURCE", "env=classic_pack", "transfer.freez=torso"], "transfer.freeze"),
        (["SOURCE", "env=classic_pack", "network.hidden=[8,8]", "device=cpu"], "hidden"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_created(source: Path, here: MtrlHere, words: list[str], message: str) -> None:
    refused = here("transfer", *(word.replace("SOURCE", str(source)) for word in words), code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2
    assert list(here.folder.iterdir()) == []


def test_missing_matplotlib_is_reported_before_any_training(source: Path, here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest))
    assert "pip install" in here("transfer", source, *STUDY, "run_dir=study", code=2).stderr
    assert list(here.folder.iterdir()) == []


def test_torchrun_is_refused(source: Path, here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert "without torchrun" in here("transfer", source, *STUDY, "run_dir=study", code=2).stderr
