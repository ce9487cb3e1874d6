"""Commands in processes that need not import torch: a server has imported everything and forks a child per command.

Starting `mtrl` takes seconds of imports, and a test of signals and kills starts it many times. A forked child is a separate process:
it can be killed, and shares nothing with the test. `crash` kills it with SIGKILL at a chosen call of a function, so that a test can
reach every moment of a run without waiting for a random one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

IMPORTS = (  # where they are installed
    "ale_py",
    "gymnasium.envs.classic_control",
    "mtrl_cli.cli.main",
    "mtrl_cli.commands.bench",
    "mtrl_cli.commands.eval",
    "mtrl_cli.commands.train",
    "mtrl_cli.config.compose",
    "mtrl_cli.sweeps.command",
    "optuna.samplers",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True)
class Crash:
    """SIGKILL at a call of a function.

    Args:
        target: the function, as `package.module:Class.method`.
        call: the number of the call, from 1.
        after: kill after the call instead of before it.
    """

    target: str
    call: int = 1
    after: bool = False

    def install(self) -> None:
        """Replace the function in this process."""
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function, calls = getattr(owner, name), [0]

        @functools.wraps(function)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.call and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **keywords)
            if calls[0] == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapper)


class WarmProcess:
    """A running command, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, arguments: list[str], connection: socket.socket, stdout: int, stderr: int):
        self.args = arguments
        self.returncode: int | None = None
        self.stdout = os.fdopen(stdout, encoding="utf-8")
        self.stderr = os.fdopen(stderr, encoding="utf-8")
        self._connection = connection
        self.pid = self._reported()

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code: -n for a process killed by signal n."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = self._reported()
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def _reported(self) -> int:
        """Receive the process number, then the exit code."""
        return struct.unpack("i", self._connection.recv(4))[0]

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both pipes to their end and wait."""
        read: dict[str, str] = {}
        pipes = {"stdout": self.stdout, "stderr": self.stderr}
        readers = [threading.Thread(target=lambda name=name: read.update({name: pipes[name].read()}), daemon=True) for name in pipes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        for pipe in pipes.values():
            pipe.close()
        self.wait(timeout)
        return read["stdout"], read["stderr"]


class WarmServer:
    """The server's process. It ends when this object is closed, or when the test process dies.

    Args:
        root: the checkout.
    """

    def __init__(self, root: Path):
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "tests.helpers.warm_process", str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(self, arguments: list[str], folder: Path, environment: dict[str, str], crash: Crash | None = None) -> WarmProcess:
        """Start a command line in a folder, with exactly this environment."""
        request = {"arguments": arguments, "folder": str(folder), "environment": environment, "crash": crash and asdict(crash)}
        mine, theirs = socket.socketpair()
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        socket.send_fds(self._connection, [json.dumps(request).encode()], [theirs.fileno(), their_out, their_err])
        theirs.close()
        os.close(their_out)
        os.close(their_err)
        return WarmProcess(arguments, mine, out, err)

    def close(self) -> None:
        """End the server; running commands continue."""
        self._connection.close()
        self._process.wait()


def serve(connection: socket.socket) -> list[str]:
    """Fork a child for each request. Returns in a child, with its command line."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _become(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(request: dict[str, Any], report: int, stdout: int, stderr: int) -> list[str]:
    """Fork the process of the command. The process in between reports the number and exit code of the command to the server."""
    child = os.fork()
    if child:
        os.close(stdout)
        os.close(stderr)
        os.write(report, struct.pack("i", child))
        status = os.waitpid(child, 0)[1]
        try:
            os.write(report, struct.pack("i", os.waitstatus_to_exitcode(status)))
        finally:
            os._exit(0)
    os.close(report)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if request["crash"] is not None:
        Crash(**request["crash"]).install()
    return list(request["arguments"])


if __name__ == "__main__":
    for name in IMPORTS:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    from mtrl_cli.cli.main import main

    main()
