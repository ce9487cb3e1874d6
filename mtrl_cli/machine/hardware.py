"""What this machine lets the process use: cores, memory, devices and a compiler, within cgroup limits and affinity."""

from __future__ import annotations

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
SHARES = ("MTRL_CORES", "MTRL_MEMORY", "MTRL_DISK", "MTRL_RUNS_PER_GPU")
"""Of a run that shares its machine with others, in its environment: its cores, its bytes of memory and of disk, and how many runs
share its GPU's memory."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def cores(root: Path = ROOT) -> int:
    """Cores that the process may use: its affinity, and no more than the cgroup's quota (1.5 cores count as 1) and its share."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quotas = [float(allowed)]
    for folder in _cgroup_folders("cpu", root):
        both = (_read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}").split()
        if len(both) == 2 and all(map(str.isdecimal, both)) and int(both[1]) > 0:  # "max" and -1 mean no limit
            quotas.append(int(both[0]) / int(both[1]))
    return max(1, min(int(min(quotas)), _share("MTRL_CORES") or sys.maxsize))


def memory_available(root: Path = ROOT) -> int:
    """Bytes of memory that can still be taken without swapping: the machine's, and no more than the cgroup's limit leaves."""
    return _memory(root)[0]


def memory_total(root: Path = ROOT) -> int:
    """Bytes of memory in all: the machine's, or the cgroup's limit where that is less."""
    return _memory(root)[1]


def _memory(root: Path) -> tuple[int, int]:
    """(available, total) bytes, and no more than this process's share."""
    available, total = _machine_memory(root)
    for folder in _cgroup_folders("memory", root):
        limit, used = _count(folder / "memory.max"), _count(folder / "memory.current")
        cache = "inactive_file"
        if used is None:
            limit, used = _count(folder / "memory.limit_in_bytes"), _count(folder / "memory.usage_in_bytes")
            cache = "total_inactive_file"
        if limit is None or used is None:
            continue
        # Usage counts cached files, which the kernel gives back before it refuses memory.
        reclaimable = _table(folder / "memory.stat").get(cache, 0)
        total = min(total, limit)
        available = min(available, limit - used + reclaimable)
    total = min(total, _share("MTRL_MEMORY") or total)
    return max(0, min(available, total)), total


def disk_free(folder: Path) -> int:
    """Bytes that can still be written where `folder` lies, and no more than this process's share. Raises OSError."""
    free = shutil.disk_usage(folder).free
    return min(free, _share("MTRL_DISK") or free)


def _share(name: str) -> int | None:
    """This process's share of what it has beside others; None where nothing is said."""
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
    """The process's cgroup and those above it, whose limits all hold, for cgroup v2 and v1.

    In a container the path in /proc/self/cgroup may be the host's and not be visible; the mount's root is then our own group.
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
    """The first number on each line of `path`, by the line's first word."""
    words = (line.split() for line in (_read(path) or "").splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def resident_memory(root: Path = ROOT) -> int:
    """Bytes of physical memory that this process holds now; where the system does not say, the most it has held."""
    fields = (_read(root / "proc/self/statm") or "").split()
    if len(fields) > 1 and fields[1].isdecimal():
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, where the system's C library can be told so (glibc).

    By default glibc gives large blocks back at once and asks for new ones, whose every page costs a fault and is zeroed: a third of a
    CPU update's time, whose tensors are as large each time (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20)):
            mallopt(parameter, value)


def device_memory(device: torch.device) -> tuple[int, int]:
    """(available, total) bytes of memory on `device`, and no more than this process's share."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # What torch has reserved but not given out is free to us too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        total //= _share("MTRL_RUNS_PER_GPU") or 1
        return min(free, total), total
    return _memory(ROOT)


def resolve_device(name: str) -> torch.device:
    """The device that `auto` (the first GPU if there is one), `cpu`, `cuda` or `cuda:<index>` means here. Raises UserError."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if count else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()) or name.endswith(":"):
        raise UserError(f"device={name} is not known; give auto, cpu, cuda or cuda:<index>.")
    if count == 0:
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise UserError(f"device={name}: {reason}; give device=cpu or device=auto.")
    if index and int(index) >= count:
        raise UserError(f"device={name}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}.")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def cpu_has_bf16() -> bool:
    """Whether the processor itself multiplies bfloat16 (AVX-512 BF16, AMX, ARM BF16), rather than having it emulated."""
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN accepts any AVX-512 and emulates, which is slower than float32.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


def gpus() -> list[str]:
    """The GPUs that processes started here see, each as CUDA_VISIBLE_DEVICES names it: what that says, or else what the driver's
    nvidia-smi lists, of a GPU that is divided its parts. Without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    parts = re.findall(r"^\s+MIG .*\(UUID: (MIG-[\w/-]+)\)", listed, re.MULTILINE)
    return parts or re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def compiler() -> str | None:
    """The C++ compiler that runs here: $CXX, or else g++ or clang++.

    torch.compile looks for $CXX or g++ and nothing else: where this gives clang++, set CXX to it first.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++"]:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            works = subprocess.run([path, "--version"], capture_output=True, timeout=30, check=False).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            works = False
        if works:
            return name
    return None


def keep_compiled() -> None:
    """Let torch keep compiled code where it outlives a restart: in the user's cache folder rather than in /tmp, unless told otherwise."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mtrl" / "torchinductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # nowhere to keep it
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def missing_for_compile() -> str | None:
    """Why torch.compile cannot work on the CPU here, in a few words, or None if it can."""
    if compiler() is None:
        named = os.environ.get("CXX")
        return f"CXX={named} does not run" if named else "there is no C++ compiler (g++ or clang++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h) are not installed"
    return None
