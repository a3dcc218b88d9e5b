"""The product of grouped rows with a few experts at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...grouped import grouped_linear

#: Shapes of products that oneDNN, and torch above it, keep a plan and its memory for: 1024 each by default.
_PLANS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


def bound_product_plans() -> None:
    """Let a CPU keep few plans of products, for this process; of no effect after its first product.

    Each number of rows is a shape, and experts get any number: at a middle size the plans held more than the
    weights did. What the environment says already stays.
    """
    for name, count in _PLANS.items():
        os.environ.setdefault(name, count)


#: What `routed` gave for tensors that are still used: the banks of a layer are called with the same one.
_routed = WeakTensorKeyDictionary()


def routed(ends: Tensor) -> tuple[list[int], list[int]]:
    """Where each expert's rows begin and end, and the experts that have any.

    Waits for the device once for a tensor, so that the next bank's chunks are on their way while one computes.
    """
    if ends not in _routed:
        bounds = [0, *ends.tolist()]
        used = [e for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]
        _routed[ends] = (bounds, used)
    return _routed[ends]


def in_chunks(
    x: Tensor, ends: Tensor, out_features: int, chunk: int, weights: Callable[[Sequence[int]], Tensor]
) -> Tensor:  # fmt: skip
    """The grouped product, of so many experts at a time.

    weights: experts -> ``[n, out, in]``.
    """
    bounds, used = routed(ends)
    out = x.new_empty(x.shape[0], out_features)
    for i in range(0, len(used), chunk):
        experts = used[i : i + chunk]
        multiply(x, weights(experts), experts, bounds, out)
    return out


def multiply(
    x: Tensor, weight: Tensor, experts: Sequence[int], bounds: Sequence[int], out: Tensor
) -> None:
    """Products of some experts' rows, written where they belong. weight ``[n, out, in]``."""
    first, last = bounds[experts[0]], bounds[experts[-1] + 1]
    local = torch.tensor([bounds[e + 1] - first for e in experts], dtype=torch.int32)
    out[first:last] = grouped_linear(x[first:last], weight, local)
