"""`mtrl study sharing`: trials, resume, report and errors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from mtrl_cli.errors import UserError
from mtrl_cli.studies import sharing_sizes
from mtrl_cli.sweeps import plan as sweep_plan
from tests.helpers.command import ROOT, Mtrl, MtrlHere
from tests.helpers.fake_launcher import STEPS

WORDS = ["env=classic_pack", "network.hidden=[32,32]", f"steps_per_task={10 * STEPS}", "agent.learning_starts=10", "device=cpu"]
SMALL = [*WORDS, "network/sharing=hard,film"]
FAKE = ["launcher._target_=tests.helpers.fake_launcher.FakeLauncher", "trusted_packages=[tests]"]


@pytest.fixture(autouse=True)
def counted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count networks with the code of this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def trials(listing: str) -> list[dict[str, str]]:
    """Return the values of the trials that a dry run lists, by key."""
    rows = [line.split() for line in listing.splitlines() if re.match(r"\d+ +network/sharing=", line)]
    assert [int(number) for number, *_ in rows] == list(range(len(rows)))
    return [dict(word.split("=", 1) for word in words) for _, *words in rows]


def test_every_structure_has_the_parameter_count_of_hard_sharing(here: MtrlHere) -> None:
    listing = here("study", "sharing", *SMALL, "seeds=2", "--dry-run").stdout
    found = trials(listing)
    size = next(values["network.parameters"] for values in found if values["network/sharing"] == "hard")
    own = ["independent", "hard", "film"]
    expected = [*((name, size) for name in own), ("independent", "null")]
    # All of the first seed come before the second.
    assert [(each["network/sharing"], each["network.parameters"], each["seed"]) for each in found] == [
        (name, parameters, seed) for seed in ("0", "1") for name, parameters in expected
    ]
    sizes = here("ls", "network/sharing", "env=classic_pack", "network.hidden=[32,32]").stdout
    assert f"{int(size):,}" in next(line for line in sizes.splitlines() if line.startswith("* hard"))
    full = next(line for line in sizes.splitlines() if "independent" in line).split()[1]
    assert f"independent, hard, film with {int(size):,} parameters each, and independent with {full}" in listing
    # At least ten evaluations and diagnostics.
    assert f"eval.every={STEPS} log.diagnostics={STEPS}" in listing
    assert not (here.folder / "runs").exists()


def test_other_axes_sizes_and_seeds(here: MtrlHere) -> None:
    words = [*SMALL, "task_weights=uniform,pcgrad", "network.parameters=3k,4k", "seed=7,9", "log.diagnostics=5"]
    listing = here("study", "sharing", *words, "--dry-run").stdout
    found = trials(listing)
    assert len(found) == 2 * 2 * (3 * 2 + 1)
    assert {each["network.parameters"] for each in found} == {"3k", "4k", "null"}
    assert [each["seed"] for each in found] == ["7"] * 14 + ["9"] * 14
    assert [each["task_weights"] for each in found[:14]] == ["uniform"] * 7 + ["pcgrad"] * 7
    assert len({tuple(each.items()) for each in found}) == len(found)
    assert "log.diagnostics=5" in listing


def test_structure_with_a_larger_minimum_size_is_left_out_with_the_reason(here: MtrlHere) -> None:
    listing = here("study", "sharing", *WORDS, "network/sharing=care,hard", "network.parameters=2k", "seeds=1", "--dry-run").stdout
    assert "left out: care with network.parameters=2k: network.parameters must be at least " in listing
    assert {each["network/sharing"] for each in trials(listing)} == {"independent", "hard"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["network/sharing=independent"], "is the baseline of the comparison"),
        (["network/sharing=hard,fim"], "Did you mean 'network/sharing=film'?"),
        (["seeds=0"], "one integer from 1"),
        (["seeds=2", "seed=1,2"], "both choose the seeds"),
        (["network.parameters=null"], "of full width are always trained"),
        (["optimizer.lr=interval(0.001,0.01)"], "Give values, or use mtrl sweep"),
        (["env.tasks=[CartPole-v1]"], "at least two tasks"),
        (["early_stopping.metric=eval/score/mean"], "of the same budget"),
        (["network/sharing=care", "network.parameters=1k"], "no structure can be trained at that size"),
        (["sweep.trials=3"], "a study chooses the trials"),
        (["optimizer.lrr=1"], "optimizer.lr"),
        (["network.hidden=[0]"], "network.hidden"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_created(here: MtrlHere, words: list[str], message: str) -> None:
    given = {word.partition("=")[0] for word in words}
    base = [word for word in SMALL if word.partition("=")[0] not in given]
    assert message in here("study", "sharing", *base, *words, code=2).stderr
    assert list(here.folder.iterdir()) == []


def test_counting_reports_a_wrong_override() -> None:
    with pytest.raises(UserError, match="unknown key 'networc'"):
        sharing_sizes.measure(["env=classic_pack", "networc=mlp"], ["hard"], [])


# -- the points of a study in a sweep's folder ----------------------------------------------------------------------------------


def plan_of(folder: Path, points: list[dict[str, Any]] | None = None) -> sweep_plan.Plan:
    made = sweep_plan.make([*WORDS, "network/sharing=independent,hard", "network.parameters=3k,null", "seed=0,1", f"run_dir={folder}"])
    if points is None:
        return made
    return replace(made, points=tuple(points), search={**made.search, "trials": len(points)})


def chosen() -> list[dict[str, Any]]:
    pairs = [("independent", "3k"), ("hard", "3k"), ("independent", "null")]
    return [{"network/sharing": name, "network.parameters": size, "seed": seed} for seed in ("0", "1") for name, size in pairs]


def test_chosen_points_are_kept(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, chosen())
    sweep_plan.save(plan, tmp_path, ["mtrl", "study", "sharing"])
    kept = sweep_plan.load(tmp_path)
    assert kept.points == plan.points
    assert kept.trials == 6
    assert sweep_plan.check_same(plan, tmp_path).points == plan.points


def test_sweep_with_other_points_is_refused(tmp_path: Path) -> None:
    sweep_plan.save(plan_of(tmp_path, chosen()), tmp_path, ["mtrl", "study", "sharing"])
    for other in (plan_of(tmp_path), plan_of(tmp_path, chosen()[::-1]), plan_of(tmp_path, chosen()[:-1])):
        with pytest.raises(UserError, match="other combinations"):
            sweep_plan.check_same(other, tmp_path)
    with pytest.raises(UserError, match=r"sweep.trials=7.*number of trials is fixed"):
        sweep_plan.load(tmp_path, ["sweep.trials=7"])


@pytest.mark.parametrize(
    "points",
    [
        None,
        [],
        [{"network/sharing": "film", "network.parameters": "3k", "seed": "0"}],
        [{"network/sharing": "hard", "seed": "0"}],
        [{"network/sharing": "hard", "network.parameters": ["3k"], "seed": "0"}],
        ["hard"],
    ],
)
def test_damaged_points_are_refused(tmp_path: Path, points: Any) -> None:
    sweep_plan.save(plan_of(tmp_path, chosen()[:1]), tmp_path, ["mtrl", "study", "sharing"])
    record = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(record | {"points": points}))
    with pytest.raises(UserError, match="damaged"):
        sweep_plan.load(tmp_path)


# -- whole studies -----------------------------------------------------------------------------------------------------------------


def run_study(mtrl: Mtrl, *words: str, code: int = 0, **environment: str) -> tuple[str, str]:
    """Run `mtrl study sharing` in a separate process."""
    given = ["study", "sharing", *SMALL, *FAKE, "seeds=2", "launcher.jobs=2", *words]
    done = mtrl(*given, code=code, PYTHONPATH=str(ROOT), **environment)
    return done.stdout, done.stderr


def steps_taken(study: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().splitlines()) for path in sorted(study.glob("trials/*/steps.log"))}


def test_study_ends_with_its_report_and_the_same_command_resumes(mtrl: Mtrl, tmp_path: Path) -> None:
    # The runs of one seed fail. The report lists them, and the error is printed after it.
    printed, error = run_study(mtrl, code=1, FAKE_WORKER=json.dumps({"1": "fail"}))
    assert "8 runs" in printed
    assert "4 of 8 trials failed" in error
    study = tmp_path / "runs" / "studies" / "sharing_classic_pack"
    page = study / "report" / "index.html"
    assert "training diverged" in page.read_text()
    first = steps_taken(study)
    assert list(first.values()) == [STEPS] * 4
    page.unlink()
    printed, _ = run_study(mtrl, code=1)  # the same command trains nothing again
    assert "resuming the sweep in" in printed
    assert steps_taken(study) == first
    assert page.exists()
    record = json.loads((study / "sweep.json").read_text())
    assert record["command"].startswith("mtrl study sharing env=classic_pack")
