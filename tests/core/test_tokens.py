"""Tokenization: exact both ways for any shape, in the official order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.sizes import official_config
from hywu_core import HYWUError
from hywu_core.layout import Module, Stack
from hywu_core.tokens import token_grid

SIZES = st.integers(1, 9)
MODULES = st.lists(
    st.builds(
        Module,
        name=st.text("abk_.", min_size=1, max_size=5),
        in_features=SIZES,
        out_features=SIZES,
        num_experts=st.integers(0, 3),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda module: module.name,
)


def factors_of(grid, batch):
    return {
        (s.module, s.side): torch.randn(batch, grid.num_layers, *s.shape) for s in grid.segments
    }


@settings(deadline=None, max_examples=100)
@given(MODULES, st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.integers(1, 2))
def test_both_ways_is_exact(modules, rank, token_dim, layers, batch):
    stack = Stack(tuple(f"l.{i}" for i in range(layers)), tuple(modules))
    grid = token_grid(stack, rank, token_dim)
    factors = factors_of(grid, batch)
    packed = grid.tokenize(factors)
    assert packed.shape == (batch, layers, grid.num_tokens, rank, token_dim)
    again = grid.detokenize(packed)
    assert again.keys() == factors.keys()
    for key, value in factors.items():
        assert torch.equal(again[key], value)
        assert again[key].untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    for s in grid.segments:
        area = packed[:, :, s.start : s.start + s.count].flatten(2)
        assert not area[..., s.numel :].any()


@settings(deadline=None, max_examples=100)
@given(MODULES, st.integers(1, 4), st.integers(1, 7))
def test_order_and_counts_follow_the_official_rule(modules, rank, token_dim):
    grid = token_grid(Stack(("l.0",), tuple(modules)), rank, token_dim)
    names = [m.name for m in modules]
    anchors = [next(i for i, n in enumerate(names) if n in name) for name in names]
    expected = [i for _, i in sorted((anchor, i) for i, anchor in enumerate(anchors))]
    count = len(modules)
    assert [s.side for s in grid.segments] == ["A"] * count + ["B"] * count
    assert [s.module for s in grid.segments] == expected * 2
    position = 0
    for s in grid.segments:
        assert s.start == position
        assert s.count == math.ceil(s.numel / (rank * token_dim))
        position += s.count
    assert grid.num_tokens == position


def test_the_documented_example():
    names = ("to_k", "to_v", "to_k_img")
    grid = token_grid(Stack(("l.0",), tuple(Module(n, 4, 4) for n in names)), 2, 4)
    assert [names[s.module] for s in grid.segments[:3]] == ["to_k", "to_k_img", "to_v"]


def test_default_official_size():
    (stack,) = official_config().layout.stacks
    grid = token_grid(Stack(stack.layers[:1], stack.modules), 16, 1024)
    assert (grid.num_a_tokens, grid.num_tokens) == (719, 1379)


def test_wrong_shapes_are_named():
    grid = token_grid(Stack(("l.0",), (Module("fc", 4, 5),)), 2, 4)
    factors = factors_of(grid, 1)
    factors[0, "B"] = torch.zeros(1, 1, 4, 2)
    with pytest.raises(HYWUError, match=r"fc.lora_B is \(1, 4, 2\)"):
        grid.tokenize(factors)
    with pytest.raises(HYWUError, match="the layout needs"):
        grid.detokenize(torch.zeros(1, 1, 9, 2, 4))
    with pytest.raises(HYWUError, match="token_dim is 0"):
        token_grid(grid.stack, 2, 0)
