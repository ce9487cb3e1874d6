#!/usr/bin/env python3
"""Print the Markdown tables of docs/results.md from run folders: the test or last evaluation, and with --curve the training curve.

Usage: scripts/results_table.py [--curve] RUN...
       scripts/results_table.py --groups FOLDER...     (each FOLDER contains the runs of one condition, one per seed)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def last_evaluation(run: Path) -> dict[str, Any]:
    """Return the result of the last network of a run: its test, unless an evaluation has a later step or more episodes."""
    newest = max((run / "eval").glob("[0-9]*.json"), key=lambda path: int(path.stem))
    result: dict[str, Any] = json.loads(newest.read_text())
    test = run / "eval" / "test.json"
    if test.is_file():
        tested: dict[str, Any] = json.loads(test.read_text())["last"]
        if tested["step"] == result["step"] and tested["episodes"] >= result["episodes"]:
            return tested
    return result


def rows(lines: list[list[str]]) -> str:
    """Format a Markdown table. The first line is the header."""
    header, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rest])


def final_table(runs: list[Path]) -> str:
    """Return a row per run: mean return and 95% interval per task, and wall time."""
    evaluations = [last_evaluation(run) for run in runs]
    tasks = list(evaluations[0]["tasks"])
    lines = [["run", *tasks, "episodes", "steps per task", "minutes"]]
    for run, evaluation in zip(runs, evaluations, strict=True):
        cells = []
        for task in tasks:
            result = evaluation["tasks"][task]
            low, high = result["ci"]
            cells.append(f"{result['mean']:.1f} ({low:.1f} to {high:.1f})")
        minutes = json.loads((run / "run.json").read_text())["seconds"] / 60
        lines.append([run.name, *cells, str(evaluation["episodes"]), f"{evaluation['step']:,}", f"{minutes:.1f}"])
    return rows(lines)


def interval_over_runs(returns: list[list[float]], resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean: runs are drawn with replacement, then the episodes of each run."""
    random = np.random.default_rng(0)
    episodes = [np.asarray(each) for each in returns]
    means = np.empty(resamples)
    for index in range(resamples):
        drawn = random.integers(0, len(episodes), len(episodes))
        means[index] = np.mean([random.choice(episodes[run], len(episodes[run])).mean() for run in drawn])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def parameters(run: Path) -> int:
    """Return the number of parameters of a run's network, from its first row of metrics."""
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return int(first["parameters/total"])


def group_table(folders: list[Path]) -> str:
    """Return a row per folder: parameters, mean return and interval per task, score over tasks, minutes per run."""
    groups = {folder.name: sorted(path for path in folder.iterdir() if (path / "run.json").is_file()) for folder in folders}
    found = {name: [last_evaluation(run) for run in runs] for name, runs in groups.items()}
    tasks = list(next(iter(found.values()))[0]["tasks"])
    lines = [["", "parameters", *tasks, "score over tasks (min to max)", "runs x episodes", "minutes per run"]]
    for name, evaluations in found.items():
        cells = []
        for task in tasks:
            returns = [evaluation["tasks"][task]["returns"] for evaluation in evaluations]
            low, high = interval_over_runs(returns)
            cells.append(f"{np.mean([np.mean(each) for each in returns]):.1f} ({low:.1f} to {high:.1f})")
        scores = [evaluation["over_tasks"]["mean"] for evaluation in evaluations]
        minutes = [json.loads((run / "run.json").read_text())["seconds"] / 60 for run in groups[name]]
        over_tasks = f"{np.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"
        size = f"{parameters(groups[name][0]):,}"
        lines.append([name, size, *cells, over_tasks, f"{len(scores)} x {evaluations[0]['episodes']}", f"{np.mean(minutes):.1f}"])
    return rows(lines)


def curve_table(run: Path, points: int = 12) -> str:
    """Return the training curve: mean return of training episodes in `points` equal parts of the run, and steps per second."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tasks = list(last_evaluation(run)["tasks"])
    last = metrics[-1]["step"]
    lines = [["step", "minutes", *tasks, "steps/s"]]
    for part in range(1, points + 1):
        low, high = last * (part - 1) / points, last * part / points
        inside = [row for row in metrics if low < row["step"] <= high and "perf/steps_per_second" in row]
        if not inside:
            continue
        cells = []
        for task in tasks:
            returns = [row[f"train/return/{task}"] for row in inside if row.get(f"train/return/{task}") is not None]
            cells.append(f"{sum(returns) / len(returns):.1f}" if returns else "–")
        speed = sum(row["perf/steps_per_second"] for row in inside) / len(inside)
        lines.append([f"{inside[-1]['step']:,}", f"{inside[-1]['seconds'] / 60:.0f}", *cells, f"{speed:.0f}"])
    return rows(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curve", action="store_true", help="also print the training curve of each run")
    parser.add_argument("--groups", action="store_true", help="the arguments are folders of runs; print a row per folder")
    parser.add_argument("runs", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.groups:
        print(group_table(arguments.runs))
        return
    print(final_table(arguments.runs))
    for run in arguments.runs if arguments.curve else []:
        print(f"\n{run.name}, mean returns during training:\n\n{curve_table(run)}")


if __name__ == "__main__":
    main()
