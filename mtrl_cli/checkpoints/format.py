"""The files of one checkpoint: three files of tensors, `state.json`, and `COMPLETE`, which is written last.

COMPLETE contains the SHA-256 of every other file, so that damage is detected on reading. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field

from mtrl_cli.checkpoints.replay_segments import ReplayRecord
from mtrl_cli.checkpoints.state_tree import Tensors, flatten, unflatten, with_own_storage
from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic

FORMAT = 2
OWN_FILES = ("model", "optimizer")  # these parts of the state have their own tensor files; all other tensors are in arrays.safetensors
GROUPS = (*OWN_FILES, "arrays")
FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json")


class UnsupportedFormat(UserError):
    """The checkpoint has another format version. Loading must not fall back to an older checkpoint."""


class Header(BaseModel):
    """Metadata of a checkpoint, in state.json.

    Attributes:
        step: environment steps per task.
        score: evaluation score, if one was saved.
        replays: one record per rank; empty if the checkpoint was saved without replay.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    format: int = FORMAT
    step: int
    score: Annotated[float, Field(allow_inf_nan=False)] | None
    replays: list[ReplayRecord]


def write_checkpoint(folder: Path, header: Header, state: dict[str, Any]) -> None:
    """Write a checkpoint into the new folder `folder` and sync the files to disk. Raises OSError.

    `state` is a nested dictionary of tensors, numpy arrays and plain values; its "model" and "optimizer" are dictionaries. Equal
    tensors of equal names give equal bytes.
    """
    tensors: dict[str, Tensors] = {group: {} for group in GROUPS}
    own_trees = {key: flatten(state[key], tensors[key]) for key in OWN_FILES if key in state}
    rest = flatten({key: value for key, value in state.items() if key not in OWN_FILES}, tensors["arrays"])
    described = header.model_dump() | {"state": {key: own_trees.get(key, rest.get(key)) for key in state}}
    folder.mkdir()
    sums = {}
    for name in FILES:
        group = name.removesuffix(".safetensors")
        data = _serialize(tensors[group]) if group in tensors else json.dumps(described, allow_nan=False).encode()
        atomic.write_synced(folder / name, [data])
        sums[name] = hashlib.sha256(data).hexdigest()
    atomic.write_synced(folder / "COMPLETE", [atomic.to_json(sums).encode()])
    atomic.sync_folder(folder)


def read_checkpoint(folder: Path, root: Path, device: str | torch.device) -> tuple[Header, dict[str, Any]]:
    """Return (header, state) of the checkpoint in `folder` after verifying every byte. Nothing outside `root` is read.

    "model" and "optimizer" are on `device`, all other tensors on the CPU.

    Raises:
        UserError: the checkpoint is unfinished, damaged or malformed.
        UnsupportedFormat: the checkpoint has another format version.
    """
    header, tree, contents = _read_files(folder, root)
    tensors = {group: _parse_tensors(contents[f"{group}.safetensors"], folder / f"{group}.safetensors") for group in GROUPS}
    for group in OWN_FILES:
        tensors[group] = {name: tensor.to(device) for name, tensor in tensors[group].items()}
    state = {key: unflatten(tree[key], tensors[key]) for key in OWN_FILES if key in tree}
    rest = unflatten({key: value for key, value in tree.items() if key not in OWN_FILES}, tensors["arrays"])
    unused = next((name for group in tensors.values() for name in group), None)
    if unused is not None or not isinstance(rest, dict):
        raise UserError(f"{folder} is damaged: its state does not name the tensor {unused!r}")
    return header, {key: state[key] if key in state else rest[key] for key in tree}


def read_header(folder: Path, root: Path) -> Header:
    """Read only the header of the checkpoint in `folder`, without verifying checksums. Raises UserError."""
    path = folder / "state.json"
    return _parse_header(atomic.read_bytes(path, root, atomic.MAX_JSON_BYTES), path)[0]


def to_bytes(state: dict[str, Any]) -> bytes:
    """Serialize a state (a nested dictionary of tensors, numpy arrays and plain values) to send it to another rank."""
    tensors: Tensors = {}
    tree = json.dumps(flatten(state, tensors), allow_nan=False).encode()
    return len(tree).to_bytes(8, "little") + tree + _serialize(tensors)


def from_bytes(data: bytes) -> dict[str, Any]:
    """Invert `to_bytes`."""
    start = 8 + int.from_bytes(data[:8], "little")
    tree: dict[str, Any] = unflatten(json.loads(data[8:start]), safetensors.torch.load(data[start:]))
    return tree


def _parse_header(data: bytes, path: Path) -> tuple[Header, dict[str, Any]]:
    """Return the header and the state tree in state.json."""
    described = atomic.parse_json(data, path)
    version = described.get("format")
    if type(version) is not int or version != FORMAT:
        raise UnsupportedFormat(f"{path} has checkpoint format {str(version)[:20]}; this version of mtrl reads only format {FORMAT}")
    tree = described.pop("state", None)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: state must be a JSON object")
    return atomic.validated(lambda: Header.model_validate(described), path), tree


def _read_files(folder: Path, root: Path) -> tuple[Header, dict[str, Any], dict[str, bytes]]:
    """Return the header, the state tree and the bytes of each file after verifying them against COMPLETE. Raises UserError."""
    complete, described = folder / "COMPLETE", folder / "state.json"
    if not complete.exists():
        raise UserError(f"{folder} is unfinished: COMPLETE is missing")
    contents = {"state.json": atomic.read_bytes(described, root, atomic.MAX_JSON_BYTES)}
    header, tree = _parse_header(contents["state.json"], described)
    sums = atomic.read_json(complete, root)
    for name in FILES:
        if name not in contents:
            contents[name] = atomic.read_bytes(folder / name, root)
        if hashlib.sha256(contents[name]).hexdigest() != sums.get(name):
            raise UserError(f"{folder / name} is damaged: checksum mismatch")
    return header, tree, contents


def _serialize(tensors: Tensors) -> bytes:
    """Return safetensors bytes that depend only on names and values, not on the order of `tensors`."""
    owned: Tensors = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = with_own_storage(tensors[name])
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # tied parameters: safetensors requires one storage per name
        storages.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return safetensors.torch.save(owned)


def _parse_tensors(data: bytes, path: Path) -> Tensors:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError, TypeError):
        raise UserError(f"{path} is not a safetensors file") from None
