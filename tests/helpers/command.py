"""The real `mtrl` command, in a separate process or in this process."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.helpers.warm_process import Crash, WarmProcess, WarmServer

ROOT = Path(__file__).resolve().parents[2]


class Mtrl:
    """The `mtrl` command in a separate process, which inherits only PATH from the caller's environment.

    Args:
        folder: working directory and home of the commands.
        server: forks the process instead of starting the console script, which takes seconds of imports.
        executable: the console script.
    """

    def __init__(self, folder: Path, server: WarmServer | None = None, executable: Path = Path(sys.executable).parent / "mtrl"):
        self.folder = folder
        self.server = server
        self.executable = executable

    def start(self, *arguments: object, crash: Crash | None = None, **environment: str) -> WarmProcess | subprocess.Popen[str]:
        """Start the command, with pipes for stdout and stderr; further keywords are environment variables.

        Args:
            arguments: the command line after `mtrl`.
            crash: call at which the process kills itself; only with a server.
        """
        clean = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LANG": "C.UTF-8", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        clean["MTRL_CORES"] = "1"
        # Each home is new; compiled code is shared between commands.
        clean["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"torchinductor_tests_{os.getuid()}")
        command = [str(self.executable), *map(str, arguments)]
        if self.server is not None:
            return self.server.start(command, self.folder, clean | environment, crash)
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=clean | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *arguments: object, code: int | None = 0, crash: Crash | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end and check its exit code (None: any)."""
        process = self.start(*arguments, crash=crash, **environment)
        stdout, stderr = process.communicate()
        if code is not None:
            assert process.returncode == code, f"mtrl {arguments}: exit code {process.returncode}\n{stdout[-2000:]}\n{stderr[-4000:]}"
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


class MtrlHere:
    """The `mtrl` command in this process: faster, for tests without signals and kills.

    Args:
        folder: working directory of the commands.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the command to its end and check its exit code."""
        from mtrl_cli.cli import main as cli_main

        stdout, stderr = io.StringIO(), io.StringIO()
        words = ["mtrl", *map(str, arguments)]
        before, sys.argv = sys.argv, words
        try:
            streams = contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr)
            with contextlib.chdir(self.folder), streams[0], streams[1], pytest.raises(SystemExit) as ended:
                cli_main.main()
        finally:
            sys.argv = before
        assert ended.value.code == code, f"{words}: exit code {ended.value.code}\n{stdout.getvalue()[-2000:]}\n{stderr.getvalue()[-4000:]}"
        return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())
