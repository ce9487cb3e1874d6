"""What is said at a run's end: where everything is, and the commands to go on with."""

from __future__ import annotations

import shlex
from typing import Any

from mtrl_cli.parallel import torchrun
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.terminal import print_line


def print_next_steps(folder: RunFolder, config: dict[str, Any], command: list[str], ranks: int) -> None:
    """Tell it, on standard output.

    Args:
        folder: of the run.
        config: of the run.
        command: that started it.
        ranks: that trained it.
    """
    quoted, trusted = shlex.quote(str(folder.path)), config["trusted_packages"]
    also = " " + shlex.quote(f"trusted_packages=[{','.join(trusted)}]") if trusted else ""
    print_line(f"run folder   {folder.path}")
    print_line(f"look at it   tensorboard --logdir {quoted}")
    print_line(f"evaluate     mtrl eval {quoted} eval.episodes=10 video=true{also}")
    if command[1:2] == ["transfer"]:  # a study compares runs of one budget
        return
    more = f" steps_per_task={2 * config['steps_per_task']}{also}"
    print_line(f"train on     {resume_command(folder, ranks, more)}")
    if ranks == 1 and (full := _full_run(command)):
        print_line(f"a full run   {full}")


def resume_command(folder: RunFolder, ranks: int, more: str = "") -> str:
    """The command line that goes on with a run."""
    return torchrun.command(ranks, f"resume {shlex.quote(str(folder.path))}{more}")


def _full_run(command: list[str]) -> str | None:
    """The command without what made its run a small one; None if there is nothing to leave out."""
    small = ("experiment=", "steps_per_task=", "run_dir=", "agent.learning_starts=", "eval.", "checkpoint.", "log.", "--")
    kept = [word for word in command if not word.startswith(small)]
    shortened = any(word.startswith(("experiment=", "steps_per_task=")) for word in command)
    return shlex.join(kept) if command[1:2] == ["train"] and shortened else None
