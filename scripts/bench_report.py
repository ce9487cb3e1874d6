"""Measure the time of `mtrl report`, including startup, on synthetic sweeps of finished trials with 50 rows each.

python scripts/bench_report.py            # 100 runs, 1,000 trials of a grid, 1,000 different trials
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers.fake_runs import make_sweep, make_trial

STRUCTURES = ["independent", "hard", "film", "mmoe", "task_embedding"]


def grid(folder: Path, seeds: int) -> None:
    """Create 5 structures x 4 task weightings x seeds."""
    axes: dict[str, Sequence[object]] = {
        "network/sharing": STRUCTURES,
        "task_weights": ["uniform", "pcgrad", "dwa", "cagrad"],
        "seed": list(range(seeds)),
    }
    make_sweep(folder, axes)


def search(folder: Path, trials: int) -> None:
    """Create a search in which every trial has another learning rate."""
    make_sweep(folder, {"optimizer.lr": ["1e-4"]})
    text = (folder / "trials" / "0000" / "config.yaml").read_text()
    for number in range(1, trials):
        rate = 1e-5 * 100 ** (number / trials)
        trial = make_trial(folder, number, {"optimizer.lr": "1e-4"}, ["env=minatar_pack"])
        (trial / "config.yaml").write_text(text.replace("lr: 0.0001", f"lr: {rate!r}").replace("/0000", f"/{number:04d}"))
        record = trial / "trial.json"
        record.write_text(record.read_text().replace("optimizer.lr=1e-4", f"optimizer.lr={rate!r}").replace('"1e-4"', f'"{rate!r}"'))


def cpu_seconds() -> float:
    """Return the CPU time of finished child processes, which is independent of the machine's load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print each case."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, make, count in (("grid_100", grid, 5), ("grid_1000", grid, 50), ("search_1000", search, 1000)):
            make(folder / name, count)
            began, worked = time.perf_counter(), cpu_seconds()
            subprocess.run([sys.executable, "-m", "mtrl_cli", "report", str(folder / name)], check=True, stdout=subprocess.DEVNULL)
            page = folder / name / "report" / "index.html"
            times = f"{time.perf_counter() - began:.1f} s ({cpu_seconds() - worked:.1f} s of CPU time)"
            print(f"{name}: {times}, page size {page.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
