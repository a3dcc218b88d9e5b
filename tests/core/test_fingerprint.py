"""The recipes of digests: literal values of the former code, of the node side's recipes too."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from hywu_core import fingerprint


def ramp(*shape: int, dtype=torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    return (torch.arange(count, dtype=torch.float64) * 0.37 % 1 - 0.5).reshape(shape).to(dtype)


@pytest.fixture
def linear():
    module = nn.Linear(30, 20)
    for value in module.state_dict().values():
        value.copy_(ramp(*value.shape))
    return module


def test_some_values_of_modules(linear):
    assert fingerprint.of_module(linear) == "9a5011dca7b73325"
    assert fingerprint.of_module(linear, {"bias": ramp(20) * 2}) == "09da62cbc22c7b42"


def test_nested_values():
    nested = {
        "b": [1, 2.5, None, True, ("x", ramp(3, 200))],
        "a": ramp(4, dtype=torch.bfloat16),
        "f": ramp,
        "n": nn.Linear(1, 1),
    }
    assert fingerprint.of_values(nested, 16, whole=False) == "272f3ff67b52d034"
    whole = [[ramp(3, 200).mT, {"mask": None}]]
    assert fingerprint.of_values(whole) == "bfcd55eaf2956e1053a93584cc854ada"


def test_objects_count_by_what_they_stand_for():
    class Weights:
        def __init__(self, value):
            self.value = value

    def unfold(value):
        return [value.value] if isinstance(value, Weights) else value

    one, two = [Weights(1)], [Weights(2)]
    assert fingerprint.of_values(one) == fingerprint.of_values(two)
    assert fingerprint.of_values(one, unfold=unfold) == fingerprint.of_values([[1]])
    assert fingerprint.of_values(one, unfold=unfold) != fingerprint.of_values(two, unfold=unfold)


def test_pieces():
    values = [["a"], (1, 2, 2, 3), ["image"], None, (1, 3, 2, 3)]
    images = ramp(1, 2, 2, 3), ramp(1, 3, 2, 3)
    assert fingerprint.digest([repr(values), *images]) == "c4a5e7f1758bf122f064e2f6b82df425"
    rows = repr([["a", "b"], 1])
    values = ramp(3, 4).mT, ramp(2, dtype=torch.bfloat16)
    shown = [f"{v.dtype}{tuple(v.shape)}" for v in values]
    pieces = [rows, shown[0], values[0], b"x", shown[1], values[1]]
    assert fingerprint.digest(pieces) == "3595dd4975067e8222a8fbf87507ff83"
    assert fingerprint.digest(["\ud83d"]) != fingerprint.digest(["?"])
    assert fingerprint.digest([torch.tensor(2.0)]) == fingerprint.digest([torch.tensor([2.0])])


def test_files_of_several_blocks(tmp_path):
    data = np.arange(700_000, dtype=np.uint32).tobytes()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"b")
    assert fingerprint.of_file(tmp_path / "a", 64) == hashlib.sha256(data).hexdigest()
    both = fingerprint.of_files([tmp_path / "a", tmp_path / "b"], 64)
    assert both == hashlib.sha256(data + b"b").hexdigest()
