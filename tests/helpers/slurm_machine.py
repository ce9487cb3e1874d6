"""A Slurm cluster on this machine in its own folder: munged, slurmctld and slurmd, which end with the test process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

# No cgroups, core binding or accounting, so that root in a container can run it. With a short cred_expire a requeued job restarts after
# a few seconds instead of two minutes; values below five seconds have no effect.
CONFIGURATION = """
ClusterName=mtrl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = ("munged", "slurmctld", "slurmd")
SECONDS = 30.0


def missing() -> str | None:
    """Return the reason why no cluster can be started on this machine, or None."""
    absent = [name for name in (*DAEMONS, "sbatch", "squeue", "scancel", "scontrol", "srun") if shutil.which(name, path=_path()) is None]
    if absent:
        return f"there is no {absent[0]} (Debian's packages slurm-wlm and munge)"
    return None if os.getuid() == 0 else "only root can start Slurm's daemons"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in opened]


@contextlib.contextmanager
def started(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster in `folder` with two cores, and yield the environment variables for Slurm commands."""
    for path in (folder / "state", folder / "spool"):
        path.mkdir(parents=True)
    for path in (folder, *folder.parents):  # munged refuses a socket that other users cannot reach
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    host, (controller_port, node_port) = socket.gethostname().split(".")[0], _free_ports(2)
    text = CONFIGURATION.format(host=host, folder=folder, controller_port=controller_port, node_port=node_port)
    (folder / "slurm.conf").write_text(text)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    files = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munged.seed",
    }
    munged = ["munged", "--foreground", *(f"--{option}={folder / name}" for option, name in files.items())]
    with contextlib.ExitStack() as daemons:
        daemons.enter_context(_daemon(munged, folder, environment))
        _wait_for((folder / "munge.socket").exists, folder)
        daemons.enter_context(_daemon(["slurmctld", "-D", "-c"], folder, environment))
        daemons.enter_context(_daemon(["slurmd", "-D", "-c"], folder, environment))
        _wait_for(lambda: "idle" in _output(["sinfo", "--noheader", "--format=%T"], environment), folder)
        yield environment
        _output(["scancel", "--user=root", "--full", "--signal=KILL"], environment)
        with contextlib.suppress(AssertionError):  # remaining processes are killed with slurmd's children below
            _wait_for(lambda: "comp" not in _output(["squeue", "--noheader", "--format=%T"], environment).lower(), folder)


@contextlib.contextmanager
def _daemon(words: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with (folder / f"{words[0]}.out").open("w") as output:
        process = subprocess.Popen(
            words, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=_die_with_parent
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _output(words: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False).stdout


def _wait_for(condition: object, folder: Path) -> None:
    assert callable(condition)
    end = time.monotonic() + SECONDS
    while not condition():
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.out")))
        assert time.monotonic() < end, f"Slurm has not started\n{logs}"
        time.sleep(0.05)
