"""`mtrl transfer`: what a trained network gains on other tasks, against training on them from scratch."""

from __future__ import annotations

import gc
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from mtrl_cli.build import run as build_run
from mtrl_cli.build.instantiate import class_of
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.commands.train import run as train
from mtrl_cli.config import compose, validation
from mtrl_cli.config.introspection import class_name
from mtrl_cli.errors import Stopped, UserError, show
from mtrl_cli.files import atomic
from mtrl_cli.parallel import torchrun
from mtrl_cli.runs.run_dir import RunFolder
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.studies import transfer_report
from mtrl_cli.studies.transfer_report import KINDS

RECORD = "study.json"
EVALUATIONS = 10  # at least, over the budget, unless the user says how often
_PARTS = {"network": "torso", "network/sharing": "sharing", "network/head": "head"}
_NOT_COMPARED = ("run_dir", "device", "trusted_packages", "ranks")


@dataclass(frozen=True)
class Plan:
    """What a study is to do.

    Attributes:
        source: the run whose network is used again, absolute.
        which: of its checkpoints: a step, latest or best.
        seeds: a pair of runs for each.
        configs: by kind (fine_tuned, scratch), the configuration of its runs but for seed and folder.
        run_dir: the study's folder; None: a new one.
    """

    source: Path
    which: int | str
    seeds: list[int]
    configs: dict[str, dict[str, Any]]
    run_dir: Path | None


def transfer(run_path: Path, overrides: Sequence[str], *, command: list[str]) -> None:
    """Compare fine-tuning a run's network with training from scratch, over seeds, and write a table and a picture.

    Args:
        run_path: the source, or one of its checkpoints.
        overrides: of the runs on the new tasks, and `seeds` and `run_dir` of the study.
        command: the command line.

    Raises:
        UserError: the words, the source or the folder are wrong; runs that the study had made before stay.
        RunError: a run failed.
        Stopped: by a signal, after saving; the same command goes on.
    """
    if torchrun.place().size > 1:
        raise UserError("mtrl transfer trains its runs in one process, one after the other: start it without torchrun")
    transfer_report.require()
    with StopRequest() as stop:
        with stop.interruptible():
            plan = _plan(run_path, overrides)
            folder = _open(plan)
        with folder:
            try:
                _work(folder, plan, stop, command)
            except Stopped as stopped:
                stopped.told = True
                given = [] if plan.run_dir else [f"run_dir={folder.path}"]
                print_line(f"the study goes on where it was with: {shlex.join([*command, *given])}")
                raise
            except UserError:
                if not any((folder.path / kind).exists() for kind in KINDS):
                    (folder.path / RECORD).unlink(missing_ok=True)
                    folder.discard()
                raise


# -- what is to be done ---------------------------------------------------------------------------------------------------------


def _plan(run_path: Path, overrides: Sequence[str]) -> Plan:
    source, named = RunFolder.open(run_path)
    words, seeds = _seeds(overrides)
    given = {word.lstrip("+~").partition("=")[0] for word in words}
    if "env" not in given:
        raise UserError("mtrl transfer needs env=NAME, the tasks to use the network again for, such as env=minatar_pack; see mtrl ls env")
    if "init_from" in given:
        raise UserError("init_from: mtrl transfer begins with the network of RUN; leave init_from out")
    trained = compose.load(source.config, trusted=compose.trusted_packages(words))
    which = "latest" if named is None else named
    composed = compose.compose_training([*words, f"init_from={os.path.abspath(source.path)}/checkpoints/{which}"])
    _check(composed, given)
    _check_kind(trained, composed, given)
    config = _evaluated_often(_with_network_of(trained, composed, given), given)
    run_dir = config["run_dir"]
    trusted = config["trusted_packages"]
    # What transfer.* says is of a source, and of the runs that have one.
    scratch = {key: value for key, value in config.items() if key != "transfer"} | {"init_from": None}
    return Plan(
        source=Path(os.path.abspath(source.path)),
        which=which,
        seeds=[config["seed"] + index for index in range(seeds)],
        configs={"fine_tuned": validation.validate(config, trusted=trusted), "scratch": validation.validate(scratch, trusted=trusted)},
        run_dir=None if run_dir is None else Path(run_dir),
    )


