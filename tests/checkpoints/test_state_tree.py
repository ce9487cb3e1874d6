"""Conversion of a nested state to JSON and named tensors, and back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl_cli.checkpoints.state_tree import flatten, unflatten
from mtrl_cli.errors import UserError
from tests.helpers.checkpoints import same

TENSORS = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]).flatmap(
    lambda kind: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.arange(math.prod(shape)).reshape(shape).to(kind))
)
ARRAYS = st.sampled_from(["f4", "f8", "i8", "u1", "u4", "?"]).flatmap(
    lambda kind: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: np.arange(math.prod(shape)).reshape(shape).astype(kind))
)
LEAVES = st.one_of(TENSORS, ARRAYS, st.none(), st.booleans(), st.integers(-(2**200), 2**200), st.floats(), st.text())
KEYS = st.text(alphabet="ab/~.0", max_size=3)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=12)


@settings(deadline=None)
@given(TREES)
def test_round_trip_through_json_and_named_tensors(state):
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(flatten(state, tensors), allow_nan=False)
    assert same(unflatten(json.loads(text), tensors), state)
    assert tensors == {}, "every tensor is used once"


def test_tensor_names_are_paths():
    tensors: dict[str, torch.Tensor] = {}
    flatten({"torso.0.weight": torch.ones(1), "slots": [{"a/b": torch.ones(2)}]}, tensors)
    assert sorted(tensors) == ["slots/0/a~1b", "torso.0.weight"]


def test_numpy_scalars_and_tuples_become_plain_values():
    assert flatten({"a": np.int64(3), "b": (np.float32(0.5), True)}, {}) == {"a": 3, "b": [0.5, True]}


@pytest.mark.parametrize(
    ("state", "kind"),
    [({"a": {1: 2}}, TypeError), ({"a": {"$": 2}}, ValueError), ({"a": object()}, TypeError), ({"a": np.array(["x"])}, TypeError)],
)
def test_unsupported_value_is_refused_with_its_path(state, kind):
    with pytest.raises(kind, match="'a'"):
        flatten(state, {})


def test_malformed_trees_are_refused():
    deep: dict = {}
    for _ in range(500):
        deep = {"a": deep}
    with pytest.raises(UserError, match="too deeply"):
        unflatten(deep, {})
    with pytest.raises(UserError, match="lacks the tensor 'a/b'"):
        unflatten({"a": {"b": {"$": "tensor"}}}, {})
    with pytest.raises(UserError):
        unflatten({"a": {"$": ["x"]}}, {})
