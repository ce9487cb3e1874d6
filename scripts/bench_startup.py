#!/usr/bin/env python3
"""Measure the wall time of `mtrl --help` and `mtrl train --dry-run` (medians).

python scripts/bench_startup.py [--repeats 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {"help": ["--help"], "dry_run": ["train", "--dry-run"]}


def environment() -> dict[str, str]:
    """Return this process's environment without PYTHON* variables, some of which slow Python down."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def seconds(arguments: list[str], folder: str) -> float:
    """Return the wall time of one `mtrl` command."""
    command = [str(Path(sys.executable).parent / "mtrl"), *arguments]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, float]:
    """Return the median seconds of each command. The first call of each, which writes bytecode, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):
            for name, arguments in COMMANDS.items():
                taken = seconds(arguments, folder)
                if turn:
                    times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    medians = measure(options.repeats)
    if options.json:
        print(json.dumps(medians))
        return
    for name, arguments in COMMANDS.items():
        print(f"mtrl {' '.join(arguments):<18} {medians[name]:6.3f} s")


if __name__ == "__main__":
    main()
