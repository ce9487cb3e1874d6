"""The types of a configuration: every key, what its value must be, and which combinations make no sense.

The sections that hold a class (`_target_`) take the keyword-only parameters of that class; the others are the dataclasses below.
Nothing is imported for it (see `signatures.py`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field, TypeAdapter, ValidationError

from mtrl_cli.catalogue import did_you_mean, nearest
from mtrl_cli.errors import UserError
from mtrl_cli.fields import Auto, Fraction, NonNegativeInt, Parameters, PositiveInt
from mtrl_cli.signatures import MISSING, UNKNOWN, Key, Signature, read

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<index>")]

LARGEST, LARGEST_FLOAT = 2**63, 1e30

KINDS = {
    "env": "mtrl_cli.envs.pack.Pack",
    "network": "mtrl_cli.networks.torsos.Torso",
    "network/sharing": "mtrl_cli.networks.sharing.Sharing",
    "network/head": "mtrl_cli.networks.heads.Head",
    "agent": "mtrl_cli.agents.agent.Agent",
    "agent/value_scale": "mtrl_cli.agents.value_scale.ValueScale",
    "optimizer": "mtrl_cli.optimizers.Optimizer",
    "replay": "mtrl_cli.replay.Replay",
    "task_weights": "mtrl_cli.task_weights.base.TaskWeights",
    "augmentation": "mtrl_cli.augmentation.Augmentation",
}
"""Each group, and the base class of what it holds."""


@dataclasses.dataclass(frozen=True)
class Training:
    """The keys at the top of a training configuration. Counts of steps are per task. `ranks` is what torchrun says, written down."""

    steps_per_task: PositiveInt
    seed: NonNegativeInt
    device: Device
    precision: Literal["auto", "fp32", "bf16"]
    compile: bool | Auto
    threads: PositiveInt | Auto
    run_dir: str | None
    trusted_packages: list[str]
    ranks: PositiveInt = 1


@dataclasses.dataclass(frozen=True)
class TrainingEvaluation:
    """When and how a run is evaluated. `every` 0: only at the end."""

    every: NonNegativeInt
    episodes: PositiveInt
    max_steps: PositiveInt
    epsilon: Fraction
    seed: NonNegativeInt


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written, how many are kept, and whether with the replay. `every` 0: only at the end."""

    every: NonNegativeInt
    keep: PositiveInt
    replay: bool


@dataclasses.dataclass(frozen=True)
class Logging:
    """How often figures are written, and how often the network is looked at for those of its sharing (0: never)."""

    every: PositiveInt
    diagnostics: NonNegativeInt = 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The keys at the top of `mtrl eval`'s configuration. None: as the run has it."""

    checkpoint: Literal["latest", "best"] | NonNegativeInt
    video: bool
    device: Device | None
    trusted_packages: list[str]


@dataclasses.dataclass(frozen=True)
class EvaluationGames:
    """How `mtrl eval` plays. None: as the run has it."""

    episodes: PositiveInt | None
    max_steps: PositiveInt | None
    epsilon: Fraction | None
    seed: NonNegativeInt | None


SECTIONS: dict[str, dict[str, type]] = {
    "train": {"": Training, "eval": TrainingEvaluation, "checkpoint": Checkpointing, "log": Logging},
    "eval": {"": Evaluation, "eval": EvaluationGames},
}
"""The sections without a class, of each command's configuration."""

OWN_KEYS = {
    "env": {"name": Key(Annotated[str, Field(pattern=r"^\w[\w.-]*$", description="letters, digits, '_', '.' and '-'")])},
    "network": {"parameters": Key(Parameters | None, None)},
}
"""Keys that a group has beyond what its class says of them: a pack's name is also that of the folder that its runs lie in,
a network's number of parameters decides on the width of whatever torso, sharing structure and head it is made of."""

NOT_THE_CLASSES = {"network": {"parameters"}}  # those of them that are not given to the class


def validate(config: Any, *, command: str = "train", trusted: Sequence[str] = (), root: Path | None = None) -> dict[str, Any]:
    """Check a configuration and fill in the defaults that it leaves out.

    Args:
        config: what was composed or loaded: untrusted.
        command: `train` or `eval`.
        trusted: packages other than ours whose classes may be named.
        root: the folder of our package.

    Returns: a new dictionary of plain values; every key is there, whole numbers where a float is expected are floats.

    Raises:
        UserError: a key that does not exist or is missing, a value of a wrong type, a class that may not be named,
            or a combination that makes no sense.
    """
    checked = _Checker(command, trusted, root).section("", config)
    if command == "train":
        check_combinations(checked, trusted, root)
    return checked


