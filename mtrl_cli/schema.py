"""The types of a configuration: every key, and what its value must be. Which values make no sense together: `combinations.py`.

The sections that hold a class (`_target_`) take the keyword-only parameters of that class; the others are the dataclasses below.
Nothing is imported for it (see `signatures.py`).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field, TypeAdapter, ValidationError

from mtrl_cli import catalogue
from mtrl_cli.catalogue import nearest
from mtrl_cli.combinations import check_combinations
from mtrl_cli.errors import UserError, show
from mtrl_cli.fields import Auto, Fraction, NonNegativeFloat, NonNegativeInt, Parameters, PositiveInt
from mtrl_cli.signatures import KINDS, MISSING, SEVERAL, UNKNOWN, Key, Signature, class_name, kind_of, read

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<index>")]

Freeze = Annotated[
    str, Field(pattern=r"^(none|torso|torso:[1-9]\d{0,3}|all_but_heads)$", description="none, torso, torso:N (N layers) or all_but_heads")
]

LARGEST, LARGEST_FLOAT = 2**63, 1e30


@dataclasses.dataclass(frozen=True)
class Training:
    """The keys at the top of a training configuration. Counts of steps are per task. `ranks` is what torchrun says, written down."""

    steps_per_task: PositiveInt
    seed: NonNegativeInt
    device: Device
    precision: Literal["auto", "fp32", "tf32", "bf16"]
    compile: bool | Auto
    threads: PositiveInt | Auto
    run_dir: str | None
    trusted_packages: list[str]
    groups: PositiveInt | Auto = 1
    ranks: PositiveInt = 1
    init_from: str | None = None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What becomes of the parameters that `init_from` brings. Counts of steps are per task."""

    freeze: Freeze = "none"
    unfreeze_at: PositiveInt | None = None
    gradual: bool = False
    adapters: Literal["none", "lora"] = "none"
    rank: PositiveInt = 4
    replay: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingEvaluation:
    """When and how a run is evaluated. `every` 0: only at the end. `test_episodes` None: as `episodes`; 0: no test."""

    every: NonNegativeInt
    episodes: PositiveInt
    max_steps: PositiveInt
    epsilon: Fraction
    seed: NonNegativeInt
    at_start: bool = False
    test_seed: NonNegativeInt = 2000003
    test_episodes: NonNegativeInt | None = None


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """By which figure of its evaluations a run is stopped before its budget is used up. `figure` None: by none."""

    figure: str | None = None
    patience: PositiveInt = 5
    min_delta: NonNegativeFloat = 0.0


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
class Resets:
    """When parts of the network are brought back towards fresh parameters, and how far. `every` 0: never."""

    every: NonNegativeInt = 0
    shrink: Fraction = 0.5
    parts: list[Literal["torso", "sharing", "heads"]] = dataclasses.field(default_factory=lambda: ["torso", "sharing", "heads"])
    until: Fraction = 0.8


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
    "train": {
        "": Training,
        "eval": TrainingEvaluation,
        "early_stopping": EarlyStopping,
        "checkpoint": Checkpointing,
        "log": Logging,
        "transfer": Transfer,
        "resets": Resets,
    },
    "eval": {"": Evaluation, "eval": EvaluationGames},
}
"""The sections without a class, of each command's configuration."""

OWN_KEYS = {
    "env": {"name": Key(Annotated[str, Field(pattern=r"^\w[\w.-]*$", description="letters, digits, '_', '.' and '-'")])},
    "network": {"parameters": Key(Parameters | None, None)},
}
"""Keys that a group has beyond what its class says of them: a pack's name is also that of the folder that its runs lie in,
a network's number of parameters decides on the width of whatever torso, sharing structure and head it is made of."""

