"""A state as a tree: nested dictionaries of tensors, arrays and plain values, taken apart into tensors by name and JSON.

A tensor's place in the JSON tree is marked, and its name is its path, keys joined by slashes. A key's own slash becomes `~1` and
its tilde `~0`, as in JSON Pointer (RFC 6901), so that no two paths share a name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from mtrl_cli.errors import UserError

MARK = "$"  # {"$": "tensor"}, {"$": "array"}, {"$": "nan"}: what JSON has no word for
DEEPEST = 64
Tensors = dict[str, torch.Tensor]


def take_apart(value: Any, tensors: Tensors, path: tuple[str, ...] = ()) -> Any:
    """The JSON tree of `value`; its tensors and arrays go into `tensors` by name.

    Numpy scalars become plain numbers and tuples lists. Raises TypeError for other types and keys that are not str, ValueError
    for a key that is the mark itself.
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
        return {key: take_apart(item, tensors, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [take_apart(item, tensors, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {MARK: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state {_name(path)!r}: a {type(value).__name__} cannot be saved")


def put_together(tree: Any, tensors: Tensors, path: tuple[str, ...] = ()) -> Any:
    """The inverse of `take_apart`; takes what it uses out of `tensors`. Raises UserError for a tree that cannot be one of ours."""
    if len(path) > DEEPEST:
        raise UserError("its state is nested too deeply to be one of ours")
    if isinstance(tree, list):
        return [put_together(item, tensors, (*path, str(index))) for index, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if MARK not in tree:
        return {key: put_together(item, tensors, (*path, key)) for key, item in tree.items()}
    kind = tree[MARK]
    if kind in ("nan", "inf", "-inf"):
        return float(kind)
    tensor = tensors.pop(_name(path), None)
    if tensor is None:
        raise UserError(f"its state lacks the tensor {_name(path)!r}")
    if kind == "array":
        return tensor.cpu().numpy()
    return tensor


def _name(path: tuple[str, ...]) -> str:
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)


def _as_tensor(array: np.ndarray, path: tuple[str, ...]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except TypeError:
        raise TypeError(f"state {_name(path)!r}: an array of {array.dtype} cannot be saved") from None
