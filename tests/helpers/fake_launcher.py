"""A launcher whose workers only seem to train, in a moment and without torch: for tests of what a sweep does when they end, and how.

A worker counts steps, saves each, writes the same files as a run, and does as the environment's FAKE_WORKER says of its seed:
"fail" (an error of its own), "crash" (killed, each time), "crash_once", "hang" (never ends by itself), or a number: its score. FAKE_HOLD
says at which step the worker of a trial waits for the file `go` in the sweep's folder.
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
    """Processes of this machine that run `work`."""

    def __init__(self, *, jobs: PositiveInt):
        super().__init__(jobs=jobs)
        local.worker_command = lambda run: [sys.executable, "-m", "tests.helpers.fake_launcher", str(run)]  # type: ignore[assignment]


def work(run: Path, seconds: float) -> int:
    """Count to STEPS, going on from what was saved."""
    lock = FileLock(run / ".lock")
    if not lock.try_acquire():
        print(f"mtrl: error: {run} {IN_USE} another process", file=sys.stderr)
        return 2
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    match = re.search(r"^seed: (\d+)$", (run / "config.yaml").read_text(), re.MULTILINE)
    assert match is not None
    seed = match[1]
    what = json.loads(os.environ.get("FAKE_WORKER", "{}")).get(seed, float(seed))
    hold = json.loads(os.environ.get("FAKE_HOLD", "{}")).get(str(int(run.name)))
    saved = run / "saved.json"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    if what == "fail":
        record(run, "failed", "nothing good came of it")
        print("mtrl: error: nothing good came of it", file=sys.stderr)
        return 1
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    record(run, "running")
    while step < STEPS or what == "hang":
        if asked:
            record(run, "stopped")
            return 128 + asked[0]
        step += 1
        with open(run / "steps.log", "a") as log:
            log.write(f"{step}\n")
        score = what if isinstance(what, float) else 0.5
        rows = [{"step": each * 10, "seconds": each * seconds, "eval/score/mean": score} for each in range(1, step + 1)]
        atomic.replace(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        atomic.replace(saved, json.dumps({"step": step}).encode())
        if what == "crash_once" and step == STEPS // 2 and not (run / "crashed").exists():
            (run / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        while step == hold and not asked and not (run.parents[1] / "go").exists():
            time.sleep(0.02)
    record(run, "completed")
    return 0


def record(run: Path, status: str, error: str | None = None) -> None:
    """Write run.json."""
    atomic.replace(run / "run.json", json.dumps({"status": status, "seconds": 1.0, "error": error}).encode())


if __name__ == "__main__":
    parent_watchdog.watch()
    sys.exit(work(Path(sys.argv[1]), float(os.environ.get("FAKE_SECONDS", "0.01"))))
