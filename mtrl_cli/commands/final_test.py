"""Test at the end of a run, on episodes with other seeds than validation, so that no test episode selected a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from mtrl_cli.build import network as build_network
from mtrl_cli.checkpoints.store import CheckpointStore
from mtrl_cli.errors import UserError
from mtrl_cli.metric_names import TEST
from mtrl_cli.networks.network import MultiTaskNetwork
from mtrl_cli.runs.terminal import print_line
from mtrl_cli.training import evaluator
from mtrl_cli.training.evaluator import Evaluator

FILE = "eval/test.json"


def run(tester: Evaluator, network: MultiTaskNetwork, store: CheckpointStore, step: int, check: Callable[[], None]) -> dict[str, Any]:
    """Test the last network and, if it differs, the network with the best validation score.

    Args:
        tester: evaluator of test episodes.
        network: the last network; its parameters are restored afterwards.
        store: checkpoints of the run.
        step: of the last network, per task.
        check: called between steps; may raise an exception to stop.

    Returns:
        The content of `eval/test.json`: {"split": "test", "step", "seed", "last": summary, "best": summary or None}. "best" equals "last"
        if both are the same network, and is None if no checkpoint has a score.
    """

    def test(at: int) -> dict[str, Any]:
        return evaluator.summarise(tester.run(network, check), tester.pack, at, str(at), split="test", seed=tester.seed)

    last, best = test(step), store.best()
    result = {"split": "test", "step": step, "seed": tester.seed, "last": last, "best": last if best == step else None}
    if best is None or best == step:
        return result
    own = copy.deepcopy(network.state_dict())
    try:
        # A checkpoint that is kept only as the best has no replay.
        _, state = CheckpointStore(store.folder, keep=1, with_replay=False).load(best)
        build_network.load_weights(network, state, f"checkpoint {best}")
    except UserError as error:  # a failure here must not discard a run of days
        print_line(f"the best checkpoint cannot be tested: {error}")
    else:
        result["best"] = test(best)
    finally:
        network.load_state_dict(own)
    return result


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return the metrics by name: `test/return/<task>` of the last network and, if it differs, `test/best/return/<task>` of the best."""
    found = evaluator.metrics(result["last"], TEST)
    if is_another(result):
        found |= evaluator.metrics(result["best"], f"{TEST}best/") | {f"{TEST}best/step": float(result["best"]["step"])}
    return found


def is_another(result: dict[str, Any]) -> bool:
    """Return whether the network with the best validation score is not the last one."""
    return result["best"] is not None and result["best"]["step"] != result["last"]["step"]


def titled(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the summaries, each with a title."""
    if is_another(result):
        return [("the last network", result["last"]), ("the network with the best validation score", result["best"])]
    return [("the last network" + ("" if result["best"] is None else ", which has the best validation score"), result["last"])]
