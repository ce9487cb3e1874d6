"""The share of a machine that a worker on a cluster gets."""

from __future__ import annotations

import pytest

from mtrl_cli.launchers.worker import share_variables
from mtrl_cli.machine import hardware


def test_memory_defaults_to_the_same_fraction_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    monkeypatch.setattr(hardware, "memory_total", lambda: 64 * 2**30)
    assert share_variables(2, None) == {"MTRL_CORES": "2", "MTRL_MEMORY": str(16 * 2**30)}
    assert share_variables(2, 2**30) == {"MTRL_CORES": "2", "MTRL_MEMORY": str(2**30)}
    assert share_variables(99, None) == {"MTRL_CORES": "8", "MTRL_MEMORY": str(64 * 2**30)}, "at most the machine's cores"


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0, {"CUDA_VISIBLE_DEVICES": ""}),
        (0.5, {"MTRL_RUNS_PER_GPU": "2"}),
        (0.3, {"MTRL_RUNS_PER_GPU": "3"}),
        (0.1, {"MTRL_RUNS_PER_GPU": "10"}),
        (2, {}),
    ],
)
def test_gpus_are_hidden_or_shared(gpus: float, expected: dict[str, str]) -> None:
    shared = share_variables(1, 2**30, gpus)
    assert {name: value for name, value in shared.items() if name not in ("MTRL_CORES", "MTRL_MEMORY")} == expected
