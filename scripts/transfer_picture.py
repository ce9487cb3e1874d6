#!/usr/bin/env python3
"""Draw the figure of a transfer study as an SVG for docs/.

Usage: scripts/transfer_picture.py STUDY docs/transfer_classic.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

from mtrl_cli.studies import transfer_report


def main() -> None:
    """Draw the figure."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    study, target = map(Path, sys.argv[1:])
    matplotlib.rcParams["svg.hashsalt"] = "mtrl"  # reproducible bytes
    transfer_report.draw(json.loads((study / "transfer.json").read_text())).savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
