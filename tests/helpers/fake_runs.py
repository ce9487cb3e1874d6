"""Fake folders of finished runs and sweeps, as read by reports, created in milliseconds without training."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mtrl_cli.config import compose
from mtrl_cli.sweeps import plan as sweep_plan
from mtrl_cli.sweeps.plan import Choices, Plan

STEPS = 100_000
SETTLED = {"device": "cpu", "groups": 1, "precision": "fp32", "compile": False, "threads": 1}


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    """Compose the configuration of `mtrl train` with these overrides; `auto` values are resolved for a CPU."""
    config = compose.compose_training([f"steps_per_task={STEPS}", *words]) | SETTLED
    open_keys = {"batch_size": 64, "target_period": 1000, "overlap": False}
    agent = {key: open_keys.get(key, value) if value == "auto" else value for key, value in config["agent"].items()}
    return config | {
        "agent": agent,
        "replay": config["replay"] | ({"capacity": STEPS} if config["replay"].get("capacity") == "auto" else {}),
    }


@cache
def _as_text(words: tuple[str, ...], settled: bool = True) -> str:
    config = composed(words) if settled else compose.compose_training([f"steps_per_task={STEPS}", *words])
    return compose.dump(config | {"seed": 0, "run_dir": "HERE"})


def level(words: Sequence[str]) -> float:
    """Return a configuration's final mean score over tasks and seeds, from 0.3 to 0.9, derived from its overrides."""
    return 0.3 + 0.6 * (zlib.crc32(" ".join(sorted(words)).encode()) % 1000) / 1000


