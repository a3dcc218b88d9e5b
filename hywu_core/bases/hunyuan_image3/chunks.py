"""The product of grouped rows with a few experts at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...grouped import grouped_linear

#: Where the environment says for how many shapes of products oneDNN, and torch above it, keep a plan.
_PLANS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
#: How many by default, and with `bound_product_plans`.
PLANS, FEW_PLANS = 1024, 16
#: What a plan holds, mostly compiled code: measured with torch 2.11 (600 kB at any width).
PLAN_BYTES = 620_000


def bound_product_plans() -> None:
    """Let a CPU keep few plans of products, for this process; of no effect after its first product.

    Each number of rows is a shape, and experts get any number: at a middle size the plans held more than the
    weights did. What the environment says already stays. For commands; a library and an extension of ComfyUI
    don't say what the whole process keeps (see `kept_plan_bytes`).
    """
    for name in _PLANS:
        os.environ.setdefault(name, str(FEW_PLANS))


def kept_plan_bytes(dtype: torch.dtype) -> int:
    """The most that products on a CPU keep for later ones of the same shape: in 16 bits; in float32 none do."""
    if dtype.itemsize != 2:
        return 0
    said = (os.environ.get(name, "") for name in _PLANS)
    return PLAN_BYTES * max(int(count) if count.isdigit() else PLANS for count in said)


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
