"""Triton kernels of attention: across layers with its RoPE, see kernels.py for what holds of all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Largest finite value of torch.float8_e4m3fn.
E4M3_MAX = 448.0

#: The attention across layers holds all layers of a head in one program's registers, up to so many.
MOST_LAYERS = 32


@triton.jit
def _turn(value, cos, sin, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """``value [ROWS, 2 * PAIRS]`` float32, its interleaved pairs turned in registers."""
    x0, x1 = tl.split(tl.reshape(value, (ROWS, PAIRS, 2)))
    turned = tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos)
    return tl.reshape(turned, (ROWS, 2 * PAIRS))


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
