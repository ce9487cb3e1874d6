"""`mtrl info`: versions, resources of this machine, and file locations, for bug reports."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrl_cli.config import compose, options
from mtrl_cli.machine import hardware
from mtrl_cli.runs import run_dir
from mtrl_cli.runs.terminal import as_text, table

OTHER_PACKAGES = ("omegaconf", "pydantic", "typer", "rich", "pyyaml", "minatar")
"""Packages in addition to those that run.json records. minatar is optional."""


def run(as_json: bool) -> str:
    """Return the facts as lines `name  value`, or as one JSON object. Imports torch to list devices."""
    facts = collect()
    return json.dumps(facts, indent=2) if as_json else _as_text(facts)


def collect() -> dict[str, Any]:
    """Return the facts as JSON values."""
    return {
        "versions": run_dir.versions() | dict.fromkeys(OTHER_PACKAGES) | run_dir.versions(OTHER_PACKAGES),
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


def _as_text(facts: Mapping[str, Any]) -> str:
    git, memory = facts["git"], facts["memory"]
    rows = {name: version or "not installed" for name, version in facts["versions"].items()} | {
        "git revision": git["revision"] + (" with changes" if git["changed"] else "") if git else "not a checkout",
        "platform": facts["platform"],
        "processor": facts["processor"],
        "cores": f"{facts['cores']} (within affinity and cgroup)",
        "memory": f"{memory['available'] / 2**30:.1f} GiB available of {memory['total'] / 2**30:.1f}",
        "devices": ", ".join(facts["devices"]),
        "torch.compile": facts["compile"],
        "package": facts["package"],
        "configuration": facts["configuration"],
        "settings": facts["settings"],
        "trusted packages": ", ".join(facts["trusted_packages"]) or "none",
    }
    return as_text(table(rows.items(), ("", ""), show_header=False))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


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
