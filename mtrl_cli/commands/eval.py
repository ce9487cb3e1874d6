"""`mtrl eval`: evaluate a checkpoint of a run on complete episodes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mtrl_cli.build import network as build_network
from mtrl_cli.build import run as build_run
from mtrl_cli.checkpoints.store import CheckpointStore, parse_which
from mtrl_cli.config import compose
from mtrl_cli.envs.pack import Pack
from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic
from mtrl_cli.parallel import torchrun
from mtrl_cli.runs import video
from mtrl_cli.runs.progress import evaluation_table
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.runs.terminal import console
from mtrl_cli.training import evaluator


def run(run_path: Path, options: dict[str, Any]) -> None:
    """Evaluate a checkpoint, write `eval/<step>.json` and print the scores.

    Args:
        run_path: the run folder, or one of its checkpoints.
        options: `checkpoint`, `video`, `device`, `trusted_packages` and `eval`; None selects the run's value.

    Raises:
        UserError: the run or the checkpoint does not exist.
        Stopped: stopped by a signal; nothing was written.
    """
    if torchrun.place().size > 1:
        raise UserError("mtrl eval runs in a single process. Start mtrl eval without torchrun")
    folder, named = RunFolder.open(run_path)
    config = compose.load(folder.config, trusted=options["trusted_packages"])
    validation_seed = config["eval"]["seed"]
    config["eval"] = config["eval"] | {key: value for key, value in options["eval"].items() if value is not None}
    config = build_run.for_evaluation(config, options["device"])
    with StopRequest() as stop, stop.interruptible():
        which = parse_which(options["checkpoint"] if named is None else named)
        step, state = CheckpointStore(folder.checkpoints, keep=1, with_replay=False).load(which)
        pack, network, player = build_run.make_evaluation(config)
        if options["video"]:
            video.require()
            for index in range(len(pack.tasks)):
                next(iter(pack.render(index, 0, [])))  # fail before hours of evaluation
        build_run.check_tasks(state.get("tasks"), pack, folder.path)
        build_network.load_weights(network, state, f"checkpoint {step} of {folder.path}")
        episodes = player.run(network, stop.check)
        split = "validation" if player.seed == validation_seed else "test"
        summary = evaluator.summarise(episodes, pack, step, str(step), split=split, seed=player.seed)
        previous = _previous(folder, step)
        try:
            folder.write(f"eval/{step}.json", atomic.to_json(summary))
            if options["video"]:
                _write_videos(folder, pack, episodes)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{folder.path} is not writable: {error.strerror}") from error
    console(sys.stdout).print(evaluation_table(summary, player.max_steps))
    if previous and (previous["episodes"] > summary["episodes"] or previous["split"] != split):
        print(f"replaced a {previous['split']} evaluation of {previous['episodes']} episodes per task")
    print(f"written to {folder.evaluations / f'{step}.json'}" + (f" and {folder.videos}/" if options["video"] else ""))


def _previous(folder: RunFolder, step: int) -> dict[str, Any] | None:
    """Return episodes and split of an existing evaluation of the checkpoint, or None."""
    try:
        found = atomic.read_json(folder.evaluations / f"{step}.json", folder.path)
    except UserError:
        return None
    episodes, split = found.get("episodes"), "test" if found.get("split") == "test" else "validation"
    return {"episodes": episodes, "split": split} if isinstance(episodes, int) else None


def _write_videos(folder: RunFolder, pack: Pack, episodes: evaluator.Episodes) -> None:
    """Render the first episode of every task, replayed from its seed and actions."""
    if not atomic.is_inside(folder.videos, folder.path):
        raise UserError(f"{folder.videos} is a link out of the run folder. Remove the link")
    folder.videos.mkdir(exist_ok=True)
    for index, task in enumerate(pack.tasks):
        seed, actions = episodes.first[task.name]
        frames = pack.render(index, seed, actions)
        video.write_mp4(folder.videos / f"{task.name}.mp4", frames, fps=pack.render_fps(index))
