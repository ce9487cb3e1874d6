"""Runs on a Ray cluster: each is an actor that has the run's worker as its child."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtrl_cli.errors import RunError, UserError
from mtrl_cli.launchers import remote
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher, command
from mtrl_cli.machine import extras
from mtrl_cli.types import NonNegativeFloat, PositiveFloat, PositiveInt

CONNECT_SECONDS = 10.0
AUTH_MODE = "RAY_AUTH_MODE"
STORE_BYTES = 2**27  # the object store of a local cluster, through which next to nothing goes
WAIT_SECONDS = 0.1


class Host:
    """The actor: in a process of its own on one of the cluster's machines. It is made once that machine has room for the run.

    `stop` is answered while `work` is at work: it has two threads.
    """

    def __init__(self) -> None:
        self._is_stopped = threading.Event()

    def work(self, words: list[str], output: str, cores: int, memory: int | None, gpus: float, environment: dict[str, str]) -> int:
        """Have a worker's command line run to its end; its exit code, or minus the number of the signal that killed it."""
        if self._is_stopped.is_set():
            return -signal.SIGTERM
        worker = remote.begin(words, output, environment | remote.share(cores, memory, gpus), own_session=True)
        while not self._is_stopped.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return worker.wait(WAIT_SECONDS)
        worker.terminate()
        return worker.wait()

    def stop(self) -> None:
        """Ask the worker to save and end."""
        self._is_stopped.set()


class RayJob(Job):
    """One run's actor.

    Args:
        ray: the package.
        actor: of the class `Host`.
        arguments: of its `work`.
    """

    def __init__(self, ray: Any, actor: Any, *arguments: Any):
        self._ray, self._actor, self._end = ray, actor, End(None)
        self._is_over = False
        self._is_there = actor.__ray_ready__.remote()
        self._code = actor.work.remote(*arguments)

    def poll(self) -> End | None:
        """See the base class."""
        if not self._is_over:
            if not self._is_ready(self._code):
                return None
            self._is_over, self._end = True, self._find_end()
            self._actor = None  # its process ends, and its machine has room again
        return self._end

    def _find_end(self) -> End:
        try:
            code = self._ray.get(self._code)
        except self._ray.exceptions.RayTaskError as error:
            return End(None, f"its worker could not be started: {_first_line(error.cause or error)}")
        except self._ray.exceptions.OutOfMemoryError:
            return End(None, "its machine was out of memory, and Ray ended it (launcher.memory_gb)")
        except self._ray.exceptions.RayError:
            return End(None, "Ray lost the machine or the process that it ran in")
        return End(code) if code >= 0 else End(None, f"killed by signal {-code}")

    def _is_ready(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])

    def is_waiting(self) -> bool:
        """See the base class."""
        return not self._is_over and not self._is_ready(self._is_there)

    def stop(self) -> None:
        """See the base class."""
        if self._is_over:
            return
        if self.is_waiting():
            self._ray.kill(self._actor)
        else:
            self._actor.stop.remote()


class RayLauncher(Launcher):
    """Runs on a Ray cluster. They end with this process; of one whose machine is lost it is told that it died.

    Args:
        address: of a cluster; None: one of this machine alone, which is started, and ends with this process.
        jobs: at a time, as far as the cluster has room.
        cpus: cores of each.
        gpus: GPUs of each; less than one is shared with others.
        memory_gb: memory of each, GB; None: as much of its machine's as it has of the cores.

    Raises:
        UserError: Ray is missing, or there is no such cluster, or a local one has no room for a single run.
    """

    def __init__(
        self, *, address: str | None, jobs: PositiveInt, cpus: PositiveInt, gpus: NonNegativeFloat, memory_gb: PositiveFloat | None
    ):
        extras.require("launcher=ray", "ray", "ray")
        if gpus > 1 and gpus != int(gpus):
            raise UserError(f"launcher.gpus={gpus:g}: expected a whole number, or less than one")
        # Before Ray is imported, which reads it then.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # A local cluster asks for a token, and Ray says so in the environment: others that we or our children join need not.
        self._auth_mode = os.environ.get(AUTH_MODE)
        self._ray: Any = importlib.import_module("ray")
        logging.getLogger("ray").setLevel(logging.ERROR)
        self.jobs = jobs
        self._memory = None if memory_gb is None else int(memory_gb * 2**30)
        self._share = cpus, self._memory, gpus
        self._needs = {"num_cpus": cpus, "num_gpus": gpus, "memory": self._memory}
        self._connect(address)
        if address is None:
            self._check_room({"CPU": cpus, "GPU": gpus, "memory": self._memory or 0})

    def _connect(self, address: str | None) -> None:
        with _handlers_kept():
            try:
                if address is None:
                    quiet = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
                    self._ray.init("local", configure_logging=False, log_to_driver=False, **quiet)
                else:
                    _check_reachable(address)
                    self._ray.init(address, configure_logging=False, log_to_driver=False)
            except UserError:
                raise
            except Exception as error:  # ConnectionError, RuntimeError, RPC errors of its own
                raise UserError(f"launcher.address={address}: Ray says: {_first_line(error)}") from error

    def _check_room(self, needs: dict[str, float]) -> None:
        there = self._ray.cluster_resources()
        for name, amount in needs.items():
            if amount > there.get(name, 0):
                self.close()
                key = {"CPU": "cpus", "GPU": "gpus", "memory": "memory_gb"}[name]
                unit = 2**30 if name == "memory" else 1
                raise UserError(
                    f"launcher.{key}={amount / unit:g}: a run could never begin, as this machine has {there.get(name, 0) / unit:.3g}"
                )

    def start(self, run: Path) -> Job:
        """See the base class."""
        environment = {name: value for name, value in os.environ.items() if name.startswith("MTRL_")}
        try:
            # Not even an actor that never began is moved elsewhere: the sweep itself sees to what was lost.
            actor = self._ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2, **self._needs)(Host).remote()
            return RayJob(self._ray, actor, command(run), str(run / OUTPUT), *self._share, environment)
        except self._ray.exceptions.RayError as error:
            raise RunError(f"{run}: Ray does not take it: {_first_line(error)}") from error

    def close(self) -> None:
        """See the base class."""
        with _handlers_kept():
            self._ray.shutdown()
        if self._auth_mode is None:
            os.environ.pop(AUTH_MODE, None)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray has a driver end at once on SIGTERM; here, that asks the workers to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _check_reachable(address: str) -> None:
    """Raises UserError where nothing listens: Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # auto, or another way to name one
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"launcher.address={address}: nothing answers there ({why}); `ray start --head` tells a cluster's address,"
            " and launcher.address=null is this machine alone"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
