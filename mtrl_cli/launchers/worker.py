"""Start a worker process, and limit the worker to its share of the machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from mtrl_cli.machine import hardware, parent_watchdog


def start_worker(
    command: list[str], output: str, environment: Mapping[str, str], *, new_session: bool, pipe: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a worker that saves and exits if this process dies.

    Args:
        output: file to which stdout and stderr are appended.
        environment: variables in addition to those of this process.
        new_session: whether to shield the worker from signals to the process group, such as Ctrl-C in a terminal.
        pipe: read end of a pipe whose write end this process holds; None creates one for this worker.

    Raises:
        OSError: the worker cannot be started.
    """
    read = os.pipe()[0] if pipe is None else pipe  # the write end stays open until this process ends
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(handle, "ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(os.environ) | dict(environment) | {parent_watchdog.VARIABLE: str(read)},
                pass_fds=[read],
                start_new_session=new_session,
            )
    finally:
        if pipe is None:
            os.close(read)


def share_variables(cores: int, memory: int | None, gpus: float = 1.0) -> dict[str, str]:
    """Return the environment variables that limit a worker to a share of the machine, even if the cluster does not enforce it.

    Args:
        cores: number of cores.
        memory: bytes; None for the same fraction of the memory as of the cores.
        gpus: number of GPUs; 0 hides all GPUs, and a fraction shares one GPU.
    """
    cores = max(1, min(cores, hardware.cores()))
    memory = memory or hardware.memory_total() * cores // hardware.cores()
    variables = {"MTRL_CORES": str(cores), "MTRL_MEMORY": str(memory)}
    if gpus == 0:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif gpus < 1:
        variables["MTRL_RUNS_PER_GPU"] = str(int(1 / gpus + 1e-9))
    return variables
