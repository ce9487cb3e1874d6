"""Tests that require programs other than Python packages: skipped if a program is missing, failed if the missing program is required."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

VARIABLE = "MTRL_TEST_REQUIRE"
KNOWN = ("slurm", "ray", "browser")


def is_required(program: str) -> bool:
    """Whether a program must be available: MTRL_TEST_REQUIRE=slurm,ray,browser, as set by .ci/run."""
    named = {word.strip() for word in os.environ.get(VARIABLE, "").split(",")} - {""}
    assert named <= set(KNOWN), f"{VARIABLE} names {sorted(named - set(KNOWN))}; there are {', '.join(KNOWN)}"
    return program in named


def skip_or_fail(program: str, reason: str) -> NoReturn:
    """Skip or fail the calling test or fixture: a program (slurm, ray or browser) is missing for this reason."""
    assert program in KNOWN, program
    if is_required(program):
        pytest.fail(f"{VARIABLE} names {program}, but {reason}", pytrace=False)
    pytest.skip(reason)
