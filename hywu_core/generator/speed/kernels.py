"""Triton kernels of the fast path. Imported only where Triton is; passes.py has the torch fallbacks.

Each reads and writes its tensors once, where eager torch takes three to six passes. They take any
strides in the leading dimensions, so that no view of the hidden states has to be copied first.
tests/core/test_speed_kernels.py compares them with torch in Triton's interpreter, and compiles them for
real devices. Triton launches on the current device, torch on the tensor's: hence the `device_of`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_kernels import (
    E4M3_MAX,
    _turn,
    across,
    across_quantized,
    takes_across,
)

__all__ = [
    "across",
    "across_quantized",
    "quantize_rows",
    "rms_norm",
    "rms_norm_quantized",
    "rotate_",
    "takes_across",
]


#: Rows that one program of a norm takes where it takes several, and from how many rows on: below there would
#: be too few programs for all multiprocessors.
SEVERAL, MANY = 4, 8192


# -- RMS norm --------------------------------------------------------------------------------------


@triton.jit
def _row_start(row, size1, size2, stride0, stride1, stride2):
    """Where a row of ``[B, size1, size2, d]`` begins."""
    i2 = row % size2
    i1 = (row // size2) % size1
    i0 = row // (size2 * size1)
    return i0 * stride0 + i1 * stride1 + i2 * stride2


@triton.jit
def _rms_norm(
    x, weight, bias, pending, added, out, scales, rows, size1, size2, stride0, stride1, stride2,
    dim, eps,
    HAS_BIAS: tl.constexpr, HAS_PENDING: tl.constexpr, HAS_ADDED: tl.constexpr,
    QUANTIZE: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # ROWS rows, one after another: what all of them need is loaded once, and the next row while one is
    # summed up; values stay in their own dtype until they are used, which takes half the registers
    row = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(row + ROWS, rows)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    factor = tl.load(weight + at, mask=inside, other=0.0)
    if HAS_PENDING:
        waiting = tl.load(pending + at, mask=inside, other=0.0)
    place = x + _row_start(row, size1, size2, stride0, stride1, stride2)
    loaded = tl.load(place + at, mask=inside, other=0.0)
    if HAS_ADDED:
        more = tl.load(added + row * dim + at, mask=inside, other=0.0)
    while row < last:
        here, value = place, loaded.to(tl.float32)
        if HAS_ADDED:
            # as torch adds in place: rounded before it is normed
            value = (value + more.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
            tl.store(here + at, value.to(x.dtype.element_ty), mask=inside)
        if ROWS > 1:
            following = inside & (row + 1 < last)
            place = x + _row_start(row + 1, size1, size2, stride0, stride1, stride2)
            loaded = tl.load(place + at, mask=following, other=0.0)
            if HAS_ADDED:
                more = tl.load(added + (row + 1) * dim + at, mask=following, other=0.0)
        if HAS_PENDING:
            value += waiting
        scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)
        normed = value * scale * factor.to(tl.float32)
        if QUANTIZE:
            # what a product in x's dtype would have been given
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
            step = tl.maximum(tl.max(tl.abs(normed), axis=0), 1e-12) / LIMIT
            tl.store(scales + row, step)
            normed = tl.minimum(tl.maximum(normed * (1.0 / step), -LIMIT), LIMIT)
        tl.store(out + row * dim + at, normed.to(out.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            moved = value + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(here + at, moved.to(x.dtype.element_ty), mask=inside)
        row += 1


def rms_norm(x: Tensor, weight: Tensor, eps: float, **options: Any) -> Tensor:
    """RMS norm of ``x [B, M, L, d]`` (last dimension dense), a new contiguous tensor.

    options: of the residual sublayers around it, each None where there is none:
        bias ``[d]`` is added to x itself in the same pass: the output bias of the sublayer that begins, so
        that its matrix product only has to add to the hidden states.
        added ``[R, d]`` in x's dtype is added to x itself before the norm: the product of the sublayer that
        ended.
        pending ``[d]`` float32 is added to x before the norm and not written: biases of sublayers that are
        over.
        several: a program takes `SEVERAL` rows, where there are many.
    Computed in float32.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, weight, eps, out, None, **options)
    return out


def rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float8_e4m3fn, **options: Any
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, its rows quantized as `quantize_rows` does: ``[R, d]`` and scales ``[R, 1]``."""
    dim = x.shape[-1]
    out = torch.empty(x.numel() // dim, dim, dtype=dtype, device=x.device)
    scales = torch.empty(out.shape[0], 1, dtype=torch.float32, device=x.device)
    _launch_norm(x, weight, eps, out, scales, **options)
    return out, scales


def _launch_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor | None,
    bias: Tensor | None = None,
    pending: Tensor | None = None,
    added: Tensor | None = None,
    several: bool = False,
) -> None:
    dim = x.shape[-1]
    rows, block = out.numel() // dim, triton.next_power_of_2(dim)
    each = SEVERAL if several and rows >= MANY else 1
    with torch.cuda.device_of(x):
        _rms_norm[(triton.cdiv(rows, each),)](
            x, weight, weight if bias is None else bias, weight if pending is None else pending,
            out if added is None else added, out, out if scales is None else scales,
            rows, x.shape[1], x.shape[2], x.stride(0), x.stride(1), x.stride(2), dim, eps,
            HAS_BIAS=bias is not None, HAS_PENDING=pending is not None,
            HAS_ADDED=added is not None, QUANTIZE=scales is not None, LIMIT=E4M3_MAX, ROWS=each,
            BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip


# -- rotary positions ------------------------------------------------------------------------------


@triton.jit
def _rotate(
    x, first, second, size1, heads, pairs, stride0, stride1, stride_head,
    first0, first1, second0, second1, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i0, i1 = row // size1, row % size1
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    known = pair < pairs
    half = pairs // 2
    early = pair < half
    table = tl.where(
        early,
        first + i0 * first0 + i1 * first1 + 2 * pair,
        second + i0 * second0 + i1 * second1 + 2 * (pair - half),
    )
    cos = tl.load(table, mask=known, other=1.0)[None, :]
    sin = tl.load(table + 1, mask=known, other=0.0)[None, :]
    at = x + i0 * stride0 + i1 * stride1 + head[:, None] * stride_head + 2 * pair[None, :]
    inside = (head[:, None] < heads) & known[None, :]
    x0 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (x0 * cos - x1 * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(at + 1, (x0 * sin + x1 * cos).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_wide(
    x, first, second, size1, heads, stride0, stride1, stride_head,
    first0, first1, second0, second1, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # a head is loaded as one dense run and its pairs are taken apart in registers: 16-byte accesses
    row = tl.program_id(0).to(tl.int64)
    i0, i1 = row // size1, row % size1
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, 2 * PAIRS)
    half = tl.arange(0, PAIRS)  # PAIRS / 2 couples (cos, sin) of either half
    one = tl.load(first + i0 * first0 + i1 * first1 + half)
    two = tl.load(second + i0 * second0 + i1 * second1 + half)
    table = tl.reshape(tl.permute(tl.join(one, two), (1, 0)), (PAIRS, 2))
    cos, sin = tl.split(table)
    where = x + i0 * stride0 + i1 * stride1 + head[:, None] * stride_head + at[None, :]
    inside = head[:, None] < heads
    value = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    turned = _turn(value, cos[None, :], sin[None, :], HEADS, PAIRS)
    tl.store(where, turned.to(x.dtype.element_ty), mask=inside)


def rotate_(x: Tensor, first: Tensor, second: Tensor, wide: bool = True) -> Tensor:
    """Turn the interleaved pairs of ``x [M, L, H, hd]`` in place; any strides but the last, 1.

    first, second: (cos, sin) of the first and the second half of the pairs, float32, each broadcastable to
        ``[M, L, hd / 4, 2]``; they are read where they are, the table of both together is never made.
    wide: load whole heads at once, where their size is a power of two.
    """
    length, count, heads, dim = x.shape
    first = first.expand(length, count, dim // 4, 2)
    second = second.expand(length, count, dim // 4, 2)
    pairs = triton.next_power_of_2(dim // 2)
    wide = wide and 2 * pairs == dim and _dense(first) and _dense(second)
    block = max(1, min(triton.next_power_of_2(heads), (2048 if wide else 1024) // pairs))
    strides = (
        x.stride(0), x.stride(1), x.stride(2),
        first.stride(0), first.stride(1), second.stride(0), second.stride(1),
    )  # fmt: skip
    grid = (length * count, triton.cdiv(heads, block))
    with torch.cuda.device_of(x):
        if wide:
            _rotate_wide[grid](
                x, first, second, count, heads, *strides, HEADS=block, PAIRS=pairs, num_warps=4
            )
        else:
            _rotate[grid](
                x, first, second, count, heads, dim // 2, *strides, HEADS=block, PAIRS=pairs
            )
    return x


def _dense(table: Tensor) -> bool:
    return table.stride(2) == 2 and table.stride(3) == 1


# -- rows in 8 bits --------------------------------------------------------------------------------


@triton.jit
def _quantize_rows(
    x, out, scales, DIM: tl.constexpr, LIMIT: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(x + row * DIM + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        value = value / (1.0 + tl.exp(-value))
        value = value.to(x.dtype.element_ty).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / LIMIT
    tl.store(scales + row, step)
    value = tl.minimum(tl.maximum(value * (1.0 / step), -LIMIT), LIMIT)
    tl.store(out + row * DIM + at, value.to(out.dtype.element_ty), mask=inside)


def quantize_rows(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """Contiguous ``x [R, d]`` as float8_e4m3fn ``[R, d]`` and float32 scales ``[R, 1]``.

    dtype: another one gives the values as they are before they are quantized.
    silu: of ``silu(x)``.
    """
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(x):
        _quantize_rows[(rows,)](
            x, out, scales, DIM=dim, LIMIT=E4M3_MAX, SILU=silu, BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out, scales
