"""Overrides: simple ones are read without Hydra's parser, with the same result."""

from __future__ import annotations

import random
import re

import pytest

from mtrl_cli.config import overrides
from mtrl_cli.errors import UserError

KEYS = ["env", "agent.n_step", "network/sharing", "a.b_c.d2", "run_dir", "init_from", "a/b/c", "x.y.z1"]
WORD_LIST = (
    "1 0 -3 12 007 1.5 -0.0 1e-4 1e5 2.5e-3 1e05 1_000 0x1 1. .5 e5 E5 1E5 -1e-7 pong-1.5 1.2.3 nan inf NaN "
    "true True false FALSE null Null none Infinity nullx true1 true-x inf_ pong CartPole-v1 a_b a-b - -a _x x- é"
)
WORDS = WORD_LIST.split()


def test_simple_overrides_equal_those_of_hydras_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    lists = [f"[{','.join(draw.choices(WORDS, k=draw.randint(1, 3)))}]" for _ in range(100)]
    texts = [f"{key}={value}" for key in KEYS for value in [*WORDS, *lists]]
    simple = {text: overrides._parse_simple(text) for text in texts}
    simple = {text: found for text, found in simple.items() if found is not None}
    assert len(simple) > 200
    monkeypatch.setattr(overrides, "_parse_simple", lambda text: None)
    for text, found in simple.items():
        assert str(overrides.parse(text)) == str(found), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env", "'env' is not an override"),
        ("=3", "'=3' is not an override"),
        ("seed=1,2", "seed must be a single value, got 1,2"),
        ("seed=range(3)", "seed must be a single value, got range(3)"),
        ("network@x=mlp", "packages (@) are not supported"),
        ("env=[pong", "'env=[pong' is not an override"),
        ("+env={a", "'+env={a' is not an override"),
    ],
)
def test_text_that_is_not_a_single_override_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        overrides.parse(text)