def _seeds(overrides: Sequence[str]) -> tuple[list[str], int]:
    """The overrides of the runs, and how many seeds the study has."""
    words = [word for word in overrides if not word.startswith("seeds=")]
    given = [word.partition("=")[2] for word in overrides if word.startswith("seeds=")] or ["3"]
    if not given[-1].isdecimal() or not 0 < int(given[-1]) <= 1000:
        raise UserError(f"seeds={show(given[-1])}: expected how many runs of each kind there are to be, a whole number from 1 to 1000")
    return words, int(given[-1])


def _check(config: dict[str, Any], given: set[str]) -> None:
    """Refuse what would make the runs of a study incomparable."""
    if config["early_stopping"]["metric"] is not None:
        raise UserError("early_stopping.metric: mtrl transfer compares runs of the same budget; leave early stopping out")
    if config["eval"]["test_episodes"] == 0:
        raise UserError("eval.test_episodes=0: mtrl transfer compares final scores by test games; give another number, or leave it out")
    if "eval.at_start" in given and not config["eval"]["at_start"]:
        raise UserError("eval.at_start=false: mtrl transfer begins its curves before the first step; leave it out")


def _check_kind(trained: dict[str, Any], config: dict[str, Any], given: set[str]) -> None:
    """Refuse a source whose torso cannot read what the new tasks show."""
    torso, pack = class_of(trained, "network")[0], build_run.make_pack(config)
    reads, shown = getattr(torso, "observation_kind", None), pack.observation_kind
    if reads != shown and "network" not in given:
        raise UserError(
            f"the source's network reads {reads}s, and env={config['env']['name']} shows {shown}s: there is nothing to transfer"
        )


