"""Two runs side by side."""

from __future__ import annotations

import json
import re

import pytest

from tests.helpers.command import MtrlHere
from tests.helpers.fake_runs import make_run, make_sweep

WORDS = ["env=minatar_pack", "network.parameters=300k"]


def lines(text: str) -> dict[str, list[str]]:
    """A table's lines by their first cell, as lists of the others."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {first: others for first, *others in cells}


def test_two_runs_of_one_pack(here: MtrlHere) -> None:
    make_run(here.folder / "a", [*WORDS, "network/sharing=hard"], reaches=0.5, spread=0, seconds=600, parameters=300_000)
    make_run(
        here.folder / "b", [*WORDS, "network/sharing=film", "optimizer.lr=0.01"], reaches=0.75, spread=0, seconds=900, parameters=330_000
    )
    told = here("compare", "a", "b").stdout
    found = lines(told)
    assert told.splitlines()[0].split() == ["a", "b"]
    assert found["status"] == ["completed", "completed"]
    assert found["network/sharing"] == ["hard", "film"]
    assert found["optimizer.lr"][1] == "0.01"
    assert not [key for key in found if key.startswith(("network.sharing", "run_dir", "seed"))]
    assert found["asterix"] == ["0.500", "0.750", "+0.250"]
    assert found["mean over tasks"] == ["0.500", "0.750", "+0.250"]
    assert found["in all"] == ["300,000", "330,000", "x1.10"]
    assert found["time"] == ["10:01", "15:01", "x1.50"]
    assert "With another seed" in told or "with another seed" in told
    assert "different tasks" not in told
    assert "budgets differ" not in told


def test_intervals_of_the_games_are_on_the_scale_of_the_scores(here: MtrlHere) -> None:
    from mtrl_cli.envs.scores import scores

    make_run(here.folder / "a", WORDS, reaches=0.5, spread=0)
    make_run(here.folder / "b", WORDS, reaches=0.5, spread=0, seed=1)
    path = here.folder / "b" / "eval" / "test.json"
    test = json.loads(path.read_text())
    random, reference = scores("minatar", "asterix")
    assert random is not None
    assert reference is not None
    # A mean return of 0.6 in scores, and an interval from 0.5 to 0.8.
    returns = [random + share * (reference - random) for share in (0.6, 0.5, 0.8)]
    own = {"mean": returns[0], "returns": [returns[1], returns[2]], "ci": returns[1:], "score": 0.6}
    test["last"]["tasks"]["asterix"] = own
    path.write_text(json.dumps(test))
    told = here("compare", "a", "b").stdout
    assert lines(told)["asterix"] == ["0.500", "0.600 (0.500 to 0.800)", "+0.100"]
    assert "In brackets" in told
    assert lines(told)["seed"] == ["0", "1"]


def test_other_tasks_budgets_and_ends_are_said(here: MtrlHere) -> None:
    make_run(here.folder / "a", [*WORDS, "env.tasks=[asterix,breakout]"], reaches=0.5)
    make_run(
        here.folder / "b", [*WORDS, "env.tasks=[breakout,freeway]", "steps_per_task=50000"], status="failed", error="it broke", progress=0.5
    )
    told = here("compare", "a", "b").stdout
    assert "1 of them in common; left out: asterix, freeway" in told
    assert "Their budgets differ: 100,000 and 50,000" in told
    assert "The second is failed (it broke)" in told
    assert "The second has no test: its last validation, at step 25,000" in told
    found = lines(told)
    assert "breakout" in found
    assert "asterix" not in found
    assert "mean over tasks" not in found  # of one task


def test_nothing_in_common(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS)
    make_run(here.folder / "b", ["env=classic_pack"])
    told = here("compare", "a", "b").stdout
    assert "0 of them in common" in told
    assert lines(told)["none"] == []


def test_returns_where_there_is_no_score(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS, reaches=0.5, spread=0, scored=False)
    make_run(here.folder / "b", WORDS, reaches=0.75, spread=0, seed=1, scored=False)
    assert lines(here("compare", "a", "b").stdout)["asterix (return)"] == ["50.0", "75.0", "+25.0"]


def test_trials_of_a_sweep_are_runs(here: MtrlHere) -> None:
    make_sweep(here.folder / "S", {"network/sharing": ["hard", "film"], "seed": [0]}, WORDS)
    told = here("compare", "S/trials/0000", "S/trials/0001").stdout
    assert told.splitlines()[0].split() == ["0000", "0001"]
    refused = here("compare", "S", "S/trials/0001", code=2).stderr
    assert "S is a sweep" in refused


def test_folders_of_one_name_are_told_apart(here: MtrlHere) -> None:
    make_run(here.folder / "x" / "run", WORDS)
    make_run(here.folder / "y" / "run", WORDS, seed=1)
    assert here("compare", "x/run", "y/run").stdout.splitlines()[0].split() == ["x/run", "y/run"]


@pytest.mark.parametrize("path", ["nowhere", "empty", "above"])
def test_what_is_no_run_is_refused(here: MtrlHere, path: str) -> None:
    make_run(here.folder / "above" / "run", WORDS)
    (here.folder / "empty").mkdir()
    refused = here("compare", "above/run", path, code=2)
    assert path in refused.stderr
    assert refused.stdout == ""


def test_a_run_of_a_stranger_cannot_steer_the_terminal(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS)
    make_run(here.folder / "b", WORDS, status="failed", error="\x1b[2J\x1b]0;owned\x07", progress=0.5)
    config = here.folder / "b" / "config.yaml"
    config.write_text(config.read_text().replace("init_from: null", 'init_from: "\\e[2Jaway"'))
    told = here("compare", "a", "b").stdout
    assert "[2Jaway" in told
    assert "\x1b" not in told
    assert "\x07" not in told


def test_what_a_run_has_yet_to_settle_is_no_difference(here: MtrlHere) -> None:
    make_run(here.folder / "a", WORDS)
    make_run(here.folder / "b", [*WORDS, "agent.gamma=0.9"], settled=False)
    found = lines(here("compare", "a", "b").stdout)
    assert "agent.gamma" in found
    assert not {"device", "precision", "threads", "replay.capacity", "agent.batch_size"} & found.keys()
