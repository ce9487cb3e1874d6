"""Two ranks started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.command import ROOT

SMALL = [
    "env=classic_pack",
    "env.tasks=[CartPole-v1,MountainCar-v0]",
    "env.num_envs=4",
    "agent.learning_starts=100",
    "agent.batch_size=16",
    "agent.samples_per_step=2",
    "agent/value_scale=popart",
    "task_weights=pcgrad",
    "network.hidden=[16,16]",
    "network.dropout=0.1",
    "resets.every=500",
    "steps_per_task=1600",
    "eval.every=800",
    "eval.episodes=2",
    "eval.max_steps=30",
    "checkpoint.every=200",
    "log.every=200",
    "log.diagnostics=800",
    "device=cpu",
    "replay.capacity=1200",
]


class Torchrun:
    """Two ranks started by torchrun, in separate processes that inherit only PATH.

    Args:
        folder: working directory of the ranks.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen[str]

    def start(self, *words: object, script: str = "") -> subprocess.Popen[str]:
        """Start `mtrl` or a script with these arguments."""
        clean = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        program = [str(ROOT / "tests" / script)] if script else ["-m", "mtrl_cli"]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2", *program, *map(str, words)],
            cwd=self.folder,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def __call__(self, *words: object, script: str = "", code: int = 0, seconds: float = 300.0) -> tuple[str, str]:
        """Run the ranks to their end. Return (stdout, stderr)."""
        self.start(*words, script=script)
        return self.end(code, seconds)

    def end(self, code: int = 0, seconds: float = 300.0) -> tuple[str, str]:
        """Wait for the end; torchrun's exit code is 1 for any exit code of a rank."""
        try:
            output, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in [*self.ranks().values(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            raise
        assert self.process.returncode == code, f"{output[-2000:]}\n{errors[-6000:]}"
        return output, errors

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): int(pid) for each in environment if each.startswith(b"RANK=")}
        return found

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
