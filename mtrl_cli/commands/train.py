"""`mtrl train` and `mtrl resume`: build a run, then train it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from mtrl_cli.build import resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.checkpoints.store import CheckpointStore, NoCheckpoint
from mtrl_cli.commands import warm_start
from mtrl_cli.commands.next_steps import resume_command
from mtrl_cli.commands.trainer import Trainer
from mtrl_cli.config import compose
from mtrl_cli.errors import UserError
from mtrl_cli.parallel import distributed, torchrun
from mtrl_cli.parallel.distributed import Ranks
from mtrl_cli.runs.run_dir import ReadOnlyRunFolder, RunFolder
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.training.loop import Loop

# Keys whose differences between the command and the resumed run are not reported.
_NOT_COMPARED = ("run_dir", "device", "trusted_packages", "ranks")


def run(config: dict[str, Any], *, command: list[str], or_resume: bool = False) -> None:
    """Train a new run.

    Args:
        config: the validated configuration.
        command: the command line, recorded in run.json.
        or_resume: whether to resume the run in `run_dir` if there is one.

    Raises:
        UserError: invalid input; nothing was created.
        RunError: the run failed.
        Stopped: stopped by a signal, after saving.
    """
    run_dir = config["run_dir"]
    if or_resume and run_dir is None:
        raise UserError("--or-resume needs run_dir=PATH, the run to resume")
    with distributed.meet(torchrun.place()) as ranks:
        if or_resume and ranks.from_first(RunFolder.is_run(Path(run_dir))):
            _resume_with_config(Path(run_dir), config, command, ranks)
            return
        with StopRequest() as stop:
            with stop.interruptible():
                with ranks.together():
                    if run_dir is not None and ranks.is_first:
                        RunFolder.check_new(Path(run_dir))
                    if config["init_from"] is not None and ranks.is_first:
                        warm_start.find_source(config)  # fail before the slow construction
                config, parts, loop = _build(config, ranks)
                config = _warm_start(config, parts, ranks)
                loop.reset()
                folder = _create_folder(config, parts, ranks)
            with folder:
                folder.write("config.yaml", compose.dump(config | {"run_dir": str(folder.path)}))
                store = build_run.make_store(config, folder.checkpoints, ranks)
                Trainer(folder, config, parts, loop, store, stop, command, ranks).work()


def _warm_start(config: dict[str, Any], run: build_run.Run, ranks: Ranks) -> dict[str, Any]:
    """Load the checkpoint of `init_from` into a new run. Returns the configuration with the exact checkpoint in `init_from`."""
    if config["init_from"] is None:
        return config
    with ranks.together():
        source = warm_start.read_source(config, ranks) if ranks.is_first else None
    path = ranks.from_first(str(source.path) if source else None)
    config = config | {"init_from": path}
    with ranks.together():
        source = source or warm_start.read_source(config, ranks)
        warm_start.initialise(config, run, source, ranks)
        if config["transfer"]["replay"]:
            warm_start.load_replay(config, run, source, ranks)
    return config


def _create_folder(config: dict[str, Any], run: build_run.Run, ranks: Ranks) -> RunFolder:
    folder: RunFolder | None = None
    with ranks.together():
        if ranks.is_first:
            run_dir, seed = config["run_dir"], config["seed"]
            folder = RunFolder.create(Path(run_dir)) if run_dir else RunFolder.create_default(run.pack.name, seed)
    path = ranks.from_first(str(folder.path) if folder else None)
    return folder or ReadOnlyRunFolder(Path(path))


def resume(run_path: Path, overrides: list[str], *, command: list[str]) -> None:
    """Resume a run from its latest undamaged checkpoint, or from the beginning if it has none.

    Args:
        run_path: the run folder.
        overrides: `steps_per_task`, `device` and `trusted_packages` only.
        command: the command line, recorded in run.json.

    Raises:
        UserError: not a run, or the overrides are not allowed.
        RunError: the run failed.
        Stopped: stopped by a signal, after saving.
    """
    with distributed.meet(torchrun.place()) as ranks:
        _resume(run_path, overrides, command, ranks)


def _resume(run_path: Path, overrides: list[str], command: list[str], ranks: Ranks) -> None:
    folder, which = RunFolder.open(run_path)
    if which is not None:
        raise UserError(f"{run_path} is a checkpoint, not a run. Use mtrl resume {shlex.quote(str(folder.path))}")
    config = compose.load_run(folder.path, overrides) | {"run_dir": str(folder.path)}
    if config["ranks"] != ranks.size:
        correct = resume_command(folder, config["ranks"])
        raise UserError(f"{folder.path} was started with {config['ranks']} ranks, got {ranks.size}. Use {correct}")
    if not ranks.is_first:
        folder = ReadOnlyRunFolder(folder.path)
    with ranks.together():
        folder.lock()
    with folder, StopRequest() as stop:
        with stop.interruptible():  # nothing on disk changes before training starts
            store = build_run.make_store(config, folder.checkpoints, ranks)
            step, state = _load_latest(folder, store, ranks)
            if state is not None and (completed := _completion(folder, step, config["steps_per_task"])):
                more = resume_command(folder, ranks.size, f" steps_per_task={2 * max(step, config['steps_per_task'])}")
                early = f" Early stopping restarts with {config['early_stopping']['patience']} evaluations." if "early" in completed else ""
                print_line(f"{folder.path} is completed ({completed}). To continue training: {more}{early}")
                return
            config, parts, loop = _build(config, ranks)
            training = Trainer(folder, config, parts, loop, store, stop, command, ranks)
            if state is None:
                config = _warm_start(config, parts, ranks)
                loop.reset()
            else:
                with ranks.together():
                    training.restore(step, state)
        folder.write("config.yaml", compose.dump(config))
        training.work()


def _completion(folder: RunFolder, step: int, budget: int) -> str | None:
    """Describe how the run with its latest checkpoint at `step` was completed; None if it was not, or if its budget was raised."""
    record = folder.read_record()
    if record.get("status") != "completed":
        return None
    if step >= budget:
        return f"{step:,} steps per task"
    early = record.get("stopped_early")
    if not isinstance(early, dict) or early.get("step") != step or early.get("steps_per_task") != budget:
        return None
    return f"stopped early at step {step:,} of {budget:,}, see {folder.record}"


def _load_latest(folder: RunFolder, store: CheckpointStore, ranks: Ranks) -> tuple[int, dict[str, Any] | None]:
    """Load the newest undamaged checkpoint, the same on all ranks. Returns (step, state), or (0, None) if there is none."""
    step, state = 0, None
    with ranks.together():
        if ranks.is_first:
            store.recover()
            try:
                step, state = store.load("latest", warn=print_line)
            except NoCheckpoint:
                completed = folder.read_record().get("status") == "completed"
                reason = "is completed, but its checkpoints are missing" if completed else "has no checkpoint"
                print_line(f"{folder.path} {reason}: starting from the beginning")
    found = ranks.from_first(None if state is None else step)
    with ranks.together():
        if found is not None and not ranks.is_first:
            step, state = store.load(found)
    return step, state


def _resume_with_config(run_path: Path, requested: dict[str, Any], command: list[str], ranks: Ranks) -> None:
    """Resume an existing run (`--or-resume`) with its own configuration and the changes in `requested` that a resume allows."""
    trusted = compose.trusting(requested["trusted_packages"])
    own = dict(compose.flat(compose.load_run(run_path, trusted)))
    free = {*_NOT_COMPARED, *resolve_auto.scaled_keys(requested)}  # auto values scale with the budget
    wanted = {key: value for key, value in compose.flat(requested) if value not in ("auto", None) and key not in free}
    if requested["init_from"] and own["init_from"] and warm_start.may_resolve_to(Path(requested["init_from"]), Path(own["init_from"])):
        wanted["init_from"] = own["init_from"]
    overrides = [*trusted]
    if requested["steps_per_task"] > own["steps_per_task"]:
        overrides.append(f"steps_per_task={requested['steps_per_task']}")
    if requested["device"] not in ("auto", own["device"]):
        overrides.append(f"device={requested['device']}")
    given = {override.partition("=")[0] for override in overrides}
    different = [key for key, value in wanted.items() if own.get(key) != value and key not in given]
    if different:
        print_line(f"resuming {run_path} with its own configuration; ignored from this command: {', '.join(different)}")
    _resume(run_path, overrides, command, ranks)


def _build(config: dict[str, Any], ranks: Ranks) -> tuple[dict[str, Any], build_run.Run, Loop]:
    """Resolve `auto` values, print a summary of the run and its memory use, and build the run."""
    with ranks.together():
        pack = build_run.make_pack(config)
        if ranks.is_first:
            config = resolve_auto.resolve(config, pack, print_line, ranks)
            for line in resolve_auto.describe(config, pack):
                print_line(line)
    config = ranks.from_first(config)
    ranks.use(build_run.device_of(config, ranks))
    with ranks.together():
        run = build_run.make_run(config, pack, print_line, ranks)
        loop = run.open_loop()
    return config, run, loop
