"""`mtrl transfer` through the command line: its table and picture, going on after an interruption, and what it refuses."""

from __future__ import annotations

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
from mtrl_cli.machine import extras
from mtrl_cli.stats.transfer import area
from mtrl_cli.studies import transfer_report
from tests.helpers.command import Mtrl, MtrlHere

pytest.importorskip("matplotlib")

SMALL = [
    "env=classic_pack",
    "agent.learning_starts=100",
    "agent.batch_size=16",
    "eval.episodes=2",
    "eval.max_steps=40",
    "eval.epsilon=0.0",  # else the same network plays otherwise where a task has another place
    "eval.test_episodes=3",
    "log.every=200",
    "log.diagnostics=0",
    "device=cpu",
]
SOURCE = [*SMALL, "env.tasks=[CartPole-v1,Acrobot-v1]", "network.hidden=[24,16]", "steps_per_task=160", "eval.every=80"]
STUDY = [*SMALL, "env.tasks=[MountainCar-v0,CartPole-v1]", "steps_per_task=240", "seeds=2", "transfer.freeze=torso"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run on two tasks."""
    folder = tmp_path_factory.mktemp("source")
    MtrlHere(folder)("train", *SOURCE, "run_dir=run")
    return folder / "run"


@pytest.fixture(scope="module")
def study(source: Path) -> tuple[Path, str]:
    """A study with that run, and what it printed."""
    done = MtrlHere(source.parent)("transfer", source, *STUDY, "run_dir=study")
    return source.parent / "study", done.stdout


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def evaluations(run: Path, name: str) -> list[tuple[int, float]]:
    """A metric of a run's validation by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if name in row]


def test_runs_are_ordinary_ones_with_the_sources_network_and_the_same_budget(study: tuple[Path, str], source: Path) -> None:
    folder, printed = study
    assert sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/s*")) == [
        "fine_tuned/s0",
        "fine_tuned/s1",
        "scratch/s0",
        "scratch/s1",
    ]
    for number, label in enumerate(["fine-tuned, seed 0", "from scratch, seed 0", "fine-tuned, seed 1", "from scratch, seed 1"], 1):
        assert f"{number} of 4: {label}\n" in printed
    for path in folder.glob("*/s*"):
        config = load(path / "config.yaml")
        assert read(path / "run.json")["status"] == "completed"
        assert config["network"] == load(source / "config.yaml")["network"]
        assert config["seed"] == int(path.name[1:])
        assert config["init_from"] == (str(source / "checkpoints" / "160") if path.parent.name == "fine_tuned" else None)
        assert config["transfer"]["freeze"] == ("torso" if path.parent.name == "fine_tuned" else "none")
        steps = [step for step, _ in evaluations(path, "eval/return/CartPole-v1")]
        assert (steps[0], steps[-1], len(steps)) == (0, 240, 11)
    assert "network: torso, sharing, head as in the source" in printed


def test_metrics_are_those_of_the_runs(study: tuple[Path, str]) -> None:
    """Worked out again, from the folders."""
    folder, _ = study
    told = read(folder / "transfer.json")
    assert (told["seeds"], told["steps_per_task"], told["checkpoint"]) == ([0, 1], 240, 160)
    assert told["episodes"] == {"validation": 2, "test": 3}
    for task, own in [*told["tasks"].items(), ("mean", told["over_tasks"])]:
        assert own["unit"] == "score"
        curves, finals = {}, {}
        for kind in ("fine_tuned", "scratch"):
            runs = [folder / kind / f"s{seed}" for seed in (0, 1)]
            curves[kind] = np.array([[value for _, value in evaluations(run, f"eval/score/{task}")] for run in runs])
            finals[kind] = [evaluations(run, f"test/score/{task}")[0][1] for run in runs]
            assert own["curves"][kind] == curves[kind].tolist()
            assert own["tests"][kind] == pytest.approx(finals[kind])
            assert own[f"final_{kind}"]["value"] == pytest.approx(np.mean(finals[kind]))
        assert own["zero_shot"]["value"] == pytest.approx(curves["fine_tuned"][:, 0].mean())
        assert own["jump_start"]["value"] == pytest.approx((curves["fine_tuned"] - curves["scratch"])[:, 0].mean())
        assert own["final_difference"]["value"] == pytest.approx(np.mean(finals["fine_tuned"]) - np.mean(finals["scratch"]))
        below = area(np.array(own["steps"], float), curves["scratch"].mean(0))
        assert (own["area_ratio"]["value"] is None) == (below <= 0)


def test_what_is_fine_tuned_begins_as_the_source_ended(study: tuple[Path, str], source: Path) -> None:
    """CartPole is a task of both: its zero-shot evaluation is the source's last one, game by game."""
    before, after = (
        read(run / "eval" / f"{step}.json")["tasks"]["CartPole-v1"] for run, step in ((source, 160), (study[0] / "fine_tuned/s1", 0))
    )
    assert after["returns"] == before["returns"]
    assert read(study[0] / "scratch/s1/eval/0.json")["tasks"]["CartPole-v1"]["returns"] != before["returns"]


