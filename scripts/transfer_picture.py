#!/usr/bin/env python3
"""The picture of a study of transfer as an SVG for docs/, from its folder: what `mtrl transfer` draws as a PNG.

Usage: scripts/transfer_picture.py STUDY docs/transfer_classic.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

from mtrl_cli.studies import transfer_report


def main() -> None:
    """Draw it."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    study, target = map(Path, sys.argv[1:])
    matplotlib.rcParams["svg.hashsalt"] = "mtrl"  # the same study gives the same bytes
    transfer_report.draw(json.loads((study / "transfer.json").read_text())).savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
