"""Tests that need more of the machine than Python packages: skipped where it is missing, failed where it was promised."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

VARIABLE = "MTRL_TEST_REQUIRE"
KNOWN = ("slurm", "ray", "browser")


def is_required(what: str) -> bool:
    """Whether the environment promises that `what` is there: MTRL_TEST_REQUIRE=slurm,ray,browser, as .ci/run sets it."""
    named = {word.strip() for word in os.environ.get(VARIABLE, "").split(",")} - {""}
    assert named <= set(KNOWN), f"{VARIABLE} names {sorted(named - set(KNOWN))}; there are {', '.join(KNOWN)}"
    return what in named


def skip_or_fail(what: str, reason: str) -> NoReturn:
    """End the test or fixture that calls it: `what` (slurm, ray or browser) is missing here, for this reason."""
    assert what in KNOWN, what
    if is_required(what):
        pytest.fail(f"{VARIABLE} names {what}, but {reason}", pytrace=False)
    pytest.skip(reason)
