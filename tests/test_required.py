"""Tests of missing programs are skipped, or fail if MTRL_TEST_REQUIRE names the program."""

from __future__ import annotations

import pytest

from tests.helpers import required


def test_missing_program_skips_the_test_unless_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    for required_programs in ("", "ray", "ray,browser"):
        monkeypatch.setenv(required.VARIABLE, required_programs)
        with pytest.raises(pytest.skip.Exception, match="sbatch is missing"):
            required.skip_or_fail("slurm", "sbatch is missing")
    for required_programs in ("slurm", "ray, slurm"):
        monkeypatch.setenv(required.VARIABLE, required_programs)
        with pytest.raises(pytest.fail.Exception, match="sbatch is missing"):
            required.skip_or_fail("slurm", "sbatch is missing")


def test_unknown_program_in_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(required.VARIABLE, "slrum")
    with pytest.raises(AssertionError, match="slrum"):
        required.skip_or_fail("slurm", "sbatch is missing")
