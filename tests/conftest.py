"""Fixtures that tests share. Sets one thread and one core per process before anything imports torch."""

from __future__ import annotations

import os

# Small tensors are faster on one thread, and every command started by a test inherits the setting.
os.environ["OMP_NUM_THREADS"] = "1"
# `threads=auto` of a run on images would take all cores, and the processes of pytest-xdist would wait for each other.
os.environ["MTRL_CORES"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.command import ROOT, Mtrl, MtrlHere  # noqa: E402 (after the environment is set)
from tests.helpers.shared import Shared, session_root  # noqa: E402
from tests.helpers.warm_process import WarmServer  # noqa: E402


@pytest.fixture
def here(tmp_path: Path) -> MtrlHere:
    """`here("train", "env=classic_pack", code=0)` in the folder of the test and in this process."""
    return MtrlHere(tmp_path)


@pytest.fixture(scope="session")
def warm_server() -> Iterator[WarmServer]:
    """The process that forks commands for the `mtrl` fixture."""
    server = WarmServer(ROOT)
    yield server
    server.close()


@pytest.fixture
def mtrl(tmp_path: Path, warm_server: WarmServer) -> Mtrl:
    """`mtrl("train", "env=classic_pack", code=0)` in the folder of the test and in a separate process."""
    return Mtrl(tmp_path, warm_server)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """`shared.run("env=classic_pack", …)`: a run trained once per session, for tests that only read it."""
    return Shared(session_root(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in tests/e2e as `e2e`."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "e2e"):
            item.add_marker(pytest.mark.e2e)
