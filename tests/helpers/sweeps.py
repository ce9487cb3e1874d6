"""Wait for a condition, and read the trials of a sweep."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def until(condition: Callable[[], Any], failure: str = "timed out", seconds: float = 120.0) -> Any:
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, failure
        time.sleep(0.02)
    return found


def trials(sweep: Path) -> list[dict[str, Any]]:
    """Read the trial.json of each trial, ordered by number."""
    return [json.loads(path.read_text()) for path in sorted((sweep / "trials").glob("*/trial.json"))]