def dotted_keys(config: Any, *, command: str = "train", trusted: Sequence[str] = (), root: Path | None = None) -> dict[str, Any]:
    """All keys that this configuration may hold (`agent.n_step`), with their annotations. Sections that are no sections are passed over."""
    return dict(_Checker(command, trusted, root).walk("", config))


class _Checker:
    """Walks a configuration section by section; a section is named by its path, `network/head`, the whole by the empty one."""

    def __init__(self, command: str, trusted: Sequence[str], root: Path | None):
        self.sections = SECTIONS[command]
        self.kinds = KINDS if command == "train" else {}
        self.trusted = trusted
        self.root = root
        self.whole: Any = None

    def section(self, path: str, node: Any) -> dict[str, Any]:
        if path == "":
            self.whole = node
        if not isinstance(node, Mapping):
            raise UserError(f"{_dotted(path) or 'the configuration'}={show(node)}: expected a section of keys and values{_hint(path)}")
        keys = self.keys(path, node)
        children = self.children(path)
        allowed = {*keys, *children, *(["_target_"] if path in self.kinds else [])}
        for name in node:
            if name not in allowed:
                raise UserError(self.unknown(path, name, node))
        checked: dict[str, Any] = {"_target_": node["_target_"]} if path in self.kinds else {}
        for name, key in keys.items():
            value = node.get(name, key.default)
            if value is MISSING:
                raise UserError(f"{_join(path, name)} is missing: expected {describe(key.annotation)}")
            if value is not UNKNOWN:
                checked[name] = check_value(_join(path, name), value, key.annotation)
        for child in children:
            if child not in node:
                raise UserError(f"{_join(path, child)} is missing: expected a section of keys and values")
            checked[child] = self.section(f"{path}/{child}".lstrip("/"), node[child])
        return checked

    def keys(self, path: str, node: Mapping[str, Any]) -> dict[str, Key]:
        """The keys of a section, apart from its `_target_` and the sections within."""
        if path not in self.kinds:
            return keys_of(self.sections[path])
        return {**self.signature(path, node).keys, **OWN_KEYS.get(path, {})}

    def signature(self, path: str, node: Mapping[str, Any]) -> Signature:
        if "_target_" not in node:
            raise UserError(f"{_dotted(path)} has no _target_: choose one of `mtrl ls {path}` with {path}=NAME")
        return read(_join(path, "_target_"), node["_target_"], self.kinds[path], self.trusted, self.root)

    def children(self, path: str) -> list[str]:
        """The names of the sections within a section."""
        below = [name for name in (*self.kinds, *self.sections) if name and name.rpartition("/")[0] == path]
        return [name.rpartition("/")[2] for name in below]

    def walk(self, path: str, node: Any) -> Iterator[tuple[str, Any]]:
        try:
            keys = self.keys(path, node) if isinstance(node, Mapping) else {}
        except UserError:
            keys = {}
        for name, key in keys.items():
            yield _join(path, name), key.annotation
        for child in self.children(path):
            if isinstance(node, Mapping):
                yield from self.walk(f"{path}/{child}".lstrip("/"), node.get(child))

    def unknown(self, path: str, name: Any, node: Mapping[str, Any]) -> str:
        """What to say about a key that does not exist: the nearest here, else the nearest anywhere."""
        word = _join(path, show(name))
        if path == "" and (group := next((group for group in self.kinds if group.rpartition("/")[2] == name), None)):
            return f"{word}: there is no such key; to choose one write {group}={show(node[name])}"
        here = [*self.keys(path, node), *self.children(path)]
        elsewhere = {each.rpartition(".")[2]: each for each in dict(self.walk("", self.whole))}
        near = nearest(str(name), here)
        meant = _join(path, near) if near else elsewhere.get(nearest(str(name), elsewhere) or "")
        what = f"did you mean {meant}?" if meant else f"{_dotted(path) or 'it'} takes {', '.join(here) or 'no keys'}"
        return f"{word}: there is no such key{_of(node, path)}; {what}"


def keys_of(section: type) -> dict[str, Key]:
    """The keys of a dataclass, and the defaults that it has for configurations from before there was such a key."""
    annotations = typing.get_type_hints(section, include_extras=True)
    fields = {field.name: field.default for field in dataclasses.fields(section)}
    return {name: Key(annotations[name], MISSING if default is dataclasses.MISSING else default) for name, default in fields.items()}


