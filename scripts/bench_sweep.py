#!/usr/bin/env python3
"""Measure the overhead of a sweep per trial, and the time to resume a finished sweep of many trials.

    python scripts/bench_sweep.py [--trials 4] [--repeats 3] [--finished 1000] [--json]

The same runs are trained as a sweep with one job at a time, and one after the other with `mtrl resume`. The difference per trial is the
overhead; the startup of the sweep is reported separately. Results are medians of wall time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mtrl_cli.files import atomic
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.trial_run import TrialRun
from mtrl_cli.sweeps.trial_storage import TrialStorage

RUN = ["env=classic_pack", "steps_per_task=400", "agent.learning_starts=100", "eval.episodes=1", "eval.max_steps=50", "device=cpu"]


def seconds(words: list[str], folder: Path) -> float:
    """Return the wall time of one `mtrl` command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mtrl_cli", *words], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def overhead(trials: int, repeats: int) -> dict[str, float]:
    """Return the seconds of the startup of a sweep, of a single run, and of the overhead per trial."""
    starts, alone, extra = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for turn in range(repeats):
            sweep = f"s{turn}"
            whole = seconds(["sweep", *RUN, f"seed=range({trials})", f"run_dir={sweep}"], folder)
            start = seconds(["resume", sweep], folder)  # nothing left to run
            runs = []
            for path in sorted((folder / sweep / "trials").iterdir()):
                run = folder / f"alone{turn}_{path.name}"
                run.mkdir()
                shutil.copy(path / "config.yaml", run)
                runs.append(seconds(["resume", run.name], folder))
            starts.append(start)
            alone.append(sum(runs) / trials)
            extra.append((whole - start - sum(runs)) / trials)
    return {
        "sweep_start": statistics.median(starts),
        "run": statistics.median(alone),
        "overhead_per_trial": statistics.median(extra),
        "overhead_least": min(extra),
        "overhead_most": max(extra),
    }


def finished(count: int) -> dict[str, float]:
    """Return the seconds to resume a sweep of `count` finished trials."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sweep"
        folder.mkdir()
        plan = sweep_plan.make([*RUN, f"seed=range({count})", f"run_dir={folder}"])
        sweep_plan.save(plan, folder, ["mtrl", "sweep"])
        storage = TrialStorage(folder, plan, first=1)
        while (taken := storage.take()) is not None:
            run = TrialRun(folder, plan, taken.number, taken.values)
            run.path.mkdir(parents=True)
            run.write(state="completed", value=float(taken.number % 7), step=400, seconds=1.0)
            atomic.replace(run.path / "run.json", atomic.to_json({"status": "completed", "seconds": 1.0}).encode())
            storage.finish(taken.number, "completed", run.record.value)
        return {f"resume_of_{count}_finished": seconds(["resume", str(folder)], Path(name))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--finished", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = overhead(arguments.trials, arguments.repeats) | finished(arguments.finished)
    print(json.dumps(found) if arguments.json else "\n".join(f"{name:28} {value:7.2f} s" for name, value in found.items()))


if __name__ == "__main__":
    main()
