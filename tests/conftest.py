"""Fixtures that tests share. Sets one thread per process before anything imports torch."""

from __future__ import annotations

import os

# Small tensors are faster on one thread, and every command started by a test inherits the setting.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.command import ROOT, Mtrl, MtrlHere  # noqa: E402 (after the environment is set)


@pytest.fixture
def here(tmp_path: Path) -> MtrlHere:
    """`here("train", "env=classic_pack", code=0)` in this test's own folder and this process."""
    return MtrlHere(tmp_path)


@pytest.fixture
def mtrl(tmp_path: Path) -> Mtrl:
    """`mtrl("train", "env=classic_pack", code=0)` in this test's own folder."""
    return Mtrl(tmp_path)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in tests/e2e as `e2e`."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "e2e"):
            item.add_marker(pytest.mark.e2e)
