"""What `mtrl transfer` tells of its runs: their curves and tests read from their folders, a table and a picture made of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic
from mtrl_cli.machine import extras
from mtrl_cli.stats import bootstrap
from mtrl_cli.stats import transfer as transfer_stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"fine_tuned": "fine-tuned", "scratch": "from scratch"}
COLOURS = {"fine_tuned": "tab:blue", "scratch": "tab:orange"}
COLUMNS = 4  # of the picture
HEADINGS = {
    "zero_shot": "zero-shot",
    "jump_start": "jump-start",
    "steps_to_scratch": "steps to scratch's final",
    "area_ratio": "area ratio",
    "final_fine_tuned": "final, fine-tuned",
    "final_scratch": "final, from scratch",
    "final_difference": "difference",
}
"""The metrics, as the table calls them."""
Report = dict[str, Any]


def require() -> None:
    """Raise UserError unless pictures can be drawn: for before the work of training."""
    extras.require("mtrl transfer", "matplotlib", "plots")


def report(runs: Mapping[str, Sequence[Path]], about: Mapping[str, Any]) -> Report:
    """What `transfer.json` holds: metrics and curves of each task and over tasks.

    Args:
        runs: by kind (fine_tuned, scratch), the finished runs, a seed each, in the same order.
        about: what else is to be told of the study.

    Raises:
        UserError: the runs were not evaluated at the same steps. RunError: they lack their tests.
    """
    rows = {kind: [_evaluations(run) for run in runs[kind]] for kind in KINDS}
    tests = {kind: [_test(run) for run in runs[kind]] for kind in KINDS}
    steps = [row["step"] for row in rows["scratch"][0]]
    for kind in KINDS:
        for run, of_run in zip(runs[kind], rows[kind], strict=True):
            if [row["step"] for row in of_run] != steps:
                raise UserError(
                    f"{run} was not evaluated at the same steps as {runs['scratch'][0]}: was one of them trained on?\n"
                    "Remove that one, and the same command trains it again"
                )
    tasks: dict[str, Any] = {}
    for task in tests["scratch"][0]["tasks"]:
        unit = "score" if f"eval/score/{task}" in rows["scratch"][0][0] else "return"
        curves = {kind: _curves(rows[kind], f"eval/{unit}/{task}") for kind in KINDS}
        finals = {kind: np.array([test["tasks"][task]["score" if unit == "score" else "mean"] for test in tests[kind]]) for kind in KINDS}
        tasks[task] = _compared(unit, steps, curves, finals)
    over_tasks = None
    if "eval/score/mean" in rows["scratch"][0][0]:
        curves = {kind: _curves(rows[kind], "eval/score/mean") for kind in KINDS}
        finals = {kind: np.array([test["over_tasks"]["mean"] for test in tests[kind]]) for kind in KINDS}
        over_tasks = _compared("score", steps, curves, finals)
    episodes = {"validation": _episodes(runs["scratch"][0], steps[-1]), "test": tests["scratch"][0]["episodes"]}
    cut = sum(own.get("cut", 0) for kind in KINDS for test in tests[kind] for own in test["tasks"].values())
    return {"format": 1, **about, "episodes": episodes, "cut": cut, "tasks": tasks, "over_tasks": over_tasks}


def _compared(unit: str, steps: list[int], curves: dict[str, np.ndarray], finals: dict[str, np.ndarray]) -> dict[str, Any]:
    # Without a reference, what an untrained network gets stands in for random play.
    random = 0.0 if unit == "score" else float(curves["scratch"][:, 0].mean())
    metrics = transfer_stats.compare(
        np.array(steps, float), curves["fine_tuned"], curves["scratch"], finals["fine_tuned"], finals["scratch"], random
    )
    told = {kind: curves[kind].tolist() for kind in KINDS}
    return {
        "unit": unit,
        **{name: _as_json(own) for name, own in metrics.items()},
        "steps": steps,
        "curves": told,
        "tests": {kind: finals[kind].tolist() for kind in KINDS},
    }


def _as_json(estimate: bootstrap.Estimate) -> dict[str, Any]:
    value, *ends = (None if end is None or not np.isfinite(end) else end for end in (estimate.value, estimate.low, estimate.high))
    return {"value": value, "ci": None if estimate.low is None else ends}


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's validation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith("eval/return/") for name in row)]


def _test(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = atomic.read_json(run / "eval" / "test.json", run)["last"]
    return found


def _episodes(run: Path, step: int) -> int:
    return int(atomic.read_json(run / "eval" / f"{step}.json", run)["episodes"])


def _curves(runs: list[list[dict[str, Any]]], name: str) -> np.ndarray:
    """A metric's curves, [S, P]."""
    return np.array([[row[name] for row in rows] for rows in runs], float)


# -- the table ------------------------------------------------------------------------------------------------------------------


