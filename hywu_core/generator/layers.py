"""Layers of the generator: fused projections, four residual sublayers, one block.

A sublayer takes a *view* of the residual stream, and in inference adds its result to that view in
place, chunk by chunk: every sublayer mixes along one axis only, so chunks along the others never
see each other's results. Under autograd the same code runs unchunked and out of place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GeneratorConfig
from .rope import StackTables, rotate, rotate_

EPS = 1e-6


@dataclass(frozen=True)
class Context:
    """What a block needs beside the residual stream.

    condition: ``[B, L, d]``. mask: bool ``[B, 1, 1, L]`` or None. keys: a table a stack, to turn the
    condition's keys by. in_place: add into the stream (inference) or return a new one (autograd).
    chunk_rows: rows of ``d_model`` values that one chunk holds at most, about.
    """

    condition: Tensor
    mask: Tensor | None
    keys: list[Tensor]
    in_place: bool
    chunk_rows: int

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """x turned; over itself in inference."""
        return rotate_(x, table) if self.in_place else rotate(x, table)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, eps 1e-6 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPS)


def weights(linear: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a Linear as `like` needs them.

    A host that keeps weights elsewhere or in another dtype gives its Linear a method `resolve(like)`;
    it is called once a sublayer, not once a chunk.
    """
    resolve = getattr(linear, "resolve", None)
    return (linear.weight, linear.bias) if resolve is None else resolve(like)


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
        self, x: Tensor, norm: RMSNorm, resolved: _Resolved, table: Tensor, context: Context
    ) -> Tensor:
        """Attention along dimension 2 of ``x [B, M, L, d]``; chunks along dimension 1."""
        batch, _, length, _ = x.shape
        table = table[:, None, None]

        def attend(view: Tensor) -> Tensor:
            qkv = F.linear(norm(view), *resolved["W_qkv"])
            qkv = qkv.view(-1, length, 3, self.heads, self.head_dim)
            q, k = context.rotate(qkv[:, :, :2], table).unbind(2)
            out = _attention(q, k, qkv[:, :, 2], None)
            return out.view(view.shape)

        return _residual(x, attend, resolved["W_o"], batch * length, context)

    def cross(
        self, streams: list[Tensor], tables: list[StackTables], context: Context
    ) -> list[Tensor]:
        """Attention of every position to the condition."""
        resolved = _resolved(self.self_attn_cross, streams[0])
        kv = F.linear(context.condition, *resolved["W_kv"])
        kv = kv.unflatten(-1, (2, self.heads, self.head_dim))
        for i, stream in enumerate(streams):
            batch, _, length, _ = stream.shape
            # kv is the keys' source for every stack, so it stays as it is unless there is one
            turn = context.rotate if len(streams) == 1 else rotate
            key = turn(kv[:, :, 0], context.keys[i][..., None, :, :])
            value, own = kv[:, :, 1], tables[i]

            def attend(view: Tensor, start: int, key=key, value=value, own=own) -> Tensor:
                q = F.linear(self.norm3(view), *resolved["W_q"])
                q = q.unflatten(-1, (self.heads, self.head_dim))
                table = own.query(start, start + view.shape[1])[..., None, :, :]
                q = context.rotate(q, table)
                return _attention(q.flatten(1, 2), key, value, context.mask).view(view.shape)

            streams[i] = _residual(stream, attend, resolved["W_o"], batch * length, context, True)
        return streams

    def mlp(self, streams: list[Tensor], context: Context) -> list[Tensor]:
        """The feed-forward, over chunks of rows."""
        resolved = _resolved(self.feed_forward, streams[0])

        def hidden(view: Tensor) -> Tensor:
            h = F.linear(self.norm4(view), *resolved["fc1"])
            return F.silu(h, inplace=context.in_place)

        for i, stream in enumerate(streams):
            if context.in_place:
                _residual(
                    stream.view(1, -1, 1, stream.shape[-1]), hidden, resolved["fc2"], 1, context
                )
            else:
                streams[i] = _residual(stream, hidden, resolved["fc2"], 1, context)
        return streams


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


def _residual(x, branch, out, rows_each: int, context: Context, with_start: bool = False) -> Tensor:
    """``x + linear(branch(x))`` over ``x [B, M, L, d]``, in chunks along M when in place.

    rows_each: rows of d values that one index of M holds. with_start: branch takes the chunk's start.
    """
    if not context.in_place:
        hidden = branch(x, 0) if with_start else branch(x)
        return x + F.linear(hidden, *out)
    weight, bias = out
    step = even_step(x.shape[1], context.chunk_rows // rows_each)
    for start in range(0, x.shape[1], step):
        view = x[:, start : start + step]
        hidden = branch(view, start) if with_start else branch(view)
        if view.is_contiguous():
            rows = view.view(-1, view.shape[-1])
            if bias is not None:
                rows.add_(bias)
            rows.addmm_(hidden.view(-1, hidden.shape[-1]), weight.t())
        else:
            view.add_(F.linear(hidden, weight, bias))
        del hidden  # else it lives on while the next chunk's is made
    return x
