"""`mtrl compare`: two runs side by side."""

from __future__ import annotations

import json
import re

import pytest

from tests.helpers.command import MtrlHere
from tests.helpers.fake_runs import make_run, make_sweep

WORDS = ["env=minatar_pack", "network.parameters=300k"]


def lines(text: str) -> dict[str, list[str]]:
    """Return a table's lines by their first cell, as lists of the other cells."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {first: others for first, *others in cells}


def test_table_shows_configuration_scores_speed_and_parameters(here: MtrlHere) -> None:
    make_run(here.folder / "a", [*WORDS, "network/sharing=hard"], reaches=0.5, spread=0, seconds=600, parameters=300_000)
    make_run(
        here.folder / "b", [*WORDS, "network/sharing=film", "optimizer.lr=0.01"], reaches=0.75, spread=0, seconds=900, parameters=330_000
    )
    printed = here("compare", "a", "b").stdout
    found = lines(printed)
    assert printed.splitlines()[0].split() == ["a", "b"]
    assert found["status"] == ["completed", "completed"]
    assert found["network/sharing"] == ["hard", "film"]
    assert found["optimizer.lr"][1] == "0.01"
    assert not [key for key in found if key.startswith(("network.sharing", "run_dir", "seed"))]
    assert found["asterix"] == ["0.500", "0.750", "+0.250"]
    assert found["mean over tasks"] == ["0.500", "0.750", "+0.250"]
    assert found["total"] == ["300,000", "330,000", "x1.10"]
    assert found["time"] == ["10:01", "15:01", "x1.50"]
    assert "other seeds may give other results" in printed
    assert "different tasks" not in printed
    assert "budgets differ" not in printed


def test_intervals_over_episodes_are_in_units_of_scores(here: MtrlHere) -> None:
    from mtrl_cli.envs.scores import scores

    make_run(here.folder / "a", WORDS, reaches=0.5, spread=0)
    make_run(here.folder / "b", WORDS, reaches=0.5, spread=0, seed=1)
    path = here.folder / "b" / "eval" / "test.json"
    test = json.loads(path.read_text())
    random, reference = scores("minatar", "asterix")
    assert random is not None
    assert reference is not None
    # Scores: a mean of 0.6 and an interval from 0.5 to 0.8.
    returns = [random + share * (reference - random) for share in (0.6, 0.5, 0.8)]
    test["last"]["tasks"]["asterix"] = {"mean": returns[0], "ci": returns[1:], "score": 0.6}
    test["last"]["episodes"] = 2
    path.write_text(json.dumps(test))
    printed = here("compare", "a", "b").stdout
    assert lines(printed)["asterix"] == ["0.500", "0.600 (0.500 to 0.800)", "+0.100"]
    assert "In brackets" in printed
    assert lines(printed)["seed"] == ["0", "1"]


def test_different_tasks_budgets_and_endings_are_noted(here: MtrlHere) -> None:
    make_run(here.folder / "a", [*WORDS, "env.tasks=[asterix,breakout]"], reaches=0.5)
    make_run(
        here.folder / "b", [*WORDS, "env.tasks=[breakout,freeway]", "steps_per_task=50000"], status="failed", error="it broke", progress=0.5
    )
    printed = here("compare", "a", "b").stdout
    assert "1 in common; left out: asterix, freeway" in printed
    assert "Their budgets differ: 100,000 and 50,000" in printed
    assert "The second run is failed (it broke)" in printed
    assert "The second run has no test: its last validation, at step 25,000" in printed
    found = lines(printed)
    assert "breakout" in found
    assert "asterix" not in found
    assert "mean over tasks" not in found, "one task has no mean over tasks"


def test_runs_without_common_tasks_have_no_scores(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS)
    make_run(here.folder / "b", ["env=classic_pack"])
    printed = here("compare", "a", "b").stdout
    assert "0 in common" in printed
    assert lines(printed)["none"] == []


def test_tasks_without_scores_are_compared_by_returns(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS, reaches=0.5, spread=0, scored=False)
    make_run(here.folder / "b", WORDS, reaches=0.75, spread=0, seed=1, scored=False)
    assert lines(here("compare", "a", "b").stdout)["asterix (return)"] == ["50.0", "75.0", "+25.0"]


def test_trials_of_a_sweep_are_runs(here: MtrlHere) -> None:
    make_sweep(here.folder / "S", {"network/sharing": ["hard", "film"], "seed": [0]}, WORDS)
    printed = here("compare", "S/trials/0000", "S/trials/0001").stdout
    assert printed.splitlines()[0].split() == ["0000", "0001"]
    refused = here("compare", "S", "S/trials/0001", code=2).stderr
    assert "S is a sweep" in refused


def test_folders_of_one_name_are_distinguished(here: MtrlHere) -> None:
    make_run(here.folder / "x" / "run", WORDS)
    make_run(here.folder / "y" / "run", WORDS, seed=1)
    assert here("compare", "x/run", "y/run").stdout.splitlines()[0].split() == ["x/run", "y/run"]


@pytest.mark.parametrize("path", ["nowhere", "empty", "above"])
def test_folders_that_are_not_runs_are_refused(here: MtrlHere, path: str) -> None:
    make_run(here.folder / "above" / "run", WORDS)
    (here.folder / "empty").mkdir()
    refused = here("compare", "above/run", path, code=2)
    assert path in refused.stderr
    assert refused.stdout == ""


def test_control_characters_of_a_run_are_not_printed(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS)
    make_run(here.folder / "b", WORDS, status="failed", error="\x1b[2J\x1b]0;owned\x07", progress=0.5)
    config = here.folder / "b" / "config.yaml"
    config.write_text(config.read_text().replace("init_from: null", 'init_from: "\\e[2Jaway"'))
    printed = here("compare", "a", "b").stdout
    assert "[2Jaway" in printed
    assert "\x1b" not in printed
    assert "\x07" not in printed


def test_unresolved_auto_is_no_difference(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS)
    make_run(here.folder / "b", [*WORDS, "agent.gamma=0.9"], settled=False)
    found = lines(here("compare", "a", "b").stdout)
    assert "agent.gamma" in found
    assert not {"device", "precision", "threads", "replay.capacity", "agent.batch_size"} & found.keys()
