"""Run trials on a Ray cluster. Each trial is an actor whose child process is the worker."""

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

from mtrl_cli.errors import RunError, UserError, first_line
from mtrl_cli.launchers.base import OUTPUT, End, Job, Launcher, worker_command
from mtrl_cli.launchers.worker import share_variables, start_worker
from mtrl_cli.machine import extras
from mtrl_cli.types import NonNegativeFloat, PositiveFloat, PositiveInt

CONNECT_SECONDS = 10.0
AUTH_MODE = "RAY_AUTH_MODE"
STORE_BYTES = 2**27  # object store of a local cluster, which contains only exit codes
WAIT_SECONDS = 0.1


class Host:
    """The actor of a job. Ray creates the actor in a separate process on a machine of the cluster with free resources.

    The actor has two threads, so that `stop` can run during `work`.
    """

    def __init__(self) -> None:
        self._is_stopped = threading.Event()

    def work(self, command: list[str], output: str, cores: int, memory: int | None, gpus: float, environment: dict[str, str]) -> int:
        """Run a worker and return its exit code as `subprocess` does: the negative signal number if it was killed."""
        if self._is_stopped.is_set():
            return -signal.SIGTERM
        worker = start_worker(command, output, environment | share_variables(cores, memory, gpus), new_session=True)
        while not self._is_stopped.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return worker.wait(WAIT_SECONDS)
        worker.terminate()
        return worker.wait()

    def stop(self) -> None:
        """Send SIGTERM to the worker, which saves and exits."""
        self._is_stopped.set()


class RayJob(Job):
    """A job in an actor.

    Args:
        ray: the package.
        actor: a handle to a `Host`.
        arguments: arguments of `Host.work`.
    """

    def __init__(self, ray: Any, actor: Any, *arguments: Any):
        self._ray = ray
        self._actor = actor
        self._end: End | None = None
        self._is_there = actor.__ray_ready__.remote()
        self._code = actor.work.remote(*arguments)

    def poll(self) -> End | None:
        """See `Job.poll`."""
        if self._end is None and self._is_ready(self._code):
            self._end = self._find_end()
            self._actor = None  # ends the actor's process and frees its resources
        return self._end

    def _find_end(self) -> End:
        try:
            code = self._ray.get(self._code)
        except self._ray.exceptions.RayTaskError as error:
            return End(None, f"the worker could not be started: {first_line(error.cause or error)}")
        except self._ray.exceptions.OutOfMemoryError:
            return End(None, "killed by Ray because its machine was out of memory; see launcher.memory_gb")
        except self._ray.exceptions.RayError:
            return End(None, "Ray lost its machine or its process")
        return End.of(code)

    def _is_ready(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])

    def is_waiting(self) -> bool:
        """See `Job.is_waiting`."""
        return self._end is None and not self._is_ready(self._is_there)

    def stop(self) -> None:
        """See `Job.stop`."""
        if self.is_waiting():
            self._ray.kill(self._actor)
        elif self._end is None:
            self._actor.stop.remote()


class RayLauncher(Launcher):
    """A Ray cluster. Jobs end with this process.

    Args:
        address: address of a cluster; None starts a local cluster that ends with this process.
        jobs: number of concurrent runs, at most; fewer if the cluster has too few free resources.
        cpus: cores per run.
        gpus: GPUs per run; several runs share a GPU if less than one.
        memory_gb: memory per run in GB; None for the same fraction of the machine's memory as of its cores.

    Raises:
        UserError: Ray is not installed, the cluster is unreachable, or a local cluster has too few resources for a single run.
    """

    def __init__(
        self, *, address: str | None, jobs: PositiveInt, cpus: PositiveInt, gpus: NonNegativeFloat, memory_gb: PositiveFloat | None
    ):
        extras.require("launcher=ray", "ray", "ray")
        if gpus > 1 and gpus != int(gpus):
            raise UserError(f"launcher.gpus must be a whole number or less than 1, got {gpus:g}")
        # Ray reads this variable on import.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # Ray sets this variable for a local cluster, which requires a token. Other clusters that this process or a child joins may not.
        self._auth_mode = os.environ.get(AUTH_MODE)
        self._ray: Any = importlib.import_module("ray")
        logging.getLogger("ray").setLevel(logging.ERROR)
        self.jobs = jobs
        self._memory = None if memory_gb is None else int(memory_gb * 2**30)
        self._share = cpus, self._memory, gpus
        self._needs = {"num_cpus": cpus, "num_gpus": gpus, "memory": self._memory}
        self._connect(address)
        if address is None:
            self._check_room(cpus, gpus)

    def _connect(self, address: str | None) -> None:
        options: dict[str, Any] = {}
        if address is None:
            options = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        else:
            _check_reachable(address)
        with _signal_handlers_kept():
            try:
                self._ray.init(address or "local", configure_logging=False, log_to_driver=False, **options)
            except Exception as error:  # ConnectionError, RuntimeError, RPC errors
                raise UserError(f"launcher.address={address}: Ray cannot connect: {first_line(error)}") from error

    def _check_room(self, cpus: int, gpus: float) -> None:
        found, memory = self._ray.cluster_resources(), self._memory or 0
        for key, amount, name, unit in (("cpus", cpus, "CPU", 1), ("gpus", gpus, "GPU", 1), ("memory_gb", memory, "memory", 2**30)):
            if amount > found.get(name, 0):
                self.close()
                raise UserError(f"launcher.{key}={amount / unit:g} exceeds the {found.get(name, 0) / unit:.3g} of this machine")

    def start(self, run: Path) -> Job:
        """See `Launcher.start`."""
        environment = {name: value for name, value in os.environ.items() if name.startswith("MTRL_")}
        try:
            # No restarts by Ray: the sweep itself retries lost trials.
            actor = self._ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2, **self._needs)(Host).remote()
            return RayJob(self._ray, actor, worker_command(run), str(run / OUTPUT), *self._share, environment)
        except self._ray.exceptions.RayError as error:
            raise RunError(f"{run}: Ray refused the job: {first_line(error)}") from error

    def close(self) -> None:
        """See `Launcher.close`."""
        with _signal_handlers_kept():
            self._ray.shutdown()
        if self._auth_mode is None:
            os.environ.pop(AUTH_MODE, None)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the signal handlers that Ray replaces. With Ray's handlers, SIGTERM would end the sweep before its workers save."""
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
    """Raise UserError if nothing listens at `address`. Ray itself would retry for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # auto, or an address without a port
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"launcher.address={address} is unreachable: {getattr(error, 'strerror', None) or error}; `ray start --head` prints the address"
            " of a cluster, and launcher.address=null uses this machine"
        ) from error
