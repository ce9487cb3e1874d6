"""`mtrl bench`: measure the speed of a configuration on this machine, in parts and as a whole, and compare it with the limit."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from mtrl_cli.build import resolve_auto
from mtrl_cli.build import run as build_run
from mtrl_cli.errors import UserError
from mtrl_cli.parallel import torchrun
from mtrl_cli.runs import terminal
from mtrl_cli.runs.stop_signal import StopRequest
from mtrl_cli.training import throughput
from mtrl_cli.training.loop import Loop

ROUNDS = 5
# Replay capacity in steps per task: quick to fill, and too large for the processor's caches.
_CAPACITY = 4096
_PARTS_OF_CLOCK = {"emulators": "env", "acting": "act", "learning": "learn"}
_ADVICE = {
    "emulators": "only more cores would help",
    "acting": "more environments (env.num_envs), a smaller network or a GPU would help",
    "learning": "fewer samples per step (agent.{samples}), a smaller network or a GPU would help",
}


def run(config: dict[str, Any], *, seconds: float, as_json: bool) -> None:
    """Measure a run without writing anything, and print the result. Progress goes to stderr.

    Args:
        config: the validated configuration of `mtrl train`.
        seconds: total measuring time.
        as_json: whether to print one JSON object instead of a table.

    Raises:
        UserError: the configuration cannot be trained on this machine.
        Stopped: stopped by a signal.
    """
    if torchrun.place().size > 1:
        raise UserError("mtrl bench measures a single process. Start mtrl bench without torchrun")
    with StopRequest() as stop, stop.interruptible():
        if config["init_from"] is not None:
            _note("init_from, transfer.freeze and transfer.replay are ignored: the benchmark trains all parameters")
            config = config | {"init_from": None, "transfer": config["transfer"] | {"freeze": "none", "replay": False}}
        pack = build_run.make_pack(config)
        config = resolve_auto.resolve(config, pack, _note)
        for line in resolve_auto.describe(config, pack):
            _note(line)
        parts = build_run.make_run(_without_warmup(config, pack.num_envs), pack, _note)
        loop = parts.open_loop()
        try:
            result = _measure(config, parts, loop, seconds)
        finally:
            loop.close()
    if as_json:
        print(json.dumps(result, indent=2))
        return
    terminal.console(sys.stdout).print(_table(result))
    for line in _lines(result):
        print(line)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _without_warmup(config: dict[str, Any], num_envs: int) -> dict[str, Any]:
    """Return the configuration with learning from the first step and a small replay."""
    agent, replay = dict(config["agent"]), dict(config["replay"])
    if "learning_starts" in agent:
        agent["learning_starts"] = 0
    if "capacity" in replay:
        needed = 2 * (agent["n_step"] + config["env"].get("stack", 1) + 1) * num_envs
        replay["capacity"] = min(replay["capacity"], max(_CAPACITY, needed))
        if replay["capacity"] < config["replay"]["capacity"]:
            _note(f"replay: measuring with a capacity of {replay['capacity']:,} transitions per task")
    return config | {"agent": agent, "replay": replay}


def _measure(config: dict[str, Any], run: build_run.Run, loop: Loop, seconds: float) -> dict[str, Any]:
    """Measure every part and the loop in rounds. Returns the settings that determine the speed, and rates: medians over rounds."""
    begun = time.perf_counter()
    if config["compile"]:
        _note("compiling the update: seconds if cached, else about a minute")
        run.learner.warm_up()
    compiling = time.perf_counter() - begun
    loop.reset()
    loop.step = config["steps_per_task"]  # final epsilon
    meter = throughput.Meter(loop, config["seed"])
    meter.fill(run.replay.capacity_rows)
    meter.warm_up()
    for index in range(ROUNDS):
        _note(f"measuring, round {index + 1} of {ROUNDS}")
        meter.round(seconds / ROUNDS)
    measured, tasks = meter.measured, run.pack.tasks
    rates = measured.medians
    parts = {part: rates[part] for part in throughput.PARTS if part != "loop"}
    shared_cores = run.device.type == "cpu"
    limit = throughput.limit(**parts, shared_cores=shared_cores)
    spec = run.replay.spec
    return {
        **{key: config[key] for key in ("device", "precision", "compile", "threads")},
        "tasks": [task.name for task in tasks],
        "num_envs": run.pack.num_envs,
        "batch_size": run.agent.batch_size,
        "samples_per_step": run.agent.samples_per_step,
        **rates,
        "limit": limit,
        "share": rates["loop"] / limit,
        "limited_by": _limited_by(parts, shared_cores).format(samples="epochs" if run.agent.updates_per_rollout else "samples_per_step"),
        "spread": {part: [min(each), max(each)] for part, each in measured.rates.items()},
        "split": measured.split,
        "bytes_per_transition": run.replay.nbytes / (run.replay.capacity_rows * spec.num_envs * spec.num_tasks),
        "updates_per_second": measured.loop_updates / measured.loop_seconds,
        "samples_per_second": measured.loop_updates * run.agent.batch_size * len(tasks) / measured.loop_seconds,
        "frames_per_second": rates["loop"] * tasks[0].frames_per_step,
        "seconds_to_compile": compiling if config["compile"] else 0.0,
    }


def _limited_by(parts: Mapping[str, float], shared_cores: bool) -> str:
    """Describe the bottleneck in one line."""
    if not shared_cores and parts["emulators"] <= throughput.limit(**parts, shared_cores=False):
        return f"the emulators are slower than the device: {_ADVICE['emulators']}"
    shares = throughput.shares_of_limit(**parts)
    whole = "of the work"
    if not shared_cores:
        together = shares["acting"] + shares["learning"]
        shares = {part: shares[part] / together for part in ("acting", "learning")}
        whole = "of the device's work, for which the emulators wait"
    slowest = max(shares, key=lambda part: shares[part])
    return f"{slowest} is {shares[slowest]:.0%} {whole}: {_ADVICE[slowest]}"


def _table(result: Mapping[str, Any]) -> RenderableType:
    rows = []
    for part in throughput.PARTS:
        split = result["split"].get(_PARTS_OF_CLOCK.get(part, ""))
        name = "complete loop" if part == "loop" else f"{part} only"
        rates = [f"{rate:,.0f}" for rate in (result[part], *result["spread"][part])]
        rows.append([name, *rates, "" if split is None else f"{split:.0%}"])
    header = ("part", "steps/s", "lowest", "highest", "share of run time")
    return terminal.table(rows, header, right=header[1:])


def _lines(result: Mapping[str, Any]) -> list[str]:
    compiled = f", compiled in {result['seconds_to_compile']:.0f} s" if result["compile"] else ""
    return [
        f"limit        {result['limit']:,.0f} steps/s; the loop reaches {result['share']:.0%} of it",
        f"bottleneck   {result['limited_by']}",
        f"memory       {result['bytes_per_transition']:,.0f} bytes per transition in the replay",
        f"throughput   {result['updates_per_second']:,.1f} updates/s, {result['samples_per_second']:,.0f} samples/s, "
        f"{result['frames_per_second']:,.0f} frames/s, over all {len(result['tasks'])} tasks{compiled}",
    ]
