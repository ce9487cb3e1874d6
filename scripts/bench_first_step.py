#!/usr/bin/env python3
"""Measure the time of `mtrl train` from the end of its imports to its first step and first update, in fresh processes.

Three modes: eager; compiled with an empty cache, as on a new machine; compiled with the cache of the second mode.

    python scripts/bench_first_step.py [--packs atari_pack classic_pack] [--set KEY=VALUE ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKS = ("atari_pack", "classic_pack")
BARS = {"eager": 3.0, "compiled, first run": 60.0, "compiled, second run": 15.0}
"""Targets: maximum seconds to the first step."""


class _Enough(BaseException):
    """Raised after the first update to end the run."""


def play_until_first_update(overrides: list[str]) -> dict[str, float]:
    """Run `mtrl train` in this process up to its first update.

    Returns:
        seconds from the imports to the `first_step` and to the `first_update`, and seconds spent in starting `emulators`.
    """
    from mtrl_cli.commands import train as train_command
    from mtrl_cli.config import compose
    from mtrl_cli.envs.vector_tasks import VectorTasks
    from mtrl_cli.training.learner import Learner
    from mtrl_cli.training.loop import Loop

    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    ticks, update, open_pack, reset = Loop.ticks, Learner.update, VectorTasks.__init__, VectorTasks.reset

    def timed(start: Callable[..., Any]) -> Callable[..., Any]:
        def starting(*arguments: Any, **options: Any) -> Any:
            since = time.perf_counter()
            result = start(*arguments, **options)
            seconds["emulators"] = seconds.get("emulators", 0.0) + time.perf_counter() - since
            return result

        return starting

    def timed_ticks(self: Loop) -> Iterator[int]:
        for step in ticks(self):
            seconds.setdefault("first_step", time.perf_counter() - begun)
            yield step

    def timed_update(self: Learner, step: int) -> None:
        update(self, step)
        if self.replay.spec.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.replay.spec.device)
        seconds["first_update"] = time.perf_counter() - begun
        raise _Enough

    Loop.ticks, Learner.update = timed_ticks, timed_update  # type: ignore[method-assign]
    VectorTasks.__init__, VectorTasks.reset = timed(open_pack), timed(reset)  # type: ignore[method-assign]
    try:
        train_command.run(compose.compose_training(overrides), command=["mtrl", "train", *overrides])
    except _Enough:
        return seconds
    raise SystemExit("the run ended before its first update")


def in_a_process(overrides: list[str], cache: str) -> dict[str, float]:
    """Run `play_until_first_update` in a separate process with `cache` as the folder of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", *overrides, f"run_dir={folder}/run"]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache) / "triton")}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(overrides)} failed")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(pack: str, settings: list[str]) -> dict[str, dict[str, float]]:
    """Return the seconds to the first step and the first update of a pack, by mode."""
    # Learning starts immediately, so that the measurement excludes the collection of experience.
    overrides = [f"env={pack}", "agent.learning_starts=0", *settings]
    with tempfile.TemporaryDirectory() as cache:
        ways = (("eager", "compile=false"), ("compiled, first run", "compile=true"), ("compiled, second run", "compile=true"))
        found = {}
        for way, compile_or_not in ways:
            print(f"{pack}, {way} …", file=sys.stderr)
            found[way] = in_a_process([*overrides, compile_or_not], cache)
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format the results with their targets."""
    lines = [f"{'seconds after imports to':<40}{'first step':>12}{'emulators':>17}{'first update':>14}{'target (step)':>14}"]
    for pack, ways in results.items():
        for way, found in ways.items():
            met = "met" if found["first_step"] <= BARS[way] else "MISSED"
            cells = f"{found['first_step']:>12.1f}{found['emulators']:>17.1f}{found['first_update']:>14.1f}{BARS[way]:>14g}"
            lines.append(f"{pack + ', ' + way:<40}{cells} {met}")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(play_until_first_update(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", nargs="+", default=list(PACKS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    results = {pack: measure(pack, options.set) for pack in options.packs}
    print(json.dumps(results) if options.json else table(results))


if __name__ == "__main__":
    main()
