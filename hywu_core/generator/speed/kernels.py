"""Triton kernels of the fast path. Imported only where Triton is; passes.py has the torch fallbacks.

Each reads and writes its tensors once, where eager torch takes three to six passes. They take any
strides in the leading dimensions, so that no view of the hidden states has to be copied first.
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

#: The attention across layers holds all layers of a head in one program's registers, up to so many.
MOST_LAYERS = 32


# -- RMS norm --------------------------------------------------------------------------------------


@triton.jit
def _rms_norm(
    x, weight, bias, pending, out, scales, size1, size2, stride0, stride1, stride2, dim, eps,
    HAS_BIAS: tl.constexpr, HAS_PENDING: tl.constexpr, QUANTIZE: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i2 = row % size2
    i1 = (row // size2) % size1
    i0 = row // (size2 * size1)
    x += i0 * stride0 + i1 * stride1 + i2 * stride2
    at = tl.arange(0, BLOCK)
    inside = at < dim
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_PENDING:
        value += tl.load(pending + at, mask=inside, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = value * scale * factor
    if QUANTIZE:
        # what a product in x's dtype would have been given
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
        step = tl.maximum(tl.max(tl.abs(normed), axis=0), 1e-12) / LIMIT
        tl.store(scales + row, step)
        normed = tl.minimum(tl.maximum(normed * (1.0 / step), -LIMIT), LIMIT)
    tl.store(out + row * dim + at, normed.to(out.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        added = value + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, added.to(x.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    pending: Tensor | None = None,
) -> Tensor:
    """RMS norm of ``x [B, M, L, d]`` (last dimension dense), a new contiguous tensor.

    bias ``[d]``: is added to x itself in the same pass: the residual sublayer's output bias, so that
    its matrix product only has to add to the hidden states. pending ``[d]`` float32: is added to x
    before the norm and not written: biases of sublayers that are over. Computed in float32.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, weight, eps, out, None, bias, pending)
    return out


