"""Checks of values that are valid individually but contradict each other. Nothing is imported (see `introspection.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtrl_cli.config.introspection import KINDS, class_name, read
from mtrl_cli.errors import UserError, show, unknown


def check_combinations(config: Mapping[str, Any], trusted: Sequence[str]) -> None:
    """Refuse combinations of values that contradict each other, as far as this is known without building the run.

    Raises:
        UserError: the message names the keys and what to set.
    """

    def attribute(path: str, name: str, default: Any = None) -> Any:
        """Read a class attribute of the class that a section names."""
        node: Any = config
        for part in path.split("/"):
            node = node[part]
        found = read(f"{path.replace('/', '.')}._target_", node["_target_"], KINDS[path], trusted)
        return found.attributes.get(name, default)

    steps, tasks = config["steps_per_task"], config["env"].get("tasks", [])
    _check_tasks(tasks)
    if attribute("network/head", "bounded", False):
        _check_bounded_head(
            config["network"]["head"], config["agent"]["value_scale"], attribute("agent/value_scale", "bounds_returns", False)
        )
    _check_replay(config, attribute("agent", "from_rollouts", False), attribute("replay", "from_rollouts", False))
    _check_evaluations(config["eval"], config["early_stopping"]["metric"])
    _check_agent(config["agent"], tasks)
    _check_augmentation(config["agent"], config["augmentation"])
    _check_transfer(config["init_from"], config["transfer"])
    _check_resets(config["resets"], steps)
    _check_within_budget("agent.learning_starts", config["agent"].get("learning_starts", 0), steps)
    _check_within_budget("transfer.unfreeze_at", config["transfer"]["unfreeze_at"] or 0, steps)
    _check_within_budget("optimizer.warm_up", config["optimizer"].get("warm_up", 0), steps)
    required, available = attribute("network", "observation_kind"), attribute("env", "observation_kind")
    if required and available:
        check_observations(config, required, available)


def check_observations(config: Mapping[str, Any], required: str, available: str) -> None:
    """Refuse a network that requires other observations than the pack has: image or vector."""
    if required != available:
        raise UserError(
            f"network={class_name(config['network'])} requires {required} observations, and env={config['env']['name']} has {available} "
            "observations. Choose another network (mtrl ls network), or omit network= for the pack's default"
        )


def _check_within_budget(key: str, steps: int, budget: int) -> None:
    if steps > budget:
        raise UserError(f"{key} must be at most steps_per_task={budget}, got {steps} (both are steps per task)")


def _check_tasks(tasks: Sequence[str]) -> None:
    if not tasks:
        raise UserError("env.tasks must name at least one task, such as env.tasks=[pong,breakout], got []")
    repeated = next((name for name in tasks if tasks.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"env.tasks contains {show(repeated)} twice. List each task once")


def _check_bounded_head(head: Mapping[str, Any], scale: Mapping[str, Any], bounds_returns: bool) -> None:
    """Heads with a fixed range of values require a value scale that bounds returns."""
    if not bounds_returns:
        raise UserError(
            f"network/head={class_name(head)} requires bounded returns, and agent/value_scale={class_name(scale)} does not bound returns. "
            "Choose agent/value_scale=return_norm or clip, or network/head=plain, dueling or quantile"
        )
    limit, largest = scale.get("limit"), head.get("v_max")
    if limit is not None and largest is not None and limit > largest:
        raise UserError(
            f"agent.value_scale.limit must be at most network.head.v_max={largest:g}, the largest value of the head, got {limit:g}"
        )


def _check_replay(config: Mapping[str, Any], needs_rollouts: bool, keeps_rollouts: bool) -> None:
    agent, replay, steps = config["agent"], config["replay"], config["steps_per_task"]
    if needs_rollouts and not keeps_rollouts:
        raise UserError(f"agent={class_name(agent)} requires replay=rollouts, got {class_name(replay)}. Remove the override of replay")
    if keeps_rollouts and not needs_rollouts:
        raise UserError(
            f"replay={class_name(replay)} requires an agent that learns from rollouts, got agent={class_name(agent)}. "
            "Choose replay=uniform or replay=prioritized"
        )
    n_step, capacity = agent.get("n_step", 1), replay.get("capacity", "auto")
    if isinstance(capacity, int) and n_step >= capacity:
        raise UserError(f"replay.capacity must be above agent.n_step={n_step}, got {capacity}")
    length, minibatches, num_envs = agent.get("rollout_length"), agent.get("minibatches"), config["env"].get("num_envs")
    if not needs_rollouts or length is None or num_envs is None:
        return
    if minibatches and length * num_envs % minibatches:
        raise UserError(
            f"agent.minibatches must divide agent.rollout_length * env.num_envs = {length} * {num_envs} = {length * num_envs}, "
            f"got {minibatches}"
        )
    if (length + 1) * num_envs > steps:
        raise UserError(
            f"steps_per_task must be at least (agent.rollout_length + 1) * env.num_envs = {(length + 1) * num_envs}, got {steps}"
        )


def _check_evaluations(evaluation: Mapping[str, Any], metric: str | None) -> None:
    if evaluation["test_seed"] == evaluation["seed"] and evaluation["test_episodes"] != 0:
        raise UserError(
            f"eval.test_seed must differ from eval.seed, got {evaluation['test_seed']} for both: "
            "the test would replay the episodes that selected the best checkpoint"
        )
    if metric is not None and evaluation["every"] == 0:
        raise UserError(
            f"early_stopping.metric={show(metric)} requires evaluations during the run. Set eval.every above 0 (steps per task)"
        )


def _check_resets(resets: Mapping[str, Any], steps: int) -> None:
    if not resets["every"]:
        return
    if resets["shrink"] == 1 or not resets["parts"]:
        key = "shrink=1" if resets["parts"] else "parts=[]"
        raise UserError(f"resets.{key} resets nothing. Set resets.shrink below 1 and name a part in resets.parts, or set resets.every=0")
    if resets["every"] > resets["until"] * steps:
        raise UserError(
            f"resets.every={resets['every']} is beyond resets.until={resets['until']:g} of steps_per_task={steps}, so nothing is reset. "
            "Lower resets.every, or raise resets.until or steps_per_task"
        )


def _check_augmentation(agent: Mapping[str, Any], augmentation: Mapping[str, Any]) -> None:
    for key in ("loss_draws", "target_draws"):
        if agent.get(key, 1) > 1 and not augmentation:
            raise UserError(
                f"agent.{key}={agent[key]} requires an augmentation. Choose an augmentation (augmentation=shift), or set agent.{key}=1"
            )


def _check_agent(agent: Mapping[str, Any], tasks: Sequence[str]) -> None:
    start = agent.get("epsilon_start", 1.0)
    finals = agent.get("epsilon_tasks", {})
    for key in ("epsilon_tasks", "reward_factors"):
        for name in agent.get(key, {}):
            if name not in tasks:
                raise UserError(unknown("task", name, tasks, where=f" in agent.{key}"))
    for key, final in {
        "epsilon_end": agent.get("epsilon_end", 0.0),
        **{f"epsilon_tasks.{name}": final for name, final in finals.items()},
    }.items():
        if final > start:
            raise UserError(f"agent.{key} must be at most agent.epsilon_start={start}, got {final}")
    if agent.get("target_period", 1) == 0 and not 0 < agent.get("target_tau", 1) <= 1:
        raise UserError(
            f"agent.target_tau must be above 0 and at most 1 with agent.target_period=0, got {agent['target_tau']}: "
            "the target network would never be updated"
        )


def _check_transfer(init_from: str | None, transfer: Mapping[str, Any]) -> None:
    freeze, unfreeze_at = transfer["freeze"], transfer["unfreeze_at"]
    if init_from == "":
        raise UserError("init_from must be a run folder or null, got an empty text")
    if init_from is None and freeze != "none":
        raise UserError(f"transfer.freeze={freeze} freezes loaded parameters only, but init_from is null. Set init_from=RUN")
    if init_from is None and transfer["replay"]:
        raise UserError("transfer.replay=true loads the replay of a source run, but init_from is null. Set init_from=RUN")
    if transfer["adapters"] == "lora" and freeze != "torso":
        raise UserError(f"transfer.adapters=lora requires transfer.freeze=torso, got transfer.freeze={freeze}")
    if unfreeze_at is not None and freeze == "none":
        raise UserError(f"transfer.unfreeze_at={unfreeze_at} has no effect with transfer.freeze=none. Set transfer.freeze=torso")