def make_run(
    folder: Path,
    words: Sequence[str] = ("env=minatar_pack",),
    *,
    seed: int = 0,
    reaches: float | Sequence[float] | None = None,
    spread: float = 0.03,
    evaluations: int = 10,
    rows: int = 50,
    status: str = "completed",
    error: str | None = None,
    progress: float = 1.0,
    parameters: int = 300_000,
    seconds: float = 600.0,
    scored: bool = True,
    tested: bool = True,
    extra: Mapping[str, float] | None = None,
    settled: bool = True,
) -> Path:
    """Create the folder of a run.

    Args:
        folder: a new folder; its parents are created.
        words: overrides of `mtrl train`, without seed and run_dir.
        reaches: final score of each task, or one score for all; None: `level(words)`, slightly different between tasks.
        spread: standard deviation of scores over seeds.
        evaluations: number of validation evaluations, equally spaced.
        rows: minimum number of rows of metrics.jsonl.
        status, error: fields of run.json.
        progress: completed fraction of the budget.
        seconds: duration of the whole budget.
        scored: whether the tasks have reference scores.
        tested: whether eval/test.json exists.
        extra: additional metrics of each diagnostics row, such as {"routing/layer/task/0": 0.5}.
        settled: whether the worker has resolved `auto`; if not, only the configuration exists.
    """
    config = composed(tuple(words))
    tasks = config["env"]["tasks"]
    steps = config["steps_per_task"]
    random = np.random.default_rng([zlib.crc32(" ".join(words).encode()), seed])
    if reaches is None:
        reaches = [level(words) + 0.05 * (index - (len(tasks) - 1) / 2) for index in range(len(tasks))]
    ends = np.broadcast_to(np.asarray(reaches, float), len(tasks)) + spread * random.standard_normal(len(tasks))
    folder.mkdir(parents=True)
    text = (
        _as_text(tuple(words), settled)
        .replace("\nseed: 0\n", f"\nseed: {seed}\n")
        .replace("\nrun_dir: HERE\n", f"\nrun_dir: {json.dumps(str(folder))}\n")
    )
    (folder / "config.yaml").write_text(text)
    if not settled:
        return folder
    record = {
        "command": shlex.join(["mtrl", "train", *words, f"seed={seed}", f"run_dir={folder}"]),
        "started": "2026-01-01T12:00:00+00:00",
        "ended": None if status == "running" else "2026-01-01T12:10:00+00:00",
        "status": status,
        "seconds": None if status == "running" else seconds * progress,
        "error": error,
        "stopped_early": None,
        "device": "cpu",
        "versions": {"mtrl_cli": "0.1.0"},
        "git": None,
    }
    (folder / "run.json").write_text(json.dumps(record, indent=2))
    counts = {"parameters/total": float(parameters), "parameters/shared": parameters * 0.9}
    counts |= {f"parameters/{task}": float(round(parameters * 0.1 / len(tasks))) for task in tasks}
    lines = [{"step": 0, "frames": 0, "seconds": 0.4, "updates": 0} | counts]
    for index in range(1, evaluations + 1):
        step = round(steps * index / evaluations)
        if step > progress * steps:
            break
        scores = ends * (1 - math.exp(-4 * index / evaluations)) + 0.3 * spread * random.standard_normal(len(tasks))
        at = {"step": step, "frames": step, "seconds": seconds * index / evaluations, "updates": step // 8}
        lines += [at | _log_row(tasks, random) for _ in range((rows - 2 * evaluations - 2) // evaluations + 1)]
        lines.append(at | _diagnostics_row(tasks, random) | dict(extra or {}))
        lines.append(at | _evaluation_row("eval", tasks, scores, scored))
    if tested and status == "completed":
        scores = ends + 0.2 * spread * random.standard_normal(len(tasks))
        lines.append(
            {"step": steps, "frames": steps, "seconds": seconds + 1, "updates": steps // 8} | _evaluation_row("test", tasks, scores, scored)
        )
        _write_test(folder, config, scores, scored)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _log_row(tasks: Sequence[str], random: np.random.Generator) -> dict[str, float]:
    row = {f"{name}/{task}": float(random.random()) for name in ("train/return", "loss", "q/mean", "weight", "epsilon") for task in tasks}
    return row | {"grad/norm": float(random.random()), "perf/steps_per_second": 4000 + 200 * float(random.random()), "perf/memory": 4e8}


def _diagnostics_row(tasks: Sequence[str], random: np.random.Generator) -> dict[str, float]:
    row = {f"grad/cosine/{a}~{b}": float(random.uniform(-0.2, 0.4)) for a, b in itertools.combinations(tasks, 2)}
    return row | {"grad/conflict": 0.4, "grad/cosine/mean": 0.1, "features/rank": 40.0, "features/dormant": 0.02}


def _evaluation_row(split: str, tasks: Sequence[str], scores: np.ndarray, scored: bool) -> dict[str, float]:
    row = {f"{split}/return/{task}": float(100 * score) for task, score in zip(tasks, scores, strict=True)}
    if scored:
        row |= {f"{split}/score/{task}": float(score) for task, score in zip(tasks, scores, strict=True)}
        row |= {f"{split}/score/mean": float(scores.mean()), f"{split}/score/median": float(np.median(scores))}
        row |= {f"{split}/score/iqm": float(np.sort(scores)[len(scores) // 4 : len(scores) - len(scores) // 4].mean())}
        row |= {f"{split}/score/min": float(scores.min())}
    return row


def _write_test(folder: Path, config: Mapping[str, Any], scores: np.ndarray, scored: bool) -> None:
    tasks = config["env"]["tasks"]
    own = {
        task: {"mean": float(100 * score), "std": 1.0, "returns": [float(100 * score)]} for task, score in zip(tasks, scores, strict=True)
    }
    if scored:
        own = {task: {**own[task], "score": float(score)} for task, score in zip(tasks, scores, strict=True)}
    last = {"step": config["steps_per_task"], "split": "test", "episodes": 1, "tasks": own, "over_tasks": {}}
    (folder / "eval").mkdir()
    test = {"split": "test", "step": config["steps_per_task"], "seed": 1, "last": last, "best": last}
    (folder / "eval" / "test.json").write_text(json.dumps(test))


def make_sweep(
    folder: Path,
    axes: Mapping[str, Sequence[object]],
    words: Sequence[str] = ("env=minatar_pack",),
    *,
    states: Mapping[int, str] | None = None,
    whys: Mapping[int, str] | None = None,
    plan: Mapping[str, Any] | None = None,
    **run: Any,
) -> Path:
    """Create the folder of a sweep over the grid of `axes`; the last axis varies fastest.

    Args:
        axes: choices by key, including `seed`.
        words: overrides shared by all runs.
        states: by number, states of trials that are not completed: pruned, failed, running, queued (with a configuration, but no worker),
            lost (failed, because the worker never started), uncomposed (failed, without a configuration) or waiting (without a folder).
        whys: by number, the reason why a trial failed or was pruned.
        plan: changes to the plan's search settings.
        run: arguments of `make_run` for all runs; functions are called with the trial's values.
    """
    points = [dict(zip(axes, map(str, values), strict=True)) for values in itertools.product(*axes.values())]
    folder.mkdir(parents=True)
    search = {"sampler": "grid", "trials": len(points), "pruner": "none", "storage": None, "metric": None, "retries": 2, "seed": 0}
    made = Plan(
        shared=tuple(words),
        axes={key: Choices(tuple(map(str, values))) for key, values in axes.items()},
        points=tuple(points),
        search=search | dict(plan or {}),
        launcher={"_target_": "mtrl_cli.launchers.local.LocalLauncher"},
        trusted_packages=(),
        env="minatar_pack",
        steps_per_task=STEPS,
        run_dir=folder,
    )
    given = [f"{key}={','.join(map(str, axes[key]))}" for key in axes]
    sweep_plan.save(made, folder, ["mtrl", "sweep", *words, *given])
    for number, values in enumerate(points):
        state = (states or {}).get(number, "completed")
        if state == "waiting":
            continue
        own = {key: value(values) if callable(value) else value for key, value in run.items()}
        own |= {
            "completed": {},
            "failed": {"status": "failed", "error": "it broke", "progress": 0.3},
            **{unsettled: {"settled": False} for unsettled in ("queued", "lost", "uncomposed")},
        }.get(state, {"status": "stopped" if state == "pruned" else state, "progress": 0.5})
        recorded = {"queued": "running", "lost": "failed", "uncomposed": "failed"}.get(state, state)
        trial = make_trial(folder, number, values, words, state=recorded, why=(whys or {}).get(number), **own)
        if state == "uncomposed":
            (trial / "config.yaml").unlink()
    return folder


def make_trial(
    sweep: Path,
    number: int,
    values: Mapping[str, str],
    words: Sequence[str],
    *,
    state: str = "completed",
    why: str | None = None,
    **run: Any,
) -> Path:
    """Create the folder of one trial in a sweep: a run with a trial.json."""
    overrides = [f"{key}={value}" for key, value in values.items()]
    folder = sweep / "trials" / f"{number:04d}"
    of_run = [*words, *(word for word in overrides if not word.startswith("seed="))]
    make_run(folder, of_run, seed=int(values.get("seed", 0)), **run)
    test = folder / "eval" / "test.json"
    scores = [own.get("score") for own in json.loads(test.read_text())["last"]["tasks"].values()] if test.is_file() else [None]
    trial = {
        "format": 1,
        "number": number,
        "overrides": overrides,
        "values": dict(values),
        "command": shlex.join(["mtrl", "train", *words, *overrides]),
        "state": state,
        "value": None if None in scores else sum(scores) / len(scores),
        "metric": None if None in scores else "eval/score/mean",
        "why": why,
        "attempts": 1,
    }
    (folder / "trial.json").write_text(json.dumps(trial, indent=2))
    return folder