def _with_network_of(trained: dict[str, Any], config: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """A configuration with the torso, sharing structure and head of the source's, but for what was given."""
    kept = [group for group in _PARTS if group not in given]
    network = {key: config["network"][key] for key in ("sharing", "head")}
    for group in kept:
        if group != "network":
            part = group.rpartition("/")[2]
            network[part] = dict(trained["network"][part])
    own, others = trained["network"] if "network" in kept else config["network"], ("sharing", "head")
    network = {key: value for key, value in own.items() if key not in others} | network
    if "network" in kept:
        network["parameters"] = None  # the source's widths are those that its parameters have
    for key in (key for key in given if key.startswith("network.")):
        *path, last = key.split(".")[1:]
        from_node, to_node = config["network"], network
        for part in path:
            from_node, to_node = from_node[part], to_node[part]
        to_node[last] = from_node[last]
    told = [f"{', '.join(_PARTS[group] for group in kept)} as in the source"] if kept else []
    chosen = [f"{group}={_word(config, group)}" for group in _PARTS if group not in kept]
    print_line("network: " + "; ".join([*told, *([f"{', '.join(chosen)} as given"] if chosen else [])]))
    return config | {"network": network}


def _word(config: dict[str, Any], group: str) -> str:
    node = config
    for part in group.split("/"):
        node = node[part]
    return class_name(node)


def _evaluated_often(config: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """A configuration whose run is evaluated before its first step, and often enough for a curve."""
    games = config["eval"] | {"at_start": True}
    if "eval.every" not in given:
        often = max(1, config["steps_per_task"] // EVALUATIONS)
        games["every"] = min(games["every"] or often, often)
    return config | {"eval": games}


# -- the study's folder ---------------------------------------------------------------------------------------------------------


def _open(plan: Plan) -> RunFolder:
    """The study's folder, locked: a new one, or that of the same study, to go on in.

    Raises:
        UserError: it is of another study, or holds something else.
    """
    path = plan.run_dir or Path("runs/transfer") / (
        f"{plan.source.name}_to_{plan.configs['scratch']['env']['name']}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    )
    if not os.path.lexists(path / RECORD):
        step = CheckpointStore(plan.source / "checkpoints", keep=1, with_replay=False).load(plan.which, warn=print_line)[0]  # type: ignore[arg-type]
        folder = RunFolder.create(path)
        _write_record(folder, plan, step)
        return folder
    folder = RunFolder(path)
    folder.lock()
    try:
        before = atomic.read_json(path / RECORD, path)
        _check_same(path, plan, before)
        if len(before["seeds"]) < len(plan.seeds):
            _write_record(folder, plan, before["checkpoint"])
    except BaseException:
        folder.unlock()
        raise
    print_line(f"going on in {path}")
    return folder


def _write_record(folder: RunFolder, plan: Plan, checkpoint: int) -> None:
    about = {"format": 1, "source": str(plan.source), "which": plan.which, "checkpoint": checkpoint, "seeds": plan.seeds}
    folder.write(RECORD, atomic.to_json(about | {"configs": plan.configs}))


def _check_same(path: Path, plan: Plan, before: dict[str, Any]) -> None:
    """Refuse to go on with a study as another one."""
    elsewhere = "give another run_dir"
    if (before.get("source"), before.get("which")) != (str(plan.source), plan.which):
        raise UserError(f"run_dir={path} holds a study of {show(before.get('source'))}, {show(before.get('which'))}: {elsewhere}")
    seeds, configs = before.get("seeds"), before.get("configs")
    if not isinstance(seeds, list) or not isinstance(configs, dict) or not isinstance(before.get("checkpoint"), int):
        raise UserError(f"{path / RECORD} is damaged: {elsewhere}")
    if plan.seeds[: len(seeds)] != seeds:
        raise UserError(f"run_dir={path} holds a study of the seed(s) {show(seeds)}: others or fewer make another study; {elsewhere}")
    for kind in KINDS:
        old, new = (dict(compose.flat(configs.get(kind, {}))), dict(compose.flat(json.loads(json.dumps(plan.configs[kind])))))
        different = sorted(key for key in {*old, *new} - {*_NOT_COMPARED} if old.get(key) != new.get(key))
        if different:
            raise UserError(
                f"run_dir={path} holds a study with other values of {', '.join(different[:5])}: "
                f"give these as they were (see {path / RECORD}), or another run_dir"
            )


# -- the work -------------------------------------------------------------------------------------------------------------------


def _work(folder: RunFolder, plan: Plan, stop: StopRequest, command: list[str]) -> None:
    """Train what is not trained yet, and tell what came out."""
    record = atomic.read_json(folder.path / RECORD, folder.path)
    runs = {kind: [folder.path / kind / f"s{seed}" for seed in plan.seeds] for kind in KINDS}
    todo = [(kind, seed, folder.path / kind / f"s{seed}") for seed in plan.seeds for kind in KINDS]
    for number, (kind, seed, path) in enumerate(todo, 1):
        stop.check()
        label = f"{number} of {len(todo)}: {KINDS[kind]}, seed {seed}"
        if _is_completed(path):
            print_line(f"{label}: done before")
            continue
        print_line(label)
        config = plan.configs[kind] | {"seed": seed, "run_dir": str(path)}
        if kind == "fine_tuned":
            config["init_from"] = str(plan.source / "checkpoints" / str(record["checkpoint"]))
        train(_with_replay_of(todo[0][2], config), command=command, or_resume=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    with stop.interruptible():
        scratch = plan.configs["scratch"]
        told = transfer_report.report(
            runs,
            {
                "source": str(plan.source),
                "checkpoint": record["checkpoint"],
                "env": scratch["env"]["name"],
                "steps_per_task": scratch["steps_per_task"],
                "seeds": plan.seeds,
            },
        )
        in_markdown, picture = transfer_report.table(told), transfer_report.picture(told)
    folder.write("transfer.json", atomic.to_json(told))
    folder.write("transfer.md", in_markdown)
    atomic.replace(folder.path / "transfer.png", picture)
    print_line(f"\n{in_markdown}\nwritten to {folder.path}: transfer.md, transfer.png, transfer.json")


def _with_replay_of(first: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the replay's capacity that the study's first run settled on: memory that is free changes from run to run."""
    if config["replay"].get("capacity") != "auto" or not RunFolder.is_run(first):
        return config
    settled = compose.load(first / "config.yaml", trusted=config["trusted_packages"])["replay"]["capacity"]
    return config | {"replay": config["replay"] | {"capacity": settled}}


def _is_completed(path: Path) -> bool:
    return RunFolder.is_run(path) and RunFolder(path).read_record().get("status") == "completed"
