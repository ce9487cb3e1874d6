"""A test that was skipped though the environment promised what it needs is a failure."""

from __future__ import annotations

import pytest

from tests.helpers import required


def test_what_is_missing_skips_unless_it_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    for promised in ("", "ray", "ray,browser"):
        monkeypatch.setenv(required.VARIABLE, promised)
        with pytest.raises(pytest.skip.Exception, match="there is no sbatch"):
            required.skip_or_fail("slurm", "there is no sbatch")
    for promised in ("slurm", "ray, slurm"):
        monkeypatch.setenv(required.VARIABLE, promised)
        with pytest.raises(pytest.fail.Exception, match="there is no sbatch"):
            required.skip_or_fail("slurm", "there is no sbatch")


def test_a_slip_in_the_promise_is_no_silent_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(required.VARIABLE, "slrum")
    with pytest.raises(AssertionError, match="slrum"):
        required.skip_or_fail("slurm", "there is no sbatch")
