"""Triton kernels of the fast path. Imported only where Triton is; layers.py has the torch fallbacks.

Each reads and writes its tensors once, where eager torch takes three to six passes. They take any
strides in the leading dimensions, so that no view of the residual stream has to be copied first.
tests/core/test_speed_kernels.py compares them with torch in Triton's interpreter, and compiles them for
real devices. Triton launches on the current device, torch on the tensor's: hence the `device_of`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Largest finite value of torch.float8_e4m3fn.
E4M3_MAX = 448.0


@triton.jit
def _rms_norm(
    x, weight, bias, out, size1, size2, stride0, stride1, stride2, dim, eps,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i2 = row % size2
    i1 = (row // size2) % size1
    i0 = row // (size2 * size1)
    x += i0 * stride0 + i1 * stride1 + i2 * stride2
    at = tl.arange(0, BLOCK)
    inside = at < dim
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = value * scale * factor
    tl.store(out + row * dim + at, normed.to(out.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        added = value + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, added.to(x.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """RMS norm of ``x [B, M, L, d]`` (last dimension dense), a new contiguous tensor.

    bias ``[d]``: is added to x itself in the same pass: the residual sublayer's output bias, so that
    its matrix product only has to add to the stream. Computed in float32.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dim = x.shape[-1]
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(x):
        _rms_norm[(out.numel() // dim,)](
            x, weight, weight if bias is None else bias, out, x.shape[1], x.shape[2],
            x.stride(0), x.stride(1), x.stride(2), dim, eps,
            HAS_BIAS=bias is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out


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


def rotate_(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Turn the interleaved pairs of ``x [M, L, H, hd]`` in place; any strides but the last, 1.

    first, second: (cos, sin) of the first and the second half of the pairs, float32, each
    broadcastable to ``[M, L, hd / 4, 2]``; they are read where they are, the table of both together
    is never made.
    """
    length, count, heads, dim = x.shape
    first = first.expand(length, count, dim // 4, 2)
    second = second.expand(length, count, dim // 4, 2)
    pairs = triton.next_power_of_2(dim // 2)
    block = max(1, min(triton.next_power_of_2(heads), 1024 // pairs))
    with torch.cuda.device_of(x):
        _rotate[(length * count, triton.cdiv(heads, block))](
            x, first, second, count, heads, dim // 2, x.stride(0), x.stride(1), x.stride(2),
            first.stride(0), first.stride(1), second.stride(0), second.stride(1),
            HEADS=block, PAIRS=pairs,
        )  # fmt: skip
    return x


@triton.jit
def _quantize_rows(x, out, scales, DIM: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, DIM, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * DIM + at, mask=at < DIM, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
    scale = tl.maximum(tl.max(most, axis=0), 1e-12) / LIMIT
    tl.store(scales + row, scale)
    for start in range(0, DIM, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * DIM + at, mask=at < DIM, other=0.0).to(tl.float32) / scale
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
        tl.store(out + row * DIM + at, value.to(out.dtype.element_ty), mask=at < DIM)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Contiguous ``x [R, d]`` as float8_e4m3fn ``[R, d]`` and float32 scales ``[R, 1]``.

    dtype: another one gives the values as they are before they are rounded.
    """
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(dim))
    with torch.cuda.device_of(x):
        _quantize_rows[(rows,)](x, out, scales, DIM=dim, LIMIT=E4M3_MAX, BLOCK=block, num_warps=8)
    return out, scales
