#!/usr/bin/env python3
"""The picture in the README: what a run shows while it trains and when it ends, drawn from its folder.

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
    """An SVG of the live table at the run's last row, and of its last evaluation."""
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
    # The fonts that rich names lie on a server; the reader's own monospace will do.
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(Path(sys.argv[1])))
