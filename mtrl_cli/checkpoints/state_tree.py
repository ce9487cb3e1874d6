"""Convert a nested state (dictionaries and lists of tensors, arrays and plain values) to JSON and named tensors, and back.

A tensor is a marker in the JSON tree. The tensor's name is its path: the keys joined by slashes. A slash within a key becomes `~1` and a
tilde `~0`, as in JSON Pointer (RFC 6901), so that no two paths share a name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from mtrl_cli.errors import UserError

MARK = "$"  # {"$": "tensor"}, {"$": "array"}, {"$": "nan"}: values that JSON cannot represent
MAX_DEPTH = 64
Tensors = dict[str, torch.Tensor]


def flatten(value: Any, tensors: Tensors, path: tuple[str, ...] = ()) -> Any:
    """Return the JSON tree of `value` and add its tensors and arrays to `tensors` by name.

    Numpy scalars become plain numbers, and tuples become lists.

    Raises:
        TypeError: a value or a key has a type that cannot be saved.
        ValueError: a key equals the marker.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        tensors[_name(path)] = value if isinstance(value, torch.Tensor) else _as_tensor(value, path)
        return {MARK: "tensor" if isinstance(value, torch.Tensor) else "array"}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"state {_name(path)!r}: key {key!r} is a {type(key).__name__}; keys must be str")
            if key == MARK:
                raise ValueError(f"state {_name(path)!r}: the key {MARK!r} is reserved")
        return {key: flatten(item, tensors, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flatten(item, tensors, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {MARK: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state {_name(path)!r}: a {type(value).__name__} cannot be saved")


def unflatten(tree: Any, tensors: Tensors, path: tuple[str, ...] = ()) -> Any:
    """Invert `flatten`, removing from `tensors` each tensor that is used. Raises UserError for a malformed tree."""
    if len(path) > MAX_DEPTH:
        raise UserError("the state is nested too deeply")
    if isinstance(tree, list):
        return [unflatten(item, tensors, (*path, str(index))) for index, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if MARK not in tree:
        return {key: unflatten(item, tensors, (*path, key)) for key, item in tree.items()}
    kind = tree[MARK]
    if kind in ("nan", "inf", "-inf"):
        return float(kind)
    tensor = tensors.pop(_name(path), None)
    if tensor is None:
        raise UserError(f"the state lacks the tensor {_name(path)!r}")
    return tensor.cpu().numpy() if kind == "array" else tensor


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` contiguous on the CPU and not a view of a larger storage, as safetensors requires. Copies only where needed."""
    tensor = tensor.detach().cpu()
    is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)


def _name(path: tuple[str, ...]) -> str:
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)


def _as_tensor(array: np.ndarray, path: tuple[str, ...]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except TypeError:
        raise TypeError(f"state {_name(path)!r}: an array of {array.dtype} cannot be saved") from None
