"""One checkpoint's files: a header and three files of tensors, written so that damage is noticed when they are read.

COMPLETE, written last, holds the size and SHA-256 of every other file. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from mtrl_cli.checkpoints.replay_segments import own
from mtrl_cli.checkpoints.state_tree import Tensors, put_together, take_apart
from mtrl_cli.errors import UserError
from mtrl_cli.files import atomic

FORMAT = 1
OWN_FILES = ("model", "optimizer")  # parts of the state with a file of their own; other tensors share arrays.safetensors
GROUPS = (*OWN_FILES, "arrays")
FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json")


class NewerFormat(UserError):
    """Not damaged, but not ours to read: never a reason to fall back to an older checkpoint."""


def write_checkpoint(folder: Path, header: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the files of a checkpoint into `folder`, which is new, and wait until the disk has them. Raises OSError.

    `header` is plain JSON. `state` is a nested dictionary of tensors, numpy arrays and plain values, its "model" and "optimizer"
    dictionaries. Equal tensors of equal names give equal bytes.
    """
    tensors: dict[str, Tensors] = {group: {} for group in GROUPS}
    own_trees = {key: take_apart(state[key], tensors[key]) for key in OWN_FILES if key in state}
    rest = take_apart({key: value for key, value in state.items() if key not in OWN_FILES}, tensors["arrays"])
    header = {"format": FORMAT, **header, "state": {key: own_trees.get(key, rest.get(key)) for key in state}}
    folder.mkdir()
    sums = {}
    for name in FILES:
        group = name.removesuffix(".safetensors")
        data = _serialise(tensors[group]) if group in tensors else json.dumps(header, allow_nan=False).encode()
        atomic.write_synced(folder / name, [data])
        sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    atomic.write_synced(folder / "COMPLETE", [atomic.to_json({"format": FORMAT, "files": sums}).encode()])
    atomic.sync_folder(folder)


def read_checkpoint(folder: Path, root: Path, device: str | torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, state) of the checkpoint in `folder`, every byte checked; nothing outside `root` is read.

    "model" and "optimizer" come on `device`, other tensors on the CPU. Raises UserError for a checkpoint that is unfinished, damaged
    or foreign, and NewerFormat.
    """
    header, contents = _read_files(folder, root)
    tensors = {group: _parse(contents[f"{group}.safetensors"], folder / f"{group}.safetensors") for group in GROUPS}
    for group in OWN_FILES:
        tensors[group] = {name: tensor.to(device) for name, tensor in tensors[group].items()}
    tree = header.get("state")
    if not isinstance(tree, dict):
        raise UserError(f"{folder / 'state.json'} holds no state")
    state = {key: put_together(tree[key], tensors[key]) for key in OWN_FILES if key in tree}
    rest = put_together({key: value for key, value in tree.items() if key not in OWN_FILES}, tensors["arrays"])
    left = next((name for held in tensors.values() for name in held), None)
    if left is not None or not isinstance(rest, dict):
        raise UserError(f"{folder} holds a tensor {left!r} that its state does not name")
    return header, {key: state[key] if key in state else rest[key] for key in tree}


def to_bytes(state: dict[str, Any]) -> bytes:
    """A state for another rank of this run to keep: a nested dictionary of tensors, numpy arrays and plain values."""
    tensors: Tensors = {}
    tree = json.dumps(take_apart(state, tensors), allow_nan=False).encode()
    return len(tree).to_bytes(8, "little") + tree + _serialise(tensors)


def from_bytes(data: bytes) -> dict[str, Any]:
    """What `to_bytes` was given."""
    start = 8 + int.from_bytes(data[:8], "little")
    tree: dict[str, Any] = put_together(json.loads(data[8:start]), safetensors.torch.load(data[start:]))
    return tree


def _read_files(folder: Path, root: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(state.json's object, the bytes of each file), sizes and checksums agreeing with COMPLETE. Raises UserError."""
    complete, described = folder / "COMPLETE", folder / "state.json"
    if not complete.exists():
        raise UserError(f"{folder} is unfinished: it has no COMPLETE")
    contents = {"state.json": atomic.read_bytes(described, root, atomic.LARGEST_JSON)}
    header = atomic.parse_json(contents["state.json"], described)
    version = header.get("format")
    if type(version) is int and version > FORMAT:
        raise NewerFormat(f"{folder} has format {str(version)[:20]}, and this mtrl reads up to {FORMAT}: install a newer mtrl.")
    if type(version) is not int or version != FORMAT:
        raise UserError(f"{described} is no checkpoint of mtrl: its format is {str(version)[:20]}")
    sums = atomic.read_json(complete, root).get("files")
    if not isinstance(sums, dict):
        raise UserError(f"{complete} is damaged: it names no files")
    for name in FILES:
        path, expected = folder / name, sums.get(name)
        if not isinstance(expected, dict) or type(expected.get("bytes")) is not int:
            raise UserError(f"{complete} is damaged: it does not name {name}")
        if name not in contents:
            contents[name] = atomic.read_bytes(path, root, expected["bytes"])
        if len(contents[name]) != expected["bytes"]:
            raise UserError(f"{path} is truncated: {len(contents[name]):,} of {expected['bytes']:,} bytes")
        if hashlib.sha256(contents[name]).hexdigest() != expected.get("sha256"):
            raise UserError(f"{path} is damaged: its bytes have changed")
    return header, contents


def _serialise(tensors: Tensors) -> bytes:
    """The safetensors bytes; the same for the same names and values, in whatever order they were given."""
    owned: Tensors = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = own(tensors[name])
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # tied parameters: safetensors takes no two names of one storage
        storages.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return safetensors.torch.save(owned)


def _parse(data: bytes, path: Path) -> Tensors:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError, TypeError):
        raise UserError(f"{path} is not a file of tensors") from None