def test_table_and_picture_hold_what_the_file_says(study: tuple[Path, str]) -> None:
    folder, printed = study
    told, text = read(folder / "transfer.json"), (folder / "transfer.md").read_text()
    assert text in printed
    rows = {line.split(" | ")[0].lstrip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")}
    for task, own in [*told["tasks"].items(), ("mean over tasks", told["over_tasks"])]:
        for cell, name in zip(rows[task][1:], transfer_report.HEADINGS, strict=True):
            value, low, high = re.fullmatch(r"(\S+)(?: \((\S+) to (\S+)\))?", cell).groups()  # type: ignore[union-attr]
            told_value = own[name]["value"]
            if told_value is None:
                assert value in ("-", "never")
            else:
                assert float(value.replace(",", "")) == pytest.approx(told_value, abs=0.5 if name == "steps_to_scratch" else 0.005)
            assert (low is None) == (own[name]["ci"] is None)
            for end, told_end in zip((low, high), own[name]["ci"] or (), strict=False):
                assert (end == "never") if told_end is None else float(end.replace(",", "")) == pytest.approx(told_end, abs=0.51)
    assert "0 is random play" in text
    drawn = transfer_report.draw(told)
    panels = [axes for axes in drawn.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["mean over tasks", "MountainCar-v0", "CartPole-v1"]
    for axes, own in zip(panels, [told["over_tasks"], *told["tasks"].values()], strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for kind, label in (("fine_tuned", "fine-tuned"), ("scratch", "from scratch")):
            np.testing.assert_allclose(lines[label].get_ydata(), np.mean(own["curves"][kind], axis=0))
            assert list(lines[label].get_xdata()) == own["steps"]
    from PIL import Image

    with Image.open(folder / "transfer.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_same_command_repeats_nothing_and_more_seeds_are_added(study: tuple[Path, str], source: Path, here: MtrlHere) -> None:
    folder = Path(shutil.copytree(study[0], here.folder / "study"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    said = here("transfer", source, *STUDY, "run_dir=study").stdout
    assert said.count("done before") == 4
    assert {path: path.read_bytes() for path in before} == before
    first = folder / "fine_tuned" / "s0" / "config.yaml"  # whose replay's capacity is that of all
    first.write_text(first.read_text().replace("capacity: 240", "capacity: 200"))
    said = here("transfer", source, *STUDY, "seeds=3", "run_dir=study").stdout
    assert said.count("done before") == 4
    assert "6 of 6: from scratch, seed 2\n" in said
    assert load(folder / "scratch" / "s2" / "config.yaml")["replay"]["capacity"] == 200
    assert load(folder / "scratch" / "s1" / "config.yaml")["replay"]["capacity"] == 240
    assert read(folder / "transfer.json")["seeds"] == [0, 1, 2]
    assert "fewer" in here("transfer", source, *STUDY, "run_dir=study", code=2).stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_study_goes_on_and_ends_the_same(study: tuple[Path, str], source: Path, mtrl: Mtrl, number: int, code: int) -> None:
    process = mtrl.start("transfer", source, *STUDY, "run_dir=study", "checkpoint.every=40")
    metrics = mtrl.folder / "study" / "scratch" / "s0" / "checkpoints" / "latest"
    while not metrics.exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    printed, _ = process.communicate()
    assert process.returncode == code
    if number == signal.SIGTERM:
        assert "the study goes on where it was with: mtrl transfer" in printed
    said = MtrlHere(mtrl.folder)("transfer", source, *STUDY, "run_dir=study", "checkpoint.every=40").stdout
    assert "1 of 4: fine-tuned, seed 0: done before" in said
    assert "2 of 4: from scratch, seed 0\n" in said
    told, alone = read(mtrl.folder / "study" / "transfer.json"), read(study[0] / "transfer.json")
    assert told["tasks"] == alone["tasks"]
    assert told["over_tasks"] == alone["over_tasks"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["env.tasks=[CartPole-v1,MountainCar-v0]"], "env.tasks"),
        (["steps_per_task=248"], "steps_per_task"),
        (["transfer.freeze=none"], "transfer.freeze"),
        (["seed=1"], "seed"),
        (["seeds=1"], "fewer"),
    ],
)
def test_other_words_for_a_study_that_is_there_are_refused(
    study: tuple[Path, str], source: Path, here: MtrlHere, words: list[str], says: str
) -> None:
    refused = here("transfer", source, *STUDY, *words, f"run_dir={study[0]}", code=2)
    assert says in refused.stderr
    assert str(study[0]) in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2


def test_another_source_for_a_study_that_is_there_is_refused(study: tuple[Path, str], source: Path, here: MtrlHere) -> None:
    other = shutil.copytree(source, here.folder / "other")
    for words in (other, source / "checkpoints" / "160"):
        assert "holds a study of" in here("transfer", words, *STUDY, f"run_dir={study[0]}", code=2).stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "env=classic_pack"], "nowhere does not exist"),
        (["SOURCE", "steps_per_task=200"], "env=NAME"),
        (["SOURCE", "env=classic_pak"], "Did you mean 'env=classic_pack'?"),
        (["SOURCE", "env=minatar_pack", "device=cpu"], "network"),
        (["SOURCE", "env=classic_pack", "seeds=0"], "seeds=0"),
        (["SOURCE", "env=classic_pack", "init_from=run"], "init_from"),
        (["SOURCE", "env=classic_pack", "eval.test_episodes=0"], "eval.test_episodes=0"),
        (["SOURCE", "env=classic_pack", "eval.at_start=false"], "eval.at_start"),
        (["SOURCE", "env=classic_pack", "early_stopping.metric=eval/score/mean"], "early_stopping"),
        (["SOURCE/checkpoints/5", "env=classic_pack"], "no checkpoint 5"),
        (["SOURCE", "env=classic_pack", "transfer.freez=torso"], "transfer.freeze"),
        (["SOURCE", "env=classic_pack", "network.hidden=[8,8]", "device=cpu"], "hidden"),
    ],
)
def test_faults_are_a_line_and_nothing_is_made(source: Path, here: MtrlHere, words: list[str], says: str) -> None:
    refused = here("transfer", *(word.replace("SOURCE", str(source)) for word in words), code=2)
    assert says in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2
    assert list(here.folder.iterdir()) == []


