"""Parameter counts of a study's networks. They need torch, so they are computed in a separate process, and the study's process stays small.

`python -m mtrl_cli.studies.sharing_sizes` reads the arguments of `measure` as JSON from standard input and writes its result, or {"error"}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from mtrl_cli.errors import UserError

REFERENCE, BASELINE = "hard", "independent"


def measure(overrides: Sequence[str], structures: Sequence[str], parameters: Sequence[str]) -> dict[str, Any]:
    """Count the parameters of a study's networks, in another process.

    Args:
        overrides: of a run, without sharing structure and parameter count.
        structures: options of network/sharing.
        parameters: parameter counts, in the format of `network.parameters`; empty: the count of hard sharing.

    Returns:
        "parameters": the parameter counts as text; "sizes": by structure and parameter count, the resulting count, or the reason why it is
        impossible; "full": the count of independent networks at the widths of the overrides.

    Raises:
        UserError: the overrides give no network.
    """
    request = json.dumps({"overrides": list(overrides), "structures": list(structures), "parameters": list(parameters)})
    done = subprocess.run([sys.executable, "-m", "mtrl_cli.studies.sharing_sizes"], input=request, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["the process was killed"])[-1]
        raise UserError(f"the parameters of the study's networks cannot be counted: {reason}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise UserError(result["error"])
    return result


def main() -> None:
    """Read the arguments of `measure` from standard input and print its result."""
    request = json.load(sys.stdin)
    try:
        result = _count(**request)
    except UserError as error:
        result = {"error": str(error)}
    print(json.dumps(result))


def _count(overrides: list[str], structures: list[str], parameters: list[str]) -> dict[str, Any]:
    from mtrl_cli.build import network as build_network
    from mtrl_cli.build import resolve_auto
    from mtrl_cli.build import run as build_run
    from mtrl_cli.config import compose

    pack = build_run.make_pack(compose.compose_training(overrides))

    def total(*more: str) -> int:
        config = resolve_auto.fit_network(compose.compose_training([*overrides, *more]), pack)
        return build_network.empty_network(config, pack).parameter_counts().total

    def total_or_reason(*more: str) -> int | str:
        try:
            return total(*more)
        except (UserError, RuntimeError) as error:  # torch raises RuntimeError for impossible shapes
            return " ".join(str(error).split())

    full = total(f"network/sharing={BASELINE}")
    counts = parameters or [str(total(f"network/sharing={REFERENCE}"))]
    sizes = {
        each: {count: total_or_reason(f"network/sharing={each}", f"network.parameters={count}") for count in counts} for each in structures
    }
    return {"parameters": counts, "sizes": sizes, "full": full}


if __name__ == "__main__":
    main()
