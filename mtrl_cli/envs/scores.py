"""Random and reference scores of tasks, and scores normalised with them.

`data/atari57_scores.csv`: random play and a human tester, the metrics that the field normalises with (those of google-deepmind/dqn_zoo);
they were measured without sticky actions, after up to 30 no-ops. `data/other_scores.csv`: written by `scripts/measure_reference_scores.py`,
which measures random play here and cites the references, each with its source.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources


def scores(suite: str, task: str) -> tuple[float | None, float | None]:
    """The random and the reference score of a task ("atari", "minatar" or "gymnasium"), each None where it is not known."""
    return _table().get((suite, task), (None, None))


def normalised(score: float, random: float | None, reference: float | None) -> float | None:
    """0 for random play, 1 for the reference, linear between and beyond: (score - random) / (reference - random).

    None for a task of which one of the two is not known.
    """
    if random is None or reference is None:
        return None
    return (score - random) / (reference - random)


@cache
def _table() -> dict[tuple[str, str], tuple[float, float]]:
    atari = {("atari", row["game"]): (float(row["random"]), float(row["human"])) for row in _rows("atari57_scores.csv")}
    others = {(row["suite"], row["task"]): (float(row["random"]), float(row["reference"])) for row in _rows("other_scores.csv")}
    return atari | others


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("mtrl_cli.envs").joinpath("data", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