def test_without_matplotlib_it_says_so_before_any_training(source: Path, here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest))
    assert extras.install_command("plots") in here("transfer", source, *STUDY, "run_dir=study", code=2).stderr
    assert list(here.folder.iterdir()) == []


def test_under_torchrun_it_is_refused(source: Path, here: MtrlHere, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "without torchrun" in here("transfer", source, *STUDY, "run_dir=study", code=2).stderr


# -- the report, of runs made by hand ---------------------------------------------------------------------------------------------


def written(run: Path, returns: list[float], final: float, scores: bool) -> Path:
    """A run's folder as far as the report reads it: one task, evaluated at steps 0, 100, …"""
    (run / "eval").mkdir(parents=True)
    rows = [{"step": 100 * index, "eval/return/a": value} for index, value in enumerate(returns)]
    if scores:
        rows = [row | {"eval/score/a": row["eval/return/a"] / 10, "eval/score/mean": row["eval/return/a"] / 10} for row in rows]
    other = [{"step": 50, "train/return/a": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *other]))
    test = {
        "episodes": 5,
        "tasks": {"a": {"mean": final, "score": final / 10 if scores else None}},
        "over_tasks": {"mean": final / 10} if scores else {},
    }
    (run / "eval" / "test.json").write_text(json.dumps({"last": test}))
    (run / "eval" / f"{rows[-1]['step']}.json").write_text(json.dumps({"episodes": 4}))
    return run


def report_of(tmp_path: Path, fine_tuned: list[float], scratch: list[float], scores: bool) -> dict[str, Any]:
    runs = {
        "fine_tuned": [written(tmp_path / "fine_tuned" / "s0", fine_tuned, 8.0, scores)],
        "scratch": [written(tmp_path / "scratch" / "s0", scratch, 6.0, scores)],
    }
    about = {"source": "/runs/a", "checkpoint": 7, "env": "b", "steps_per_task": 200, "seeds": [0]}
    return transfer_report.report(runs, about)


def test_table_by_hand(tmp_path: Path) -> None:
    told = report_of(tmp_path, [4.0, 6.0, 9.0], [0.0, 4.0, 8.0], scores=True)
    text = transfer_report.table(told)
    # Areas 6.25 and 4; 8 lies two thirds of the way from 6 to 9.
    assert "| a | 0.400 | 0.400 | 167 | 1.56 | 0.800 | 0.600 | 0.200 |" in text
    assert "one seed, 0, so there are no intervals; 4 games of validation per task and evaluation, 5 of the test." in text
    assert "mean over tasks" not in text


def test_tasks_without_reference_are_told_in_returns(tmp_path: Path) -> None:
    told = report_of(tmp_path, [-90.0, -60.0, -60.0], [-100.0, -80.0, -40.0], scores=False)
    assert told["over_tasks"] is None
    text = transfer_report.table(told)
    # Above the untrained network's -100: areas 32.5 and 25.
    assert "| a (return) | -90.0 | 10.0 | never | 1.30 | 8.0 | 6.0 | 2.0 |" in text
    assert "No reference is known for a" in text
    assert "0 is random play" not in text
    assert [axes.get_ylabel() for axes in transfer_report.draw(told).axes] == ["return"]


def test_scratch_that_learns_nothing_leaves_no_area_to_compare_with(tmp_path: Path) -> None:
    text = transfer_report.table(report_of(tmp_path, [1.0, 2.0, 3.0], [-1.0, -1.0, -1.0], scores=True))
    assert "| a | 0.100 | 0.200 | 0 | - |" in text
    assert "No area ratio where training from scratch is on the whole no better than random play: a" in text
