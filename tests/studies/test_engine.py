"""The study engine: seeds, evaluation intervals and combinations of values."""

from __future__ import annotations

from typing import Any

import pytest

from mtrl_cli.errors import UserError
from mtrl_cli.studies import engine
from mtrl_cli.sweeps.plan import Choices


@pytest.mark.parametrize(
    ("words", "axis"),
    [
        ([], ["seed=0,1,2"]),
        (["seeds=2"], ["seed=0,1"]),
        (["seed=5", "seeds=2"], ["seed=5,6"]),
        (["seeds=1"], ["seed=0"]),
        (["seed=7,9"], []),
    ],
)
def test_seeds_become_an_axis_and_a_list_of_seeds_stays(words: list[str], axis: list[str]) -> None:
    others, found = engine.split_seeds(["env=classic_pack", *words])
    assert found == axis
    assert others == ["env=classic_pack", *([] if axis else words)]


@pytest.mark.parametrize("words", [["seeds=0"], ["seeds=1001"], ["seeds=two"], ["seeds=1", "seeds=2"], ["seeds=2", "seed=1,2"]])
def test_wrong_seeds_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="seed"):
        engine.split_seeds(words)


@pytest.mark.parametrize(
    ("every", "given", "expected"),
    [(0, [], ["eval.every=100"]), (500, [], ["eval.every=100"]), (50, [], []), (500, ["eval.every"], [])],
)
def test_evaluations_are_frequent_enough_for_curves_unless_the_user_sets_the_interval(
    every: int, given: list[str], expected: list[str]
) -> None:
    config: dict[str, Any] = {"steps_per_task": 1000, "eval": {"every": every}}
    assert engine.evaluation_overrides(config, set(given), ["eval.every"]) == expected


def test_combinations_change_the_seed_last() -> None:
    axes = {"seed": Choices(("0", "1")), "network/sharing": Choices(("hard", "film")), "optimizer.lr": Choices(("0.1", "0.2"))}
    found = list(engine.combinations(axes, without=["network/sharing"]))
    assert [(each["seed"], each["optimizer.lr"]) for each in found] == [("0", "0.1"), ("0", "0.2"), ("1", "0.1"), ("1", "0.2")]
