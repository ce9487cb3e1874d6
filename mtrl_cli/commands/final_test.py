"""The test at a run's end: games with other seeds than the validation's, by which nothing was chosen."""

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


def play(tester: Evaluator, network: MultiTaskNetwork, store: CheckpointStore, step: int, check: Callable[[], None]) -> dict[str, Any]:
    """What `eval/test.json` holds: the test of the last network, and of the best by validation where that is another.

    Args:
        tester: plays the test games.
        network: the last one; it is given back as it was.
        store: of the run, whose best checkpoint was chosen by validation.
        step: that the run has come to.
        check: is called between steps of the games, and may raise to stop.

    Returns: {"split": "test", "step", "seed", "last": a summary, "best": a summary or None}. The best is the last one's own summary where
        they are the same, and None where tasks without references leave nothing to choose by.
    """

    def test(at: int) -> dict[str, Any]:
        return evaluator.summarise(tester.play(network, check), tester.pack, at, str(at), split="test", seed=tester.seed)

    last, best = test(step), store.best()
    result = {"split": "test", "step": step, "seed": tester.seed, "last": last, "best": last if best == step else None}
    if best is None or best == step:
        return result
    own = copy.deepcopy(network.state_dict())
    try:
        # What is kept only as the best has no replay any more.
        _, state = CheckpointStore(store.folder, keep=1, with_replay=False).load(best)
        build_network.load_weights(network, state, f"checkpoint {best}")
    except UserError as error:  # no reason to fail at the end of a run of days
        print_line(f"the best checkpoint cannot be tested: {error}")
    else:
        result["best"] = test(best)
    finally:
        network.load_state_dict(own)
    return result


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """Its metrics by name: `test/return/<task>` of the last network, `test/best/return/<task>` of the best where that is another."""
    found = evaluator.metrics(result["last"], TEST)
    if is_another(result):
        found |= evaluator.metrics(result["best"], f"{TEST}best/") | {f"{TEST}best/step": float(result["best"]["step"])}
    return found


def is_another(result: dict[str, Any]) -> bool:
    """Whether the best by validation is another network than the last."""
    return result["best"] is not None and result["best"]["step"] != result["last"]["step"]


def titled(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The summaries, each with what it is of."""
    if is_another(result):
        return [("the last network", result["last"]), ("the best network by validation", result["best"])]
    return [("the last network" + ("" if result["best"] is None else ", the best by validation"), result["last"])]
