"""In a job on a cluster's machine: the process that works on the run, and what it has of that machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from mtrl_cli.machine import hardware, parent_watchdog


def begin(words: list[str], output: str, shared: Mapping[str, str], *, own_session: bool) -> subprocess.Popen[bytes]:
    """Start a worker. It saves and ends if this process dies.

    Args:
        words: its command line.
        output: the file that its printing is added to.
        shared: variables that its environment has besides ours.
        own_session: whether signals that reach this process's group pass it by.

    Raises:
        OSError: it cannot be started.
    """
    read, _ = os.pipe()  # the other end stays open until this process ends
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(handle, "ab") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | dict(shared) | {parent_watchdog.VARIABLE: str(read)},
            pass_fds=[read],
            start_new_session=own_session,
        )
    os.close(read)
    return process


def share(cores: int, memory: int | None, gpus: float = 1.0) -> dict[str, str]:
    """The environment of a worker that was given a part of this machine, whether or not the cluster confines it to that.

    Args:
        cores: its own.
        memory: bytes; None: as much of the machine's as it has of the cores.
        gpus: its own; with 0 it sees none, and less than one is shared with others.
    """
    cores = max(1, min(cores, hardware.cores()))
    memory = memory or hardware.memory_total() * cores // hardware.cores()
    shared = {"MTRL_CORES": str(cores), "MTRL_MEMORY": str(memory)}
    if gpus == 0:
        shared["CUDA_VISIBLE_DEVICES"] = ""
    elif gpus < 1:
        shared["MTRL_RUNS_PER_GPU"] = str(int(1 / gpus + 1e-9))  # so many have room on it
    return shared
