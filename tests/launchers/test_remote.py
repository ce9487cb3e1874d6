"""What a worker on a cluster is told of its machine, which the cluster may not confine it to."""

from __future__ import annotations

import pytest

from mtrl_cli.launchers import remote
from mtrl_cli.machine import hardware


def test_memory_is_shared_out_as_cores_are_unless_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    monkeypatch.setattr(hardware, "memory_total", lambda: 64 * 2**30)
    assert remote.share(2, None) == {"MTRL_CORES": "2", "MTRL_MEMORY": str(16 * 2**30)}
    assert remote.share(2, 2**30) == {"MTRL_CORES": "2", "MTRL_MEMORY": str(2**30)}
    assert remote.share(99, None) == {"MTRL_CORES": "8", "MTRL_MEMORY": str(64 * 2**30)}, "no more than there is"


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        (0, {"CUDA_VISIBLE_DEVICES": ""}),
        (0.5, {"MTRL_RUNS_PER_GPU": "2"}),
        (0.3, {"MTRL_RUNS_PER_GPU": "3"}),
        (0.1, {"MTRL_RUNS_PER_GPU": "10"}),
        (2, {}),
    ],
)
def test_a_gpu_that_is_shared_and_one_that_is_not_ours(gpus: float, told: dict[str, str]) -> None:
    shared = remote.share(1, 2**30, gpus)
    assert {name: value for name, value in shared.items() if name not in ("MTRL_CORES", "MTRL_MEMORY")} == told


def test_a_worker_heeds_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = remote.share(1, 2**20)
    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    assert hardware.cores() == 1
    assert hardware.memory_total() == 2**20
    assert hardware.memory_available() <= 2**20
