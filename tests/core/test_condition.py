"""Condition: parts, masks, fingerprint, selection, files, wrong input."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hywu_core import Condition, HYWUError
from hywu_core.files import read_tensors, save_tensors


@pytest.fixture
def condition():
    parts = {"vision": torch.randn(2, 3, 4), "text": torch.randn(2, 5, 6)}
    masks = {"text": torch.tensor([[True] * 5, [True, True, False, False, False]])}
    return Condition(parts, masks, "abc", {"instruction": "a hat"})


def test_file_round_trip_keeps_everything(condition, tmp_path):
    loaded = Condition.load(condition.save(tmp_path / "c"))
    assert list(loaded.parts) == ["vision", "text"]
    assert loaded.digest() == condition.digest()
    assert (loaded.fingerprint, dict(loaded.origin)) == ("abc", {"instruction": "a hat"})
    with pytest.raises(HYWUError, match="exists already"):
        condition.save(tmp_path / "c")


def test_select_and_to(condition):
    one = condition.select(-1)
    assert (one.batch_size, one.num_tokens, one.fingerprint) == (1, 8, "abc:[1]")
    assert torch.equal(one.parts["text"], condition.parts["text"][1:])
    half = condition.to(dtype=torch.bfloat16)
    assert half.parts["vision"].dtype == torch.bfloat16
    assert half.masks["text"].dtype == torch.bool


@pytest.mark.parametrize("items", [2, -3, [0, 2], slice(2, 4)])
def test_items_that_are_not_there(condition, items):
    with pytest.raises(HYWUError, match="out of range: the condition has 2 items"):
        condition.select(items)


def test_a_file_whose_masks_leave_nothing_of_an_item(condition, tmp_path):
    masks = {
        name: torch.tensor([[True], [False]]).expand(tokens.shape[:2])
        for name, tokens in condition.parts.items()
    }
    path = Condition(condition.parts, masks).save(tmp_path / "c")
    with pytest.raises(HYWUError, match=r"c.safetensors: The masks leave no token of item 1"):
        Condition.load(path)
    # one part that counts is enough
    Condition.load(Condition(condition.parts, {"text": masks["text"]}).save(tmp_path / "d"))


def test_only_tokens_that_count_must_be_finite(condition):
    condition.parts["text"][1, 4] = float("nan")
    assert bool(condition.is_finite())
    condition.parts["text"][0, 4] = float("inf")
    assert not bool(condition.is_finite())


def test_digest_depends_on_values(condition):
    before = condition.digest()
    condition.parts["text"][0, 0, 0] += 1
    assert condition.digest() != before


@pytest.mark.parametrize(
    ("parts", "masks", "words"),
    [
        ({}, {}, "no parts"),
        ({"x": torch.zeros(1, 0, 4)}, {}, "no zero among them"),
        ({"x": torch.zeros(3, 4)}, {}, "batch, length, width"),
        ({"x": torch.zeros(1, 2, 4, dtype=torch.int64)}, {}, "floating point"),
        ({"x": torch.zeros(1, 2, 3), "y": torch.zeros(2, 2, 3)}, {}, "differ in batch size"),
        ({"x": torch.zeros(1, 2, 3)}, {"x": torch.ones(1, 3, dtype=torch.bool)}, "must be bool"),
        ({"x": torch.zeros(1, 2, 3)}, {"y": torch.ones(1, 2, dtype=torch.bool)}, "unknown parts"),
    ],
)
def test_wrong_parts(parts, masks, words):
    with pytest.raises(HYWUError, match=words):
        Condition(parts, masks)


def test_files_of_other_programs(tmp_path):
    save_file({"anything": torch.ones(3, 4)}, tmp_path / "one.safetensors")
    assert Condition.load(tmp_path / "one.safetensors").parts["hidden_states"].shape == (1, 3, 4)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(HYWUError, match=r"two.safetensors: holds 2 tensors"):
        Condition.load(tmp_path / "two.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_parts_of_8_bits_are_widened_where_they_are_read(condition, tmp_path, dtype):
    path = condition.save(tmp_path / "c.safetensors")
    tensors, header = read_tensors(path)
    small = {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors.items()}
    save_tensors(path, small, header, overwrite=True)
    read = Condition.load(path)
    assert read.is_finite()
    for name, tokens in read.parts.items():
        assert torch.equal(tokens.float(), small[f"parts.{name}"].float())
    with pytest.raises(HYWUError, match="must be floating point"):
        Condition({name: tokens.to(dtype) for name, tokens in condition.parts.items()})
