"""Resources that this process may use: cores, memory, disk, devices and a compiler, within affinity and cgroup limits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mtrl_cli.errors import UserError

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
# Environment variables of a run that shares its machine: MTRL_CORES (a number), MTRL_MEMORY and MTRL_DISK (bytes), and MTRL_RUNS_PER_GPU
# (the number of runs that share the memory of its GPU).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def cores(root: Path = ROOT) -> int:
    """Return the number of usable cores: the minimum of affinity, cgroup quota (1.5 cores count as 1) and this process's share."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quotas = [float(allowed)]
    for folder in _cgroup_folders("cpu", root):
        both = (_read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}").split()
        if len(both) == 2 and all(map(str.isdecimal, both)) and int(both[1]) > 0:  # "max" and -1 mean no limit
            quotas.append(int(both[0]) / int(both[1]))
    return max(1, min(int(min(quotas)), _share("MTRL_CORES") or sys.maxsize))


def memory_available(root: Path = ROOT) -> int:
    """Return the bytes of memory that are available without swapping, within the cgroup's limit and this process's share."""
    return _memory(root)[0]


def memory_total(root: Path = ROOT) -> int:
    """Return the total memory in bytes: the lowest of the machine's memory, the cgroup's limit and this process's share."""
    return _memory(root)[1]


def _memory(root: Path) -> tuple[int, int]:
    """Return (available, total) bytes."""
    available, total = _machine_memory(root)
    for folder in _cgroup_folders("memory", root):
        limit, used = _count(folder / "memory.max"), _count(folder / "memory.current")
        cache = "inactive_file"
        if used is None:
            limit, used = _count(folder / "memory.limit_in_bytes"), _count(folder / "memory.usage_in_bytes")
            cache = "total_inactive_file"
        if limit is None or used is None:
            continue
        # Usage includes cached files, which the kernel frees before it refuses memory.
        reclaimable = _table(folder / "memory.stat").get(cache, 0)
        total = min(total, limit)
        available = min(available, limit - used + reclaimable)
    total = min(total, _share("MTRL_MEMORY") or total)
    return max(0, min(available, total)), total


def disk_free(folder: Path) -> int:
    """Return the free bytes of the file system of `folder`, or this process's share if lower. Raises OSError."""
    free = shutil.disk_usage(folder).free
    return min(free, _share("MTRL_DISK") or free)


def _share(name: str) -> int | None:
    """Return this process's share from its environment, or None if it has none."""
    text = os.environ.get(name, "")
    return max(1, int(text)) if text.isdecimal() and len(text) <= 20 else None


def _machine_memory(root: Path) -> tuple[int, int]:
    table = _table(root / "proc/meminfo")
    if "MemTotal:" in table:
        total = table["MemTotal:"] * 1024
        return table.get("MemAvailable:", table.get("MemFree:", 0)) * 1024, total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the process's cgroup and its ancestors (v1 or v2). The limits of all these folders apply.

    In a container /proc/self/cgroup may contain the host's path, which is not visible. The root of the mount is then the process's cgroup.
    """
    mounts = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top = mounts
        elif controller in controllers.split(","):
            top = mounts / controllers if (mounts / controllers).is_dir() else mounts / controller
        else:
            continue
        folder = top / path.lstrip("/")
        while folder != top:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield top


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None


def _count(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Return the first number on each line of `path`, by the first word of the line."""
    words = (line.split() for line in (_read(path) or "").splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def resident_memory(root: Path = ROOT) -> int:
    """Return the resident memory of this process in bytes; on macOS the peak."""
    fields = (_read(root / "proc/self/statm") or "").split()
    if len(fields) > 1 and fields[1].isdecimal():
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS


def keep_freed_memory() -> None:
    """Configure glibc to keep freed memory for reuse. Does nothing with other C libraries.

    By default glibc returns large blocks to the system immediately. Page faults and zeroing of new blocks then cost a third of the time
    of a CPU update (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20)):
            mallopt(parameter, value)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return (available, total) bytes of memory on `device`, within this process's share."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved but not allocated is available, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        total //= _share("MTRL_RUNS_PER_GPU") or 1
        return min(free, total), total
    return _memory(ROOT)


def resolve_device(name: str) -> torch.device:
    """Resolve `auto` (the current GPU if there is one, else the CPU), `cpu`, `cuda` or `cuda:<index>`. Raises UserError."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if count else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name, re.ASCII)
    if match is None:
        raise UserError(f"device must be auto, cpu, cuda or cuda:<index>, got {name}")
    if count == 0:
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise UserError(f"device={name}: {reason}. Use device=cpu or device=auto")
    index = int(match[1]) if match[1] else torch.cuda.current_device()
    if index >= count:
        raise UserError(f"device={name} does not exist. Use a device from cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def cpu_has_bf16() -> bool:
    """Return whether the processor has bfloat16 instructions (AVX-512 BF16, AMX, ARM BF16)."""
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN also accepts other AVX-512 processors, on which emulated bfloat16 is slower than float32.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


def gpus() -> list[str]:
    """Return the visible GPUs by their names for CUDA_VISIBLE_DEVICES, without importing torch.

    The names are read from CUDA_VISIBLE_DEVICES, or, if the variable is not set, from the list of GPUs or MIG devices of nvidia-smi.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    parts = re.findall(r"^\s+MIG .*\(UUID: (MIG-[\w/-]+)\)", listed, re.MULTILINE)
    return parts or re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def compiler() -> str | None:
    """Return a C++ compiler that runs: $CXX if set, else g++ or clang++; None if there is none.

    torch.compile tries only $CXX or g++. If this function returns clang++, set CXX to clang++ before compiling.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++"]:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([name, "--version"], capture_output=True, timeout=30, check=True)
            return name
    return None


def keep_compiled() -> None:
    """Set torch's cache of compiled code to the user's cache folder, which outlives a restart, unless TORCHINDUCTOR_CACHE_DIR is set."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mtrl" / "torchinductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # not writable, or no home folder
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def missing_for_compile() -> str | None:
    """Return the missing requirement of torch.compile on the CPU, or None."""
    if compiler() is None:
        named = os.environ.get("CXX")
        return f"CXX={named} does not run" if named else "no C++ compiler (g++ or clang++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python headers (Python.h)"
    return None
