"""Random and reference scores of tasks, and scores normalized with them.

- `data/atari57_scores.csv`: random play and a human tester, the values used in the literature (taken from google-deepmind/dqn_zoo). They
  were measured without sticky actions, after up to 30 no-ops.
- `data/other_scores.csv`: written by `scripts/measure_reference_scores.py`, which measures random play and cites a source for each
  reference.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources


def scores(suite: str, task: str) -> tuple[float | None, float | None]:
    """Return the random and the reference score of a task of "atari", "minatar" or "gymnasium"; None where unknown."""
    return _table().get((suite, task), (None, None))


def normalised(score: float, random: float | None, reference: float | None) -> float | None:
    """Return (score - random) / (reference - random): 0 for random play, 1 for the reference. None if either is unknown."""
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
