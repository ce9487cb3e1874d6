"""`mtrl info`: what a bug report needs. Versions, this machine, and where the configuration lies."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrl_cli.config import compose, options
from mtrl_cli.machine import hardware
from mtrl_cli.runs import run_dir

ALSO = ("omegaconf", "pydantic", "typer", "rich", "pyyaml", "minatar")
"""Packages besides those that run.json records; minatar is an extra."""


def collect() -> dict[str, Any]:
    """Everything that `mtrl info` tells, as plain values. Imports torch, to ask it for devices."""
    return {
        "versions": {**run_dir.versions(), **{name: _version(name) for name in ALSO}},
        "git": run_dir.git_revision(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": hardware.cores(),
        "memory": {"total": hardware.memory_total(), "available": hardware.memory_available()},
        "devices": _devices(),
        "compile": hardware.missing_for_compile() or "works",
        "package": str(Path(__file__).resolve().parents[1]),
        "configuration": str(options.conf_folder()),
        "settings": str(compose.settings_file()) + ("" if compose.settings_file().is_file() else " (none)"),
        "trusted_packages": compose.trusted_packages(),
    }


def as_text(facts: Mapping[str, Any]) -> str:
    """The facts as lines `name  value`."""
    git = facts["git"]
    rows = [(name, version or "not installed") for name, version in facts["versions"].items()]
    rows += [
        ("git revision", git["revision"] + (", changed since" if git["changed"] else "") if git else "no checkout"),
        ("platform", facts["platform"]),
        ("processor", facts["processor"]),
        ("cores", f"{facts['cores']} (within affinity and cgroup)"),
        ("memory", f"{facts['memory']['available'] / 2**30:.1f} GiB free of {facts['memory']['total'] / 2**30:.1f}"),
        ("devices", ", ".join(facts["devices"])),
        ("torch.compile", facts["compile"]),
        ("package", facts["package"]),
        ("configuration", facts["configuration"]),
        ("settings", facts["settings"]),
        ("trusted packages", ", ".join(facts["trusted_packages"]) or "none"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )


def _devices() -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [f"torch cannot be imported: {error}"]
    gpus = [
        f"cuda:{index} {torch.cuda.get_device_name(index)} ({torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return ["cpu", *gpus]