def table(told: Report) -> str:
    """The study in Markdown: what was done, a row for each task and one over tasks, and how to read it."""
    seeds, steps = told["seeds"], told["steps_per_task"]
    of_seeds = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"one seed, {seeds[0]}, so there are no intervals"
    header = ["task", *HEADINGS.values()]
    rows = [_row(f"{task} (return)" if own["unit"] == "return" else task, own) for task, own in told["tasks"].items()]
    if told["over_tasks"] is not None and len(told["tasks"]) > 1:
        rows.append(_row("mean over tasks", told["over_tasks"]))
    games = f"{told['episodes']['validation']} games of validation per task and evaluation, {told['episodes']['test']} of the test"
    lines = [f"# Transfer to {told['env']} from {told['source']}, checkpoint {told['checkpoint']}", ""]
    lines += [f"{steps:,} steps per task, {of_seeds}; {games}.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]
    return "\n".join([*lines, "", *_notes(told)]) + "\n"


def _row(name: str, own: dict[str, Any]) -> list[str]:
    plain = _score if own["unit"] == "score" else _return
    numbers = dict.fromkeys(HEADINGS, plain) | {"steps_to_scratch": _steps, "area_ratio": _ratio}
    return [name, *(_cell(own[key], numbers[key], "never" if key == "steps_to_scratch" else "-") for key in HEADINGS)]


def _cell(metric: dict[str, Any], number: Callable[[float], str], none: str) -> str:
    """A value, and in brackets its interval."""
    value, ends = (none if metric["value"] is None else number(metric["value"])), metric["ci"]
    return value if ends is None else f"{value} ({' to '.join(none if end is None else number(end) for end in ends)})"


def _score(value: float) -> str:
    return _unsigned(f"{value:.3f}")


def _return(value: float) -> str:
    return _unsigned(f"{value:.1f}")


def _unsigned(text: str) -> str:
    """Without the sign of a negative number that is 0 when rounded."""
    return text if float(text) else text.lstrip("-")


def _steps(value: float) -> str:
    return f"{value:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _notes(told: Report) -> list[str]:
    """How to read the table."""
    tasks, several = told["tasks"], len(told["seeds"]) > 1
    unscored = [task for task, own in tasks.items() if own["unit"] == "return"]
    lines = [*tasks.items(), ("the mean", told["over_tasks"])]
    unmeasured = [name for name, own in lines if own is not None and own["area_ratio"]["value"] is None]
    notes = []
    if len(unscored) < len(tasks):
        notes.append("Scores are normalised: 0 is random play, 1 the reference.")
    if unscored:
        notes.append(f"No reference is known for {', '.join(unscored)}: returns, and areas above what an untrained network gets.")
    notes += [
        "Zero-shot: the source's network before any training. Jump-start: that, less an untrained network's.",
        "Steps: until the fine-tuned run's validation reaches what the run from scratch ends with.",
        "Area ratio: of the areas under the curves of validation, above random play; 1: no difference (Taylor and Stone 2009: less 1).",
        "Final: the last network, in test games.",
    ]
    if told["cut"]:
        notes.append(f"{told['cut']:,} test games were cut by eval.max_steps, and count with the score up to there.")
    if unmeasured:
        notes.append(f"No area ratio where training from scratch is on the whole no better than random play: {', '.join(unmeasured)}.")
    if several:
        notes.append("In brackets 95% bootstrap intervals over seeds, the two runs of a seed as a pair.")
    return notes


# -- the picture ----------------------------------------------------------------------------------------------------------------


def draw(told: Report) -> Figure:
    """The curves of validation, a panel for each task and one over tasks; bands are 95% intervals over seeds, stars the tests."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = dict(told["tasks"])
    if told["over_tasks"] is not None and len(panels) > 1:
        panels = {"mean over tasks": told["over_tasks"]} | panels
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + (0.6 if columns > 1 else 1.0)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (name, own) in zip(axes, panels.items(), strict=False):
        _draw_panel(panel, name, own)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="grey", marker="*", linestyle=""))
    figure.legend(
        handles, [*labels, "last network in test games"], loc="outside upper center", ncols=3 if columns > 1 else 1, frameon=False
    )
    return figure


def _draw_panel(panel: Axes, name: str, own: dict[str, Any]) -> None:
    for kind, label in KINDS.items():
        curves_SP = np.array(own["curves"][kind], float)
        panel.plot(own["steps"], curves_SP.mean(axis=0), color=COLOURS[kind], label=label)
        if len(curves_SP) > 1:
            low_P, high_P = bootstrap.interval(lambda rows, own=curves_SP: own[rows].mean(axis=1), bootstrap.draw((len(curves_SP),)))
            panel.fill_between(own["steps"], low_P, high_P, color=COLOURS[kind], alpha=0.2, linewidth=0)
        panel.plot([own["steps"][-1]], [own[f"final_{kind}"]["value"]], "*", color=COLOURS[kind], clip_on=False)
    panel.set_title(name, fontsize=10)
    panel.set_xlabel("steps per task")
    panel.set_ylabel("normalised score" if own["unit"] == "score" else "return")
    panel.grid(alpha=0.3)


def picture(told: Report) -> bytes:
    """The drawing as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, out = draw(told), io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
