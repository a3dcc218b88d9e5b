"""Layers of the generator: fused projections, four residual sublayers, one block.

A sublayer takes a *view* of the hidden states, and in inference adds its result to that view in
place, chunk by chunk: every sublayer mixes along one axis only, so chunks along the others never
see each other's results. Under autograd the same code runs unchunked and out of place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GeneratorConfig
from .rope import Axes, StackTables
from .speed import passes
from .speed.passes import EPS, Passes, linear


@dataclass(frozen=True)
class Context:
    """What blocks need beside the hidden states.

    condition: ``[B, L, d]``.
    mask: bool ``[B, 1, 1, L]`` or None.
    tables: position tables per stack.
    keys: tables per stack to turn the condition's keys by.
    passes: what happens between matrix products.
    """

    condition: Tensor
    mask: Tensor | None
    tables: list[StackTables]
    keys: list[Axes]
    passes: Passes

    @property
    def in_place(self) -> bool:
        """Whether results are added into the hidden states (inference), or make new ones (autograd)."""
        return self.passes.in_place


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, eps 1e-6 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPS)


#: Weight and bias of a product; see `weights`.
Product = tuple[Any, "Tensor | None"]


def weights(layer: nn.Module, like: Tensor) -> Product:
    """Weight and bias of a Linear as `like` needs them.

    A host that keeps weights elsewhere or in another dtype gives its Linear a method `resolve(like)`;
    it is called once per sublayer, not once per chunk. In place of the weight it may give an object
    with a method ``linear(x, bias)`` that multiplies in its own way (see speed/fp8.py).
    """
    resolve = getattr(layer, "resolve", None)
    return (layer.weight, layer.bias) if resolve is None else resolve(like)


def _resolved(module: nn.Module, like: Tensor) -> dict[str, Product]:
    return {name: weights(layer, like) for name, layer in module.named_children()}


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
        self, hidden: list[Tensor], context: Context, skip_prefix: bool = False
    ) -> list[Tensor]:
        """hidden: hidden states ``[B, N, S, d]`` of each stack.

        skip_prefix: the attentions that do not see the condition were done already.
        """
        hidden = list(hidden)  # a recomputed block must find its list as it was
        if not skip_prefix:
            hidden = self.prefix(hidden, context)
        hidden = self.cross(hidden, context)
        return self.mlp(hidden, context)

    def prefix(self, hidden: list[Tensor], context: Context) -> list[Tensor]:
        """The two sublayers that do not see the condition."""
        return self.within(self.across(hidden, context), context)

    def across(self, hidden: list[Tensor], context: Context) -> list[Tensor]:
        """Attention across layers: sequences of N, one per position, so it is looked at transposed."""
        products = _resolved(self.self_attn_n, hidden[0])
        for i, tables in enumerate(context.tables):
            turned = hidden[i].transpose(1, 2)
            turned = self._self_attention(turned, self.norm1, products, tables.layers, context)
            hidden[i] = turned.transpose(1, 2)
        context.passes.settle(products["W_o"][1])
        return hidden

    def within(self, hidden: list[Tensor], context: Context) -> list[Tensor]:
        """Attention within a layer: sequences of S, one per layer."""
        products = _resolved(self.self_attn_hw, hidden[0])
        for i, tables in enumerate(context.tables):
            hidden[i] = self._self_attention(
                hidden[i], self.norm2, products, tables.within, context
            )
        context.passes.settle(products["W_o"][1])
        return hidden

    def _self_attention(
        self, x: Tensor, norm: RMSNorm, products: dict[str, Product], axes: Axes, context: Context
    ) -> Tensor:
        """Attention along dimension 2 of ``x [B, M, L, d]``; chunks along dimension 1."""
        batch, _, length, _ = x.shape
        out = products["W_o"]

        def attend(normed: Callable[[], Any], view: Tensor, start: int) -> Any:
            qkv = linear(normed(), *products["W_qkv"])
            qkv = qkv.view(-1, length, qkv.shape[-1])
            return context.passes.self_attention(qkv, axes, self.heads, out[0]).view(view.shape)

        most = passes.MOST_SEQUENCES // batch
        return _residual(
            x, norm, products["W_qkv"], attend, out, batch * length, context, most
        )  # fmt: skip

    def cross(self, hidden: list[Tensor], context: Context) -> list[Tensor]:
        """Attention of every position to the condition."""
        products = _resolved(self.self_attn_cross, hidden[0])
        kv = linear(context.condition, *products["W_kv"])
        kv = kv.unflatten(-1, (2, self.heads, self.head_dim))
        for i, states in enumerate(hidden):
            batch, _, length, _ = states.shape
            key = kv[:, :, 0]
            if context.in_place and len(hidden) > 1:
                key = key.clone()  # kv is the keys' source for every stack
            key = context.passes.rotate(key, context.keys[i])
            value, own = kv[:, :, 1], context.tables[i]

            def attend(
                normed: Callable[[], Any], view: Tensor, start: int, key=key, value=value, own=own
            ) -> Tensor:
                q = linear(normed(), *products["W_q"])
                items, count, positions, _ = view.shape
                q = q.reshape(-1, positions, self.heads, self.head_dim)
                q = context.passes.rotate(q, own.query(start, count, items))
                q = q.view(items, -1, self.heads, self.head_dim)
                return context.passes.attention(q, key, value, context.mask).view(view.shape)

            hidden[i] = _residual(
                states,
                self.norm3,
                products["W_q"],
                attend,
                products["W_o"],
                batch * length,
                context,
            )
        context.passes.settle(products["W_o"][1])
        return hidden

    def mlp(self, hidden: list[Tensor], context: Context) -> list[Tensor]:
        """The feed-forward, over chunks of rows."""
        products = _resolved(self.feed_forward, hidden[0])
        out = products["fc2"]

        def activated(normed: Callable[[], Any], view: Tensor, start: int) -> Any:
            return context.passes.silu(linear(normed(), *products["fc1"]), out[0])

        for i, states in enumerate(hidden):
            rows = states.view(1, -1, 1, states.shape[-1]) if context.in_place else states
            rows = _residual(rows, self.norm4, products["fc1"], activated, out, 1, context)
            hidden[i] = rows.view(states.shape)
        context.passes.settle(out[1])
        return hidden


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


def _residual(
    x: Tensor,
    norm: RMSNorm,
    first: Product,
    branch: Callable[[Callable[[], Any], Tensor, int], Any],
    out: Product,
    rows_each: int,
    context: Context,
    most: int | None = None,
) -> Tensor:
    """``x + linear(branch(norm(x)))`` over ``x [B, M, L, d]``, in chunks along M when in place.

    first: the product that the norm goes into.
    branch: takes the norm as a function (so that its result lives no longer than it must), the chunk and the
        chunk's start.
    rows_each: rows of d values that one index of M holds.
    most: indices of M that a chunk may hold at most, where not only memory says.
    """
    if not context.in_place:
        return x + linear(branch(lambda: norm(x), x, 0), *out)
    for at in context.passes.chunks(x.shape[1], rows_each, most):
        view = x[:, at]
        hidden = branch(
            lambda view=view: context.passes.norm(norm, view, out, first[0]), view, at.start
        )
        context.passes.accumulate(view, hidden, out)
        del hidden  # else it lives on while the next chunk's is made
    return x
