"""The commands that a finished run suggests."""

from __future__ import annotations

import shlex
from typing import Any

from mtrl_cli.config import compose
from mtrl_cli.parallel import torchrun
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.terminal import print_line


def print_next_steps(folder: RunFolder, config: dict[str, Any], command: list[str], ranks: int) -> None:
    """Print the run folder and the commands to view, evaluate and continue the run.

    Args:
        command: the command line that started the run.
        ranks: the number of ranks that trained it.
    """
    quoted, trusted = shlex.quote(str(folder.path)), compose.trusting(config["trusted_packages"])
    also = f" {shlex.join(trusted)}" if trusted else ""
    print_line(f"run folder   {folder.path}")
    print_line(f"curves       tensorboard --logdir {quoted}")
    print_line(f"evaluate     mtrl eval {quoted} eval.episodes=10 video=true{also}")
    more = f" steps_per_task={2 * config['steps_per_task']}{also}"
    print_line(f"continue     {resume_command(folder, ranks, more)}")
    if ranks == 1 and (full := _full_run(command)):
        print_line(f"full run     {full}")


def resume_command(folder: RunFolder, ranks: int, more: str = "") -> str:
    """Return the command line that resumes a run."""
    return torchrun.command(ranks, f"resume {shlex.quote(str(folder.path))}{more}")


def _full_run(command: list[str]) -> str | None:
    """Return the command without the overrides that shorten the run, or None if the command has no such override."""
    small = ("experiment=", "steps_per_task=", "run_dir=", "agent.learning_starts=", "eval.", "checkpoint.", "log.", "--")
    kept = [word for word in command if not word.startswith(small)]
    shortened = any(word.startswith(("experiment=", "steps_per_task=")) for word in command)
    return shlex.join(kept) if command[1:2] == ["train"] and shortened else None
