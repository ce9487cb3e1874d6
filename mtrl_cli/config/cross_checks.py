"""Which values of a configuration, right key by key, make no sense together. Nothing is imported for it (see `signatures.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrl_cli.config.introspection import KINDS, class_name, read
from mtrl_cli.config.options import did_you_mean
from mtrl_cli.errors import UserError, show


def check_combinations(config: Mapping[str, Any], trusted: Sequence[str] = (), root: Path | None = None) -> None:
    """Refuse what is right key by key and makes no sense together, as far as can be told without building it.

    Raises:
        UserError: it names the keys and what to set.
    """
    _check_tasks(config["env"].get("tasks", []))
    _check_value_scale(config, trusted, root)
    _check_replay(config, trusted, root)
    _check_evaluations(config)
    _check_agent(config["agent"], config["env"].get("tasks", []), config["steps_per_task"])
    _check_transfer(config)
    _check_resets(config["resets"], config["steps_per_task"])
    if config["optimizer"].get("warm_up", 0) > config["steps_per_task"]:
        raise UserError(
            f"optimizer.warm_up={config['optimizer']['warm_up']} is beyond steps_per_task={config['steps_per_task']}: optimizer.lr would "
            "never be reached; lower the one or raise the other (both are steps per task)"
        )
    _check_draws(config)
    n_step, capacity = config["agent"].get("n_step", 1), config["replay"].get("capacity", "auto")
    if isinstance(capacity, int) and n_step >= capacity:
        raise UserError(f"replay.capacity={capacity} holds no window of agent.n_step={n_step}: raise the one or lower the other")
    shown, read_by = (
        read(f"{path}._target_", config[path]["_target_"], KINDS[path], trusted, root).attributes.get("observation_kind")
        for path in ("env", "network")
    )
    if shown and read_by and shown != read_by:
        pack, torso = config["env"]["name"], class_name(config["network"])
        raise UserError(
            f"env={pack} shows {shown}s, and network's {torso} reads {read_by}s: "
            "choose another network (mtrl ls network), or leave network= out for the pack's own"
        )


def _check_tasks(tasks: Sequence[str]) -> None:
    if not tasks:
        raise UserError("env.tasks=[]: expected the name of at least one task, such as env.tasks=[pong,breakout]")
    repeated = next((name for name in tasks if tasks.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"env.tasks names {show(repeated)} twice: expected each task once")


def _check_value_scale(config: Mapping[str, Any], trusted: Sequence[str], root: Path | None) -> None:
    """Heads whose values have fixed ends go with scales that keep returns within a known range, and with no others."""
    head, scale = config["network"]["head"], config["agent"]["value_scale"]
    if not read("network.head._target_", head["_target_"], KINDS["network/head"], trusted, root).attributes.get("bounded", False):
        return
    found_scale = read("agent.value_scale._target_", scale["_target_"], KINDS["agent/value_scale"], trusted, root)
    if not found_scale.attributes.get("bounds_returns", False):
        raise UserError(
            f"network/head's {class_name(head)} needs returns of a known range, "
            f"which agent/value_scale's {class_name(scale)} does not give: "
            "choose agent/value_scale=return_norm or clip, or network/head=plain, dueling or quantile"
        )
    limit, largest = scale.get("limit"), head.get("v_max")
    if limit is not None and largest is not None and limit > largest:
        raise UserError(
            f"agent.value_scale.limit={limit:g} is above network.head.v_max={largest:g}, beyond which the head knows no value: "
            "lower the one or raise the other"
        )


def _check_replay(config: Mapping[str, Any], trusted: Sequence[str], root: Path | None) -> None:
    """Agents that learn from rollouts go with what keeps these, and with no other replay."""
    agent, replay = config["agent"], config["replay"]
    learns_from, keeps = (
        read(f"{path}._target_", node["_target_"], KINDS[path], trusted, root).attributes.get("from_rollouts", False)
        for path, node in (("agent", agent), ("replay", replay))
    )
    if learns_from and not keeps:
        raise UserError(
            f"agent's {class_name(agent)} learns from rollouts, which replay's {class_name(replay)} does not keep: leave replay= out"
        )
    if keeps and not learns_from:
        raise UserError(
            f"replay's {class_name(replay)} forgets what agent's {class_name(agent)} would learn from: choose replay=uniform or prioritized"
        )
    length, parts, num_envs = agent.get("rollout_length"), agent.get("minibatches"), config["env"].get("num_envs")
    if not learns_from or length is None or num_envs is None:
        return
    if parts and length * num_envs % parts:
        raise UserError(
            f"agent.minibatches={parts} cannot divide a rollout into equal parts: agent.rollout_length={length} times "
            f"env.num_envs={num_envs} is {length * num_envs}; expected a divisor of {length * num_envs}"
        )
    if (length + 1) * num_envs > config["steps_per_task"]:
        raise UserError(
            f"steps_per_task={config['steps_per_task']}: agent.rollout_length={length} with env.num_envs={num_envs} needs "
            f"{(length + 1) * num_envs} steps per task before anything is learned (one more of each environment); lower these or raise it"
        )


def _check_evaluations(config: Mapping[str, Any]) -> None:
    games, metric = config["eval"], config["early_stopping"]["metric"]
    if games["test_seed"] == games["seed"] and games["test_episodes"] != 0:
        raise UserError(
            f"eval.test_seed={games['test_seed']} is eval.seed, so that the test would play the games by which the best checkpoint "
            "was chosen: expected another"
        )
    if metric is not None and games["every"] == 0:
        raise UserError(
            f"early_stopping.metric={show(metric)} with eval.every=0: there is no evaluation before the end to stop at; "
            "set eval.every, in steps per task"
        )


def _check_resets(resets: Mapping[str, Any], steps: int) -> None:
    """Resets that would change nothing."""
    if not resets["every"]:
        return
    if resets["shrink"] == 1 or not resets["parts"]:
        key = "shrink=1" if resets["parts"] else "parts=[]"
        raise UserError(f"resets.{key} resets nothing: expected resets.shrink below 1 and a part at least, or resets.every=0")
    if resets["every"] > resets["until"] * steps:
        raise UserError(
            f"resets.every={resets['every']} is beyond resets.until={resets['until']:g} of steps_per_task={steps}: nothing would be reset; "
            "lower the one or raise the others"
        )


def _check_draws(config: Mapping[str, Any]) -> None:
    """Several draws of a sample are the same one without an augmentation."""
    for key in ("loss_draws", "target_draws"):
        if config["agent"].get(key, 1) > 1 and not config["augmentation"]:
            raise UserError(
                f"agent.{key}={config['agent'][key]} averages over draws of an augmentation, and there is none: "
                "choose one (augmentation=shift), or leave it at 1"
            )


def _check_agent(agent: Mapping[str, Any], tasks: Sequence[str], steps: int) -> None:
    start, end = agent.get("epsilon_start", 1.0), agent.get("epsilon_end", 0.0)
    if end > start:
        raise UserError(f"agent.epsilon_end={end} is above agent.epsilon_start={start}: expected exploration to become less")
    for name, final in agent.get("epsilon_tasks", {}).items():
        if name not in tasks:
            raise UserError(f"agent.epsilon_tasks names {show(name)}, which is not in env.tasks: {did_you_mean(name, tasks)}")
        if final > start:
            raise UserError(
                f"agent.epsilon_tasks: {name}={final} is above agent.epsilon_start={start}: expected exploration to become less"
            )
    for name in agent.get("reward_factors", {}):
        if name not in tasks:
            raise UserError(f"agent.reward_factors names {show(name)}, which is not in env.tasks: {did_you_mean(name, tasks)}")
    if agent.get("target_period", 1) == 0 and not 0 < agent.get("target_tau", 1) <= 1:
        raise UserError(
            f"agent.target_period=0 with agent.target_tau={agent['target_tau']}: expected a rate above 0 and at most 1, "
            "or a period above 0, else the target network never follows"
        )
    if agent.get("learning_starts", 0) > steps:
        raise UserError(
            f"agent.learning_starts={agent['learning_starts']} is beyond steps_per_task={steps}: nothing would be learned; "
            "lower the one or raise the other (both are steps per task)"
        )


def _check_transfer(config: Mapping[str, Any]) -> None:
    keys = config["transfer"]
    freeze, unfreeze_at = keys["freeze"], keys["unfreeze_at"]
    if config["init_from"] == "":
        raise UserError("init_from is empty: expected the folder of a run, or null")
    if config["init_from"] is None and freeze != "none":
        raise UserError(f"transfer.freeze={freeze} would freeze what is random, as there is no source: give init_from=RUN")
    if config["init_from"] is None and keys["replay"]:
        raise UserError("transfer.replay=true goes on with a source's replay, and there is no source: give init_from=RUN")
    if keys["adapters"] == "lora" and freeze != "torso":
        raise UserError(f"transfer.adapters=lora is for a frozen torso, and transfer.freeze={freeze}: give transfer.freeze=torso")
    if unfreeze_at is not None and freeze == "none":
        raise UserError(
            f"transfer.unfreeze_at={unfreeze_at} has no effect with transfer.freeze=none: set transfer.freeze=torso, for example"
        )
    if unfreeze_at is not None and unfreeze_at > config["steps_per_task"]:
        raise UserError(
            f"transfer.unfreeze_at={unfreeze_at} is beyond steps_per_task={config['steps_per_task']}: no parameters would be unfrozen; "
            "lower transfer.unfreeze_at or omit it"
        )
