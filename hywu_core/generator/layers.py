"""Layers of the generator: fused projections, four residual sublayers, one block.

A sublayer takes a *view* of the residual stream, and in inference adds its result to that view in
place, chunk by chunk: every sublayer mixes along one axis only, so chunks along the others never
see each other's results. Under autograd the same code runs unchunked and out of place.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GeneratorConfig
from .rope import Axes, StackTables, rotate, rotate_

log = logging.getLogger(__name__)

EPS = 1e-6

#: Attention kernels take no more sequences at once: a CUDA grid's second and third dimensions end there.
MOST_SEQUENCES = 65535


@dataclass(frozen=True)
class Context:
    """What a block needs beside the residual stream.

    condition: ``[B, L, d]``. mask: bool ``[B, 1, 1, L]`` or None. keys: tables a stack, to turn the
    condition's keys by. in_place: add into the stream (inference) or return a new one (autograd).
    chunk_rows: rows of ``d_model`` values that one chunk holds at most, about. kernels: the module of
    Triton kernels to use (inference only), or None for torch.
    """

    condition: Tensor
    mask: Tensor | None
    keys: list[Axes]
    in_place: bool
    chunk_rows: int
    kernels: ModuleType | None = None

    def rotate(self, x: Tensor, axes: Axes) -> Tensor:
        """``x [M, L, H, hd]`` turned; over itself in inference."""
        if self.kernels is not None:
            return self.kernels.rotate_(x, axes.first, axes.second)
        table = axes.whole()[:, :, None]
        return rotate_(x, table) if self.in_place else rotate(x, table)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, eps 1e-6 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPS)


def weights(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a Linear as `like` needs them.

    A host that keeps weights elsewhere or in another dtype gives its Linear a method `resolve(like)`;
    it is called once a sublayer, not once a chunk. In place of the weight it may give an object with a
    method ``linear(x, bias)`` that multiplies in its own way (see speed/fp8.py).
    """
    resolve = getattr(layer, "resolve", None)
    return (layer.weight, layer.bias) if resolve is None else resolve(like)


def linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``F.linear`` with either kind of weight that `weights` returns."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.linear(x, bias)


class SelfAttention(nn.Module):
    """Parameters of attention with q, k and v in one product."""

    def __init__(self, dim: int, operations: Any) -> None:
        super().__init__()
        self.W_qkv = operations.Linear(dim, 3 * dim)
        self.W_o = operations.Linear(dim, dim)


class CrossAttention(nn.Module):
    """Parameters of attention to the condition with k and v in one product."""

    def __init__(self, dim: int, operations: Any) -> None:
        super().__init__()
        self.W_q = operations.Linear(dim, dim)
        self.W_kv = operations.Linear(dim, 2 * dim)
        self.W_o = operations.Linear(dim, dim)