def check_value(key: str, value: Any, annotation: Any) -> Any:
    """The value as its annotation has it. Strict: no text is a number, no bool an int; only an int may stand for a float.

    Raises:
        UserError: it is something else.
    """
    _refuse_huge(key, value)
    if isinstance(value, float) and value.is_integer() and _takes_int(annotation):
        value = int(value)  # 1e6 is how one writes a budget
    try:
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        raise UserError(f"{key}={show(value)}: expected {describe(annotation)}") from None


def _refuse_huge(key: str, value: Any) -> None:
    """Numbers that int64 or float32 cannot hold, wherever in a value they are."""
    for each in [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []:
        _refuse_huge(key, each)
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{key}={show(value)}: expected a number below 2**63")
    if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_FLOAT:
        raise UserError(f"{key}={show(value)}: expected a number from -1e30 to 1e30")


def _takes_int(annotation: Any) -> bool:
    """Whether an annotation takes whole numbers and no others."""
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType):
        kinds = [each for each in typing.get_args(annotation) if isinstance(each, type) or typing.get_origin(each) is not None]
        return float not in kinds and any(_takes_int(each) for each in kinds)
    return annotation is int


def describe(annotation: Any) -> str:
    """What an annotation expects, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _describe_annotated(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    if origin is Literal:
        return " or ".join(str(each) for each in arguments)
    if origin is list:
        return "a list of names" if arguments[0] is str else f"a list, each {describe(arguments[0])}"
    if origin is dict:
        return f"names with values, each {describe(arguments[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _describe_annotated(base: Any, metadata: Sequence[Any]) -> str:
    words = describe(base)
    for field in metadata:
        if getattr(field, "description", None):
            return str(field.description)
        bounds = {type(each): each for each in getattr(field, "metadata", [])}
        if Ge in bounds and Le in bounds:
            words += f" from {bounds[Ge].ge} to {bounds[Le].le}"
        elif Gt in bounds:
            words += f" above {bounds[Gt].gt}"
        elif Ge in bounds:
            words += f" of at least {bounds[Ge].ge}"
        elif MinLen in bounds:
            words += f"{',' if ',' in words else ''} that is not empty"
    return words


def check_combinations(config: Mapping[str, Any], trusted: Sequence[str] = (), root: Path | None = None) -> None:
    """Refuse what is right key by key and makes no sense together, as far as can be told without building it.

    Raises:
        UserError: it names the keys and what to set.
    """
    _check_tasks(config["env"].get("tasks", []))
    _check_value_scale(config, trusted, root)
    _check_agent(config["agent"], config["env"].get("tasks", []), config["steps_per_task"])
    n_step, capacity = config["agent"].get("n_step", 1), config["replay"].get("capacity", "auto")
    if isinstance(capacity, int) and n_step >= capacity:
        raise UserError(f"replay.capacity={capacity} holds no window of agent.n_step={n_step}: raise the one or lower the other")
    shown, read_by = (
        read(f"{path}._target_", config[path]["_target_"], KINDS[path], trusted, root).attributes.get("observation_kind")
        for path in ("env", "network")
    )
    if shown and read_by and shown != read_by:
        pack, torso = config["env"]["name"], _class(config["network"])
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
            f"network/head's {_class(head)} needs returns of a known range, which agent/value_scale's {_class(scale)} does not give: "
            "choose agent/value_scale=return_norm or clip, or network/head=plain, dueling or quantile"
        )
    limit, largest = scale.get("limit"), head.get("v_max")
    if limit is not None and largest is not None and limit > largest:
        raise UserError(
            f"agent.value_scale.limit={limit:g} is above network.head.v_max={largest:g}, beyond which the head knows no value: "
            "lower the one or raise the other"
        )


def _class(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]


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


def show(value: Any) -> str:
    """A value for a message: on one line, and short."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
    if not re.fullmatch(r"[\w./:,@+\[\]{} '-]+", text):
        text = repr(text)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _join(path: str, name: str) -> str:
    return f"{_dotted(path)}.{name}" if path else name


def _hint(path: str) -> str:
    return f"; to choose one: {path}=NAME, see `mtrl ls {path}`" if path in KINDS else ""


def _of(node: Mapping[str, Any], path: str) -> str:
    return f" in {_class(node)}" if path in KINDS and isinstance(node.get("_target_"), str) else ""