NONE_BEFORE = "mtrl_cli.augmentation.NoAugmentation"
"""What stood for no augmentation when there was one section for all."""

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
        if path in SEVERAL:
            return {name: self.section(f"{path}/{name}", inner) for name, inner in self.several(path, node).items()}
        keys = self.keys(path, node)
        children = self.children(path)
        allowed = {*keys, *children, *(["_target_"] if kind_of(path) else [])}
        for name in node:
            if name not in allowed:
                raise UserError(self.unknown(path, name, node))
        checked: dict[str, Any] = {"_target_": node["_target_"]} if kind_of(path) else {}
        for name, key in keys.items():
            value = node.get(name, key.default)
            if value is MISSING:
                raise UserError(f"{_join(path, name)} is missing: expected {describe(key.annotation)}")
            if value is not UNKNOWN:
                checked[name] = check_value(_join(path, name), value, key.annotation)
        for child in children:
            if child not in node and not self.may_be_left_out(f"{path}/{child}".lstrip("/")):
                raise UserError(f"{_join(path, child)} is missing: expected a section of keys and values")
            checked[child] = self.section(f"{path}/{child}".lstrip("/"), node.get(child, {}))
        return checked

    def may_be_left_out(self, path: str) -> bool:
        """Whether a section is one that older configurations do not have: all its keys have defaults."""
        return path in self.sections and all(key.default is not MISSING for key in keys_of(self.sections[path]).values())

    def keys(self, path: str, node: Mapping[str, Any]) -> dict[str, Key]:
        """The keys of a section, apart from its `_target_` and the sections within."""
        if not kind_of(path):
            return keys_of(self.sections[path])
        return {**self.signature(path, node).keys, **OWN_KEYS.get(path, {})}

    def signature(self, path: str, node: Mapping[str, Any]) -> Signature:
        kind = kind_of(path)
        assert kind is not None, path
        if "_target_" not in node:
            group, name = path.rpartition("/")[::2] if path not in KINDS else (path, "NAME")
            options = catalogue.options(group, [catalogue.conf_folder()])
            if name != "NAME" and name not in options:
                raise UserError(f"{group}.{show(name)}: there is no such option; {catalogue.did_you_mean(name, options)}")
            chosen = "" if name == "NAME" else f"; {show(name)} is not chosen here"
            raise UserError(f"{_dotted(path)} has no _target_{chosen}: choose one of `mtrl ls {group}` with {group}={show(name)}")
        return read(_join(path, "_target_"), node["_target_"], kind, self.trusted, self.root)

    def several(self, path: str, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """The sections of a group of which several may be chosen. In runs from before, a section was that of a single class."""
        if node.get("_target_") == NONE_BEFORE and len(node) == 1:
            return {}
        for name, inner in node.items():
            if name == "_target_":
                raise UserError(
                    f"{path}._target_={show(inner)}: expected it in a section of its own; "
                    f"an option's file begins with `# @package {path}.NAME`"
                )
            if not isinstance(name, str) or not name.isidentifier() or not isinstance(inner, Mapping):
                owner = next((each for each in node if isinstance(node[each], Mapping) and name in node[each]), "NAME")
                raise UserError(f"{path}.{show(name)}={show(inner)}: expected {path}.{show(owner)}.{show(name)}, or another of its keys")
        return node

    def children(self, path: str) -> list[str]:
        """The names of the sections within a section."""
        below = [name for name in (*self.kinds, *self.sections) if name and name.rpartition("/")[0] == path]
        return [name.rpartition("/")[2] for name in below]

    def walk(self, path: str, node: Any) -> Iterator[tuple[str, Any]]:
        if path in SEVERAL:
            for name, inner in node.items() if isinstance(node, Mapping) else ():
                yield from self.walk(f"{path}/{name}", inner)
            return
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
        group = path if path in KINDS else path.rpartition("/")[0]
        owner = next((option for option in _options_with(group, str(name)) if kind_of(path)), None)
        if owner is not None:
            return f"{word}: there is no such key{_of(node, path)}; it is one of {group}={owner}"
        here = [*self.keys(path, node), *self.children(path)]
        elsewhere = {each.rpartition(".")[2]: each for each in dict(self.walk("", self.whole))}
        near = nearest(str(name), here)
        # A key of another section is what was meant only if it is that very word, or nearly so.
        meant = _join(path, near) if near else elsewhere.get(nearest(str(name), elsewhere, cutoff=0.6 if path == "" else 0.75) or "")
        what = f"did you mean {meant}?" if meant else f"{_dotted(path) or 'it'} takes {', '.join(here) or 'no keys'}"
        return f"{word}: there is no such key{_of(node, path)}; {what}"


def _options_with(group: str, key: str) -> Iterator[str]:
    """The options of a group, of ours, whose YAML holds a key."""
    for option, file in catalogue.options(group, [catalogue.conf_folder()]).items() if group else ():
        content = catalogue.read_yaml(file)
        if key in content or key in (content.get(group) or {}):
            yield option


def keys_of(section: type) -> dict[str, Key]:
    """The keys of a dataclass, and the defaults that it has for configurations from before there was such a key."""
    annotations = typing.get_type_hints(section, include_extras=True)
    fields = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(section)
    }
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
        what = "names with values" if arguments[0] is str else f"values for {describe(arguments[0])}"
        return f"{what}, each {describe(arguments[1])}"
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


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _join(path: str, name: str) -> str:
    return f"{_dotted(path)}.{name}" if path else name


def _hint(path: str) -> str:
    return f"; to choose one: {path}=NAME, see `mtrl ls {path}`" if path in KINDS else ""


def _of(node: Mapping[str, Any], path: str) -> str:
    return f" in {class_name(node)}" if kind_of(path) and isinstance(node.get("_target_"), str) else ""