class FeedForward(nn.Module):
    """Parameters of the feed-forward: SiLU between two products, no gate."""

    def __init__(self, dim: int, operations: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(dim, 4 * dim)
        self.fc2 = operations.Linear(4 * dim, dim)


class Block(nn.Module):
    """Attention across layers, attention within a layer, attention to the condition, feed-forward."""

    def __init__(self, config: GeneratorConfig, operations: Any = nn) -> None:
        super().__init__()
        dim = config.d_model
        self.heads, self.head_dim = dim // config.head_dim, config.head_dim
        self.self_attn_n = SelfAttention(dim, operations)
        self.self_attn_hw = SelfAttention(dim, operations)
        self.self_attn_cross = CrossAttention(dim, operations)
        self.feed_forward = FeedForward(dim, operations)
        self.norm1 = RMSNorm(dim)
        self.norm2 = RMSNorm(dim)
        self.norm3 = RMSNorm(dim)
        self.norm4 = RMSNorm(dim)

    def forward(
        self,
        streams: list[Tensor],
        tables: list[StackTables],
        context: Context,
        skip_prefix: bool = False,
    ) -> list[Tensor]:
        """streams: a residual stream ``[B, N, S, d]`` for each stack.

        skip_prefix: the attentions that do not see the condition were done already.
        """
        streams = list(streams)  # a recomputed block must find its list as it was
        if not skip_prefix:
            streams = self.prefix(streams, tables, context)
        streams = self.cross(streams, tables, context)
        return self.mlp(streams, context)

    def prefix(
        self, streams: list[Tensor], tables: list[StackTables], context: Context
    ) -> list[Tensor]:
        """The two sublayers that do not see the condition."""
        across = _resolved(self.self_attn_n, streams[0])
        for i in range(len(streams)):
            # across layers: sequences of N, one a position, so the stream is looked at transposed
            turned = self._self_attention(
                streams[i].transpose(1, 2), self.norm1, across, tables[i].layers, context
            )
            streams[i] = turned.transpose(1, 2)
        del across
        within = _resolved(self.self_attn_hw, streams[0])
        for i in range(len(streams)):
            streams[i] = self._self_attention(
                streams[i], self.norm2, within, tables[i].within, context
            )
        return streams

    def _self_attention(
        self, x: Tensor, norm: RMSNorm, resolved: _Resolved, axes: Axes, context: Context
    ) -> Tensor:
        """Attention along dimension 2 of ``x [B, M, L, d]``; chunks along dimension 1."""
        batch, _, length, _ = x.shape
        heads = self.heads

        def attend(normed: Callable[[], Tensor], view: Tensor, start: int) -> Tensor:
            qkv = linear(normed(), *resolved["W_qkv"])
            qkv = qkv.view(-1, length, 3 * heads, self.head_dim)
            turned = context.rotate(qkv[:, :, : 2 * heads], axes)  # q and k in one go
            q, k = turned[:, :, :heads], turned[:, :, heads:]
            out = _attention(q, k, qkv[:, :, 2 * heads :], None)
            return out.view(view.shape)

        most = MOST_SEQUENCES // batch
        return _residual(x, norm, attend, resolved["W_o"], batch * length, context, most)

    def cross(
        self, streams: list[Tensor], tables: list[StackTables], context: Context
    ) -> list[Tensor]:
        """Attention of every position to the condition."""
        resolved = _resolved(self.self_attn_cross, streams[0])
        kv = linear(context.condition, *resolved["W_kv"])
        kv = kv.unflatten(-1, (2, self.heads, self.head_dim))
        for i, stream in enumerate(streams):
            batch, _, length, _ = stream.shape
            key = kv[:, :, 0]
            if context.in_place and len(streams) > 1:
                key = key.clone()  # kv is the keys' source for every stack
            key = context.rotate(key, context.keys[i])
            value, own = kv[:, :, 1], tables[i]

            def attend(
                normed: Callable[[], Tensor],
                view: Tensor,
                start: int,
                key=key,
                value=value,
                own=own,
            ) -> Tensor:
                q = linear(normed(), *resolved["W_q"])
                items, count, positions, _ = view.shape
                q = q.reshape(-1, positions, self.heads, self.head_dim)
                q = context.rotate(q, own.query(start, count, items))
                q = q.view(items, -1, self.heads, self.head_dim)
                return _attention(q, key, value, context.mask).view(view.shape)

            streams[i] = _residual(
                stream, self.norm3, attend, resolved["W_o"], batch * length, context
            )
        return streams

    def mlp(self, streams: list[Tensor], context: Context) -> list[Tensor]:
        """The feed-forward, over chunks of rows."""
        resolved = _resolved(self.feed_forward, streams[0])

        def hidden(normed: Callable[[], Tensor], view: Tensor, start: int) -> Tensor:
            h = linear(normed(), *resolved["fc1"])
            return F.silu(h, inplace=context.in_place)

        for i, stream in enumerate(streams):
            rows = stream.view(1, -1, 1, stream.shape[-1]) if context.in_place else stream
            result = _residual(rows, self.norm4, hidden, resolved["fc2"], 1, context)
            streams[i] = result.view(stream.shape)
        return streams


class Transformer(nn.Module):
    """The body: token embeddings of every stack, shared blocks, shared output projections."""

    def __init__(self, config: GeneratorConfig, operations: Any) -> None:
        super().__init__()
        dim, packed = config.d_model, config.d_model // config.dim_accumulation
        rank, grids = config.layout.rank, config.grids
        self.norm_input = RMSNorm(dim)
        self.norm_tokens = RMSNorm(dim)
        self.norm_final = RMSNorm(dim)
        tokens = [nn.Embedding(grid.num_tokens * rank, packed) for grid in grids]
        layers = [nn.Embedding(grid.num_layers, packed) for grid in grids]
        single = len(grids) == 1
        self.hw_pos = tokens[0] if single else nn.ModuleList(tokens)
        self.layer_pos = layers[0] if single else nn.ModuleList(layers)
        self.blocks = nn.ModuleList(Block(config, operations) for _ in range(config.num_blocks))
        self.proj_out_A = operations.Linear(packed, config.token_dim)
        self.proj_out_B = operations.Linear(packed, config.token_dim)

    def embeddings(self, stack: int) -> tuple[Tensor, Tensor]:
        """Token and layer embeddings ``[tokens * rank, d/acc]``, ``[layers, d/acc]`` of a stack."""
        if isinstance(self.hw_pos, nn.Embedding):
            return self.hw_pos.weight, self.layer_pos.weight
        return self.hw_pos[stack].weight, self.layer_pos[stack].weight


_Resolved = dict[str, tuple[Tensor, "Tensor | None"]]


def _resolved(module: nn.Module, like: Tensor) -> _Resolved:
    return {name: weights(linear, like) for name, linear in module.named_children()}


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of ``[B, L, H, hd]`` tensors; returns ``[B, L, H * hd]``."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(2)


def even_step(length: int, most: int) -> int:
    """The step that cuts `length` into as few chunks of `most` as there must be, all alike."""
    chunks = -(-length // max(1, most))
    return -(-length // chunks)


def _residual(
    x: Tensor,
    norm: RMSNorm,
    branch: Callable[[Callable[[], Tensor], Tensor, int], Tensor],
    out: tuple[Any, Tensor | None],
    rows_each: int,
    context: Context,
    most: int | None = None,
) -> Tensor:
    """``x + linear(branch(norm(x)))`` over ``x [B, M, L, d]``, in chunks along M when in place.

    branch: takes the norm as a function (so that its result lives no longer than it must), the chunk
    and the chunk's start. rows_each: rows of d values that one index of M holds. most: indices of M
    that a chunk may hold at most, where not only memory says.
    """
    if not context.in_place:
        return x + linear(branch(lambda: norm(x), x, 0), *out)
    weight, bias = out
    # autocast leaves in-place products alone, which then meet two types
    plain = not torch.is_autocast_enabled(x.device.type)
    fitting = context.chunk_rows // rows_each
    step = even_step(x.shape[1], fitting if most is None else min(fitting, most))
    for start in range(0, x.shape[1], step):
        view = x[:, start : start + step]
        adds = plain and view.is_contiguous() and isinstance(weight, Tensor)
        hidden = branch(_normed(norm, view, bias if adds else None, context), view, start)
        if adds:
            rows = view.view(-1, view.shape[-1])
            if bias is not None and context.kernels is None:
                rows.add_(bias)
            rows.addmm_(hidden.view(-1, hidden.shape[-1]), weight.t())
        else:
            view.add_(linear(hidden, weight, bias))
        del hidden  # else it lives on while the next chunk's is made
    return x


def _normed(
    norm: RMSNorm, view: Tensor, bias: Tensor | None, context: Context
) -> Callable[[], Tensor]:
    """The chunk's norm, to be called once; with kernels it adds `bias` to the chunk on its way."""
    kernels = context.kernels
    if kernels is None:
        return lambda: norm(view)
    return lambda: kernels.rms_norm(view, norm.weight, EPS, bias)


# -- Triton where there is Triton ------------------------------------------------------------------


@functools.cache
def rounds_to_e4m3(device: torch.device) -> bool:
    """Whether a CUDA device has instructions for e4m3; Triton builds no kernel with it elsewhere."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def fused_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels for a device, or None: no CUDA, no Triton, or none that can be built.

    Triton builds a kernel at its first call; that is tried once, on a few values, so that a machine
    without a C compiler falls back to torch with one line in the log.
    """
    if device.type != "cuda":
        return None
    try:
        from .speed import kernels

        x = torch.ones(1, 1, 1, 16, device=device, dtype=torch.bfloat16)
        table = torch.ones(1, 1, 4, 2, device=device)
        kernels.rms_norm(x, x[0, 0, 0], EPS, x[0, 0, 0])
        kernels.rotate_(x, table, table)
        if rounds_to_e4m3(device):
            kernels.quantize_rows(x.view(1, 16))
    except ImportError:
        return None
    except (
        Exception
    ) as error:  # Triton, its compiler and the driver each raise classes of their own
        log.warning("Triton kernels can't be built here, torch is used: %s", error)
        return None
    return kernels
