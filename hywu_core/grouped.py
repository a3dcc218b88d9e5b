"""Grouped linear layers (mixture of experts): one product for all experts where torch has it."""

from __future__ import annotations

import inspect
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x[start_e:end_e] @ weight[e].T`` for every group e.

    x: ``[T, in]`` with rows sorted by group.
    weight: ``[E, out, in]``.
    ends: int32 ``[E]``, cumulative ends of the groups; on the CPU too, where they are known there.
    Returns ``[T, out]``. One grouped product without waiting for the device where torch has one for the
    dtype, else a loop over the groups that aren't empty.
    """
    if _has_grouped_product(x, weight):
        # without waiting: the driver has its own copy of ends that were on the CPU
        offs = ends.to(x.device, torch.int32, non_blocking=True)
        out = torch._grouped_mm(x, weight.mT, offs=offs)
        if out.requires_grad:
            # its backward refuses expanded gradients, such as those of a sum
            out.register_hook(Tensor.contiguous)
        return out
    bounds = [0, *ends.tolist()]
    pieces = [
        F.linear(x[start:stop], weight[e])
        for e, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat(pieces)


def _has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Grouped products: bfloat16 on CUDA since torch 2.8 (sm 9.0), all on CPU since 2.10; 16-byte rows."""
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[-2:])
    if not aligned or x.dtype != weight.dtype:
        return False
    if x.is_cuda:
        capable = torch.cuda.get_device_capability(x.device) >= (9, 0)
        return hasattr(torch, "_grouped_mm") and x.dtype == torch.bfloat16 and capable
    return x.device.type == "cpu" and hasattr(F, "grouped_mm") and x.dtype != torch.float64


def item_groups(items: Tensor, ends: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Regroup rows sorted by expert into groups (item, expert), item-major.

    items: int64 ``[T]``, the batch item of each row.
    ends: ``[E]``.
    Returns the order of rows (int64 ``[T]``) and the ends of the ``num_items * E`` groups (int32). Never
    waits for the device.
    """
    experts = ends.numel()
    rows = torch.arange(items.numel(), device=items.device)
    expert = torch.searchsorted(ends.to(torch.int64), rows, right=True)
    group = items * experts + expert
    order = torch.argsort(group, stable=True)
    bounds = torch.arange(num_items * experts, device=items.device)
    group_ends = torch.searchsorted(group[order].contiguous(), bounds, right=True)
    return order, group_ends.to(torch.int32)


class GroupedLinear(nn.Module):
    """Experts in one weight ``[num_experts, out_features, in_features]``.

    ``forward(x [T, in], ends [E], items=None)``: rows sorted by expert. `items` (int64 ``[T]``) is for
    adapters that differ by batch item; the layer itself does not look at it.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(num_experts, out_features, in_features)
        self.weight = nn.Parameter(nn.init.normal_(weight, std=in_features**-0.5))

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        return grouped_linear(x, self.weight, ends)


def reads_ends(module: nn.Module) -> bool:
    """Whether a module is called as `GroupedLinear`: with rows sorted by expert and where each ends."""
    return (
        isinstance(module, GroupedLinear) or "ends" in inspect.signature(module.forward).parameters
    )


def grouped_delta(
    x: Tensor, ends: Tensor, a: Tensor, b: Tensor, s: float, items: Tensor | None = None
) -> Tensor:
    """``s·B(A x)`` ``[T, out]`` for rows ``x [T, in]`` sorted by expert.

    a ``[K, E, r, in]``, b ``[K, E, out, r]``; items int64 ``[T]``: the LoRA of each row, where K isn't 1.
    """
    if a.shape[0] == 1:
        return grouped_linear(grouped_linear(x, a[0], ends) * s, b[0], ends)
    order, group_ends = item_groups(items, ends, a.shape[0])
    hidden = grouped_linear(x[order], a.flatten(0, 1), group_ends) * s
    delta = x.new_empty(x.shape[0], b.shape[-2])
    delta[order] = grouped_linear(hidden, b.flatten(0, 1), group_ends)
    return delta
