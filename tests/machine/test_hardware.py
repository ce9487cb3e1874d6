"""Resources of this process: cores, memory, disk, devices and a compiler."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from mtrl_cli.build import resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.config.compose import compose_training
from mtrl_cli.errors import UserError
from mtrl_cli.machine import hardware

GIB = 2**30


def _tree(root: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1000 kB\nMemAvailable: 8388608 kB\n"}


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.delenv("MTRL_CORES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # The limit of an ancestor applies, too.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        # A container that shows the host's path: the process's cgroup is the root of the mount.
        ({"proc/self/cgroup": "0::/docker/1f\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n1:name=systemd:/\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_cores_respect_affinity_and_cgroup_quota(tmp_path, content, expected):
    assert hardware.cores(_tree(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("content", "available", "total"),
    [
        ({}, 8 * GIB, 16 * GIB),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                "sys/fs/cgroup/job/memory.max": str(4 * GIB),
                "sys/fs/cgroup/job/memory.current": str(3 * GIB),
                "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2 * GIB,
            4 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                "sys/fs/cgroup/job/memory.max": "max",
                "sys/fs/cgroup/job/memory.current": str(3 * GIB),
            },
            8 * GIB,
            16 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(2 * GIB),
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(3 * GIB),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
            },
            0,
            2 * GIB,
        ),
    ],
)
def test_memory_respects_the_cgroup_limit(tmp_path, content, available, total):
    root = _tree(tmp_path, MEMINFO | content)
    assert hardware.memory_available(root) == available
    assert hardware.memory_total(root) == total


@pytest.mark.usefixtures("eight_cores")
def test_share_variables_limit_cores_memory_and_disk(tmp_path, monkeypatch):
    root = _tree(tmp_path, MEMINFO)
    for cores, memory, expected in (("3", str(2 * GIB), (3, 2 * GIB, 2 * GIB)), ("100", str(100 * GIB), (8, 8 * GIB, 16 * GIB))):
        monkeypatch.setenv("MTRL_CORES", cores)
        monkeypatch.setenv("MTRL_MEMORY", memory)
        assert (hardware.cores(root), hardware.memory_available(root), hardware.memory_total(root)) == expected
    monkeypatch.setenv("MTRL_CORES", "some")
    assert hardware.cores(root) == 8
    whole = hardware.disk_free(tmp_path)
    monkeypatch.setenv("MTRL_DISK", "1000")
    assert hardware.disk_free(tmp_path) == min(whole, 1000)


def test_auto_replay_capacity_is_proportional_to_the_memory_share(monkeypatch):
    config = compose_training(["env=minatar_pack", "checkpoint.replay=false", "device=cpu", "steps_per_task=1000000"])
    pack, capacities = build_run.make_pack(config), []
    for megabytes in (400, 200):
        monkeypatch.setenv("MTRL_MEMORY", str(megabytes * 2**20))
        capacities.append(resolve_auto.resolve(config, pack, lambda line: None)["replay"]["capacity"])
    assert capacities[0] == pytest.approx(2 * capacities[1], abs=2)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n", ["0", "1"]),
        (
            "GPU 0: NVIDIA A100 (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (UUID: MIG-a-1)\n  MIG 1g.5gb Device 1: (UUID: MIG-a-2)\n",
            ["MIG-a-1", "MIG-a-2"],
        ),
        ("No devices were found\n", []),
    ],
)
def test_gpus_come_from_cuda_visible_devices_or_the_driver(listed, expected, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.gpus() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert hardware.gpus() == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.gpus() == []


def test_values_of_this_machine_are_plausible():
    assert 1 <= hardware.cores() <= (os.cpu_count() or 1)
    assert 0 < hardware.memory_available() <= hardware.memory_total()
    available, total = hardware.device_memory(torch.device("cpu"))
    assert 0 < available <= total
    assert isinstance(hardware.cpu_has_bf16(), bool)


def test_resident_memory_grows_with_allocations():
    before = hardware.resident_memory()
    with mmap.mmap(-1, 64 * 2**20) as held:  # directly from the system, not from freed memory
        held.write(os.urandom(1) * len(held))
        assert hardware.resident_memory() - before >= 0.9 * len(held)


def test_available_devices_are_resolved():
    assert hardware.resolve_device("cpu") == torch.device("cpu")
    assert hardware.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cuda:-1", "", "cpu:0", "meta"])
def test_unknown_device_names_are_refused(name):
    with pytest.raises(UserError, match=f"device must be auto, cpu, cuda or cuda:<index>, got {name}"):
        hardware.resolve_device(name)


def test_cuda_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match="Use device=cpu or device=auto"):
            hardware.resolve_device(name)


def test_cuda_index_out_of_range_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert hardware.resolve_device("cuda:1") == torch.device("cuda", 1)
    assert hardware.resolve_device("cuda") == hardware.resolve_device("auto") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="Use a device from cuda:0 to cuda:1"):
        hardware.resolve_device("cuda:2")


def _program(path: Path, code: int) -> None:
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(0o755)


def test_only_a_compiler_that_runs_is_returned(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.delenv("CXX", raising=False)
    _program(tmp_path / "g++", 127)
    _program(tmp_path / "clang++", 0)
    assert hardware.compiler() == "clang++"
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert hardware.compiler() is None
    assert "CXX=/no/such/compiler" in (hardware.missing_for_compile() or "")
    monkeypatch.delenv("CXX")
    _program(tmp_path / "clang++", 1)
    assert "no C++ compiler" in (hardware.missing_for_compile() or "")


def test_compile_cache_is_in_the_users_cache_folder_unless_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that the value set below is undone
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    hardware.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mtrl" / "torchinductor")
    assert (tmp_path / "mtrl" / "torchinductor").stat().st_mode & 0o077 == 0, "other users could place code there"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    hardware.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_compile_cache_is_torchs_default_if_the_folder_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    hardware.keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