def rms_norm_quantized(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    pending: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, its rows quantized as `quantize_rows` does: ``[R, d]`` and scales ``[R, 1]``."""
    dim = x.shape[-1]
    out = torch.empty(x.numel() // dim, dim, dtype=dtype, device=x.device)
    scales = torch.empty(out.shape[0], 1, dtype=torch.float32, device=x.device)
    _launch_norm(x, weight, eps, out, scales, bias, pending)
    return out, scales


def _launch_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    pending: Tensor | None,
) -> None:
    dim = x.shape[-1]
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(x):
        _rms_norm[(out.numel() // dim,)](
            x, weight, weight if bias is None else bias, weight if pending is None else pending,
            out, out if scales is None else scales, x.shape[1], x.shape[2],
            x.stride(0), x.stride(1), x.stride(2), dim, eps,
            HAS_BIAS=bias is not None, HAS_PENDING=pending is not None,
            QUANTIZE=scales is not None, LIMIT=E4M3_MAX, BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
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
def _turn(value, cos, sin, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """``value [ROWS, 2 * PAIRS]`` float32, its interleaved pairs turned in registers."""
    x0, x1 = tl.split(tl.reshape(value, (ROWS, PAIRS, 2)))
    turned = tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos)
    return tl.reshape(turned, (ROWS, 2 * PAIRS))


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

    first, second: (cos, sin) of the first and the second half of the pairs, float32, each
    broadcastable to ``[M, L, hd / 4, 2]``; they are read where they are, the table of both together
    is never made. wide: load whole heads at once, where their size is a power of two.
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


# -- attention across layers -----------------------------------------------------------------------


@triton.jit
def _across_head(
    rows, width, n, ok, cos, sin, scale, N: tl.constexpr, NB: tl.constexpr, PAIRS: tl.constexpr
):
    """RoPE and attention of one head's N layers; rows point at its queries. ``[NB, 2 * PAIRS]``."""
    q = tl.load(rows, mask=ok, other=0.0)
    k = tl.load(rows + width, mask=ok, other=0.0)
    v = tl.load(rows + 2 * width, mask=ok, other=0.0)
    turned = _turn(q.to(tl.float32), cos, sin, NB, PAIRS).to(q.dtype)
    keys = _turn(k.to(tl.float32), cos, sin, NB, PAIRS).to(q.dtype)
    scores = tl.dot(turned, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(n[None, :] < N, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    return tl.dot(weights.to(v.dtype), v, input_precision="ieee")


@triton.jit
def _across_table(first, second, n, ok, NB: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin ``[NB, PAIRS]`` of the layers."""
    half = tl.arange(0, PAIRS)
    one = tl.load(first + n[:, None] * PAIRS + half[None, :], mask=ok, other=0.0)
    two = tl.load(second + n[:, None] * PAIRS + half[None, :], mask=ok, other=0.0)
    table = tl.reshape(tl.permute(tl.join(one, two), (0, 2, 1)), (NB, PAIRS, 2))
    cos, sin = tl.split(table)
    return cos, sin


@triton.jit
def _across(
    qkv, out, first, second, heads, scale, N: tl.constexpr, NB: tl.constexpr, PAIRS: tl.constexpr
):
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, NB)
    d = tl.arange(0, 2 * PAIRS)
    ok = n[:, None] < N
    width = heads * 2 * PAIRS
    cos, sin = _across_table(first, second, n, ok, NB, PAIRS)
    place = n[:, None] * width + head * 2 * PAIRS + d[None, :]
    rows = qkv + sequence * N * 3 * width + n[:, None] * 2 * width + place
    result = _across_head(rows, width, n, ok, cos, sin, scale, N, NB, PAIRS)
    tl.store(out + sequence * N * width + place, result.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _across_quantized(
    qkv, between, out, scales, first, second, scale,
    LIMIT: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # a row's scale is over all heads, so one program has them all; what it wrote is read from the cache
    sequence = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    d = tl.arange(0, 2 * PAIRS)
    ok = n[:, None] < N
    width = HEADS * 2 * PAIRS
    cos, sin = _across_table(first, second, n, ok, NB, PAIRS)
    most = tl.full([NB], 1e-12, dtype=tl.float32)
    for head in tl.range(HEADS, num_stages=2):
        place = n[:, None] * width + head * 2 * PAIRS + d[None, :]
        rows = qkv + sequence * N * 3 * width + n[:, None] * 2 * width + place
        result = _across_head(rows, width, n, ok, cos, sin, scale, N, NB, PAIRS)
        result = result.to(between.dtype.element_ty)
        tl.store(between + sequence * N * width + place, result, mask=ok)
        most = tl.maximum(most, tl.max(tl.abs(result.to(tl.float32)), axis=1))
    step = most / LIMIT
    tl.store(scales + sequence * N + n, step, mask=n < N)
    factor = (1.0 / step)[:, None]
    tl.debug_barrier()
    for head in tl.range(HEADS, num_stages=2):
        place = sequence * N * width + n[:, None] * width + head * 2 * PAIRS + d[None, :]
        value = tl.load(between + place, mask=ok, other=0.0).to(tl.float32) * factor
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=ok)


def takes_across(layers: int, head_dim: int) -> bool:
    """Whether `across` serves so many layers of so wide heads."""
    power = triton.next_power_of_2(head_dim) == head_dim
    return layers <= MOST_LAYERS and power and 16 <= head_dim <= 128


def across(qkv: Tensor, first: Tensor, second: Tensor, heads: int) -> Tensor:
    """RoPE and attention across layers: ``qkv [M, N, 3 * heads * hd]`` dense -> ``[M, N, heads * hd]``.

    first, second: ``[1, N, hd / 4, 2]`` float32, (cos, sin) of either half of the pairs.
    """
    count, layers, width = qkv.shape
    dim = width // 3 // heads
    out = torch.empty(count, layers, heads * dim, dtype=qkv.dtype, device=qkv.device)
    sizes = _across_sizes(layers, dim)
    with torch.cuda.device_of(qkv):
        _across[(count, heads)](
            qkv, out, first.contiguous(), second.contiguous(), heads, dim**-0.5, **sizes
        )
    return out


def across_quantized(
    qkv: Tensor,
    first: Tensor,
    second: Tensor,
    heads: int,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """`across`, its rows quantized as `quantize_rows` does: ``[M * N, d]`` and scales ``[M * N, 1]``."""
    count, layers, width = qkv.shape
    dim = width // 3 // heads
    between = torch.empty(count * layers, heads * dim, dtype=qkv.dtype, device=qkv.device)
    out = torch.empty(between.shape, dtype=dtype, device=qkv.device)
    scales = torch.empty(count * layers, 1, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _across_quantized[(count,)](
            qkv, between, out, scales, first.contiguous(), second.contiguous(), dim**-0.5,
            LIMIT=E4M3_MAX, HEADS=heads, **_across_sizes(layers, dim),
        )  # fmt: skip
    return out, scales


def _across_sizes(layers: int, head_dim: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(layers))
    # 4 warps: with 2 registers spill
    return {"N": layers, "NB": padded, "PAIRS": head_dim // 2, "num_warps": 4}


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

    dtype: another one gives the values as they are before they are quantized. silu: of ``silu(x)``.
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
