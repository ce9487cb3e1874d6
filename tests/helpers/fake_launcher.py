"""A launcher with fake workers, which are fast and do not import torch, for tests of sweeps.

A worker counts steps, saves each step, and writes the same files as a run. Two environment variables control workers:

- FAKE_WORKER maps seeds to "fail" (an error), "crash" (killed each time), "crash_once", "hang" (never ends), or a score.
- FAKE_HOLD maps trials to the step at which the worker waits for the file `go` in the sweep's folder.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from mtrl_cli.files import atomic
from mtrl_cli.files.file_lock import FileLock
from mtrl_cli.launchers import local
from mtrl_cli.machine import parent_watchdog
from mtrl_cli.runs.run_dir import IN_USE
from mtrl_cli.types import PositiveInt

STEPS = 20


class FakeLauncher(local.LocalLauncher):
    """Run `work` in local processes."""

    def __init__(self, *, jobs: PositiveInt):
        super().__init__(jobs=jobs)
        local.worker_command = lambda run: [sys.executable, "-m", "tests.helpers.fake_launcher", str(run)]  # type: ignore[assignment]


def work(run: Path, seconds: float) -> int:
    """Count to STEPS, starting at the saved step."""
    lock = FileLock(run / ".lock")
    if not lock.try_acquire():
        print(f"mtrl: error: {run} {IN_USE} another process", file=sys.stderr)
        return 2
    stop_signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop_signals.append(number))
    match = re.search(r"^seed: (\d+)$", (run / "config.yaml").read_text(), re.MULTILINE)
    assert match is not None
    seed = match[1]
    behaviour = json.loads(os.environ.get("FAKE_WORKER", "{}")).get(seed, float(seed))
    hold = json.loads(os.environ.get("FAKE_HOLD", "{}")).get(str(int(run.name)))
    saved = run / "saved.json"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    if behaviour == "fail":
        record(run, "failed", "training diverged")
        print("mtrl: error: training diverged", file=sys.stderr)
        return 1
    if behaviour == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    record(run, "running")
    while step < STEPS or behaviour == "hang":
        if stop_signals:
            record(run, "stopped")
            return 128 + stop_signals[0]
        step += 1
        with open(run / "steps.log", "a") as log:
            log.write(f"{step}\n")
        score = behaviour if isinstance(behaviour, float) else 0.5
        rows = [{"step": each * 10, "seconds": each * seconds, "eval/score/mean": score} for each in range(1, step + 1)]
        atomic.replace(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        atomic.replace(saved, json.dumps({"step": step}).encode())
        if behaviour == "crash_once" and step == STEPS // 2 and not (run / "crashed").exists():
            (run / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        while step == hold and not stop_signals and not (run.parents[1] / "go").exists():
            time.sleep(0.02)
    record(run, "completed")
    return 0


def record(run: Path, status: str, error: str | None = None) -> None:
    """Write run.json."""
    atomic.replace(run / "run.json", json.dumps({"status": status, "seconds": 1.0, "error": error}).encode())


if __name__ == "__main__":
    parent_watchdog.watch()
    sys.exit(work(Path(sys.argv[1]), float(os.environ.get("FAKE_SECONDS", "0.01"))))
