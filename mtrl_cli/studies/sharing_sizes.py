"""How large the networks of a study are: a process of its own, as counting them takes torch, and the study's own process stays light.

`python -m mtrl_cli.studies.sharing_sizes` reads {"words", "structures", "parameters"} and
writes {"parameters", "sizes", "full"}, or {"error"}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from mtrl_cli.errors import UserError

BASIS, BASELINE = "hard", "independent"


def measure(words: Sequence[str], structures: Sequence[str], parameters: Sequence[str]) -> dict[str, Any]:
    """Count, in a process that ends with this call, the networks of a study.

    Args:
        words: of a run, without sharing structure and number of parameters.
        structures: options of network/sharing.
        parameters: sizes, as `network.parameters` takes them; none: that of hard sharing at the widths of the words.

    Returns: "parameters": the sizes, as words; "sizes": by structure and size, how many parameters it comes to, or why it cannot;
        "full": of networks that share nothing, at the widths of the words.

    Raises:
        UserError: the words make no network.
    """
    asked = json.dumps({"words": list(words), "structures": list(structures), "parameters": list(parameters)})
    done = subprocess.run([sys.executable, "-m", "mtrl_cli.studies.sharing_sizes"], input=asked, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"the networks of the study cannot be counted: {(done.stderr.strip().splitlines() or ['the process was killed'])[-1]}"
        )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in told:
        raise UserError(told["error"])
    return told


def main() -> None:
    """Count what is asked on standard input."""
    asked = json.load(sys.stdin)
    try:
        told = _count(**asked)
    except UserError as error:
        told = {"error": str(error)}
    print(json.dumps(told))


def _count(words: list[str], structures: list[str], parameters: list[str]) -> dict[str, Any]:
    from mtrl_cli.build import network as build_network
    from mtrl_cli.build import resolve_auto
    from mtrl_cli.build import run as build_run
    from mtrl_cli.config import compose

    composed = compose.compose_training(words)
    pack = build_run.make_pack(composed)

    def total(*more: str) -> int:
        config = resolve_auto.fit_network(compose.compose_training([*words, *more]), pack)
        return build_network.empty_network(config, pack).parameter_counts().total

    def tried(*more: str) -> int | str:
        try:
            return total(*more)
        except (UserError, RuntimeError) as error:  # what torch cannot build is a RuntimeError
            return " ".join(str(error).split())

    full = total(f"network/sharing={BASELINE}")
    sizes = parameters or [str(total(f"network/sharing={BASIS}"))]
    return {
        "parameters": sizes,
        "sizes": {each: {size: tried(f"network/sharing={each}", f"network.parameters={size}") for size in sizes} for each in structures},
        "full": full,
    }


if __name__ == "__main__":
    main()
