#!/usr/bin/env python3
"""Draw the figure of the README from a run folder: the live table and the final evaluation.

Usage: scripts/picture.py RUN docs/run.svg
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from mtrl_cli.runs.progress import Display, evaluation_table

WIDTH = 100


def picture(run: Path) -> str:
    """Return an SVG of the live table at the last row of metrics and of the last evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = max((run / "eval").glob("[0-9]*.json"), key=lambda path: int(path.stem))
    evaluation = json.loads(newest.read_text())
    last = [row for row in rows if "perf/steps_per_second" in row][-1]
    metrics = {name: value for row in rows for name, value in row.items() if value is not None and "/" in name}
    display = Display(list(evaluation["tasks"]), last["step"], last["frames"] // last["step"], out=io.StringIO())
    display.console = Console(file=io.StringIO(), width=WIDTH, height=40, force_terminal=True)
    display.update(last["step"], metrics, seconds=last["seconds"])
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    command = re.sub(r" run_dir=\S+", "", json.loads((run / "run.json").read_text())["command"])
    console.print(f"$ {command}", style="bold")
    console.print(display.table())
    console.print()
    console.print(evaluation_table(evaluation))
    svg = console.export_svg(title="mtrl")
    # Rich refers to fonts on a server; without them the reader's monospace font is used.
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(Path(sys.argv[1])))
