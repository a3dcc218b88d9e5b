"""Layers of the generator: fused projections, four residual sublayers, one block.

A sublayer takes a *view* of the hidden states, and in inference adds its result to that view in
place, chunk by chunk: every sublayer mixes along one axis only, so chunks along the others never
see each other's results. Under autograd the same code runs unchunked and out of place. Sublayers that
mix nothing across layers may also take turns on each chunk (the switch ``fp8_loop``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class Sublayer:
    """``x + linear(branch(norm(x)), *out)`` of one stack's hidden states ``[B, M, L, d]``, chunks along M.

    first: the product that the norm goes into.
    branch: takes the norm as a function (so that its result lives no longer than it must), the chunk and the
        chunk's start.
    most: indices of M that a chunk may hold at most, where not only memory says.
    any_rows: positions don't see each other either: a chunk may be cut anywhere.
    """

    norm: RMSNorm
    first: Product
    branch: Callable[[Callable[[], Any], Tensor, int], Any]
    out: Product
    most: int | None = None
    any_rows: bool = False


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
        left = [(self._cross, self.self_attn_cross.W_q), (self._mlp, self.feed_forward.fc1)]
        if not skip_prefix:
            hidden = self.across(hidden, context)
            left = [(self._within, self.self_attn_hw.W_qkv), *left]
        # what is left mixes nothing across layers
        if context.passes.takes_turns([layer for _, layer in left], hidden):
            made = [list(make(hidden, context)) for make, _ in left]
            return _take_turns(hidden, made, context)
        for make, _ in left:
            hidden = _whole(hidden, make, context)
        return hidden

    def prefix(self, hidden: list[Tensor], context: Context) -> list[Tensor]:
        """The two sublayers that do not see the condition."""
        return _whole(self.across(hidden, context), self._within, context)

    def across(self, hidden: list[Tensor], context: Context) -> list[Tensor]:
        """Attention across layers: sequences of N, one per position, so it is looked at transposed."""
        turned = [states.transpose(1, 2) for states in hidden]
        turned = _whole(turned, self._across, context)
        return [states.transpose(1, 2) for states in turned]

    def _across(self, turned: list[Tensor], context: Context) -> list[Sublayer]:
        axes = [tables.layers for tables in context.tables]
        return self._self_attention(self.self_attn_n, self.norm1, turned, axes, context)

    def _within(self, hidden: list[Tensor], context: Context) -> list[Sublayer]:
        """Attention within a layer: sequences of S, one per layer."""
        axes = [tables.within for tables in context.tables]
        return self._self_attention(self.self_attn_hw, self.norm2, hidden, axes, context)

    def _self_attention(
        self, layers: SelfAttention, norm: RMSNorm, hidden: list[Tensor], axes: list[Axes],
        context: Context,
    ) -> list[Sublayer]:  # fmt: skip
        """Attention along dimension 2 of each stack's ``[B, M, L, d]``."""
        products = _resolved(layers, hidden[0])
        out = products["W_o"]

        def attend(normed: Callable[[], Any], view: Tensor, start: int, own: Axes) -> Any:
            qkv = linear(normed(), *products["W_qkv"])
            qkv = qkv.view(-1, view.shape[2], qkv.shape[-1])
            return context.passes.self_attention(qkv, own, self.heads, out[0]).view(view.shape)

        most = passes.MOST_SEQUENCES // hidden[0].shape[0]
        return [
            Sublayer(norm, products["W_qkv"], partial(attend, own=own), out, most) for own in axes
        ]

    def _cross(self, hidden: list[Tensor], context: Context) -> Iterator[Sublayer]:
        """Attention of every position to the condition; a stack's turned keys live no longer than they must."""
        products = _resolved(self.self_attn_cross, hidden[0])
        kv = linear(context.condition, *products["W_kv"])
        kv = kv.unflatten(-1, (2, self.heads, self.head_dim))
        value = kv[:, :, 1]

        def attend(
            normed: Callable[[], Any], view: Tensor, start: int, key: Tensor, own: StackTables
        ) -> Tensor:
            q = linear(normed(), *products["W_q"])
            items, count, positions, _ = view.shape
            q = q.reshape(-1, positions, self.heads, self.head_dim)
            q = context.passes.rotate(q, own.query(start, count, items))
            q = q.view(items, -1, self.heads, self.head_dim)
            return context.passes.attention(q, key, value, context.mask).view(view.shape)

        for own, axes in zip(context.tables, context.keys, strict=True):
            key = kv[:, :, 0]
            if context.in_place and len(hidden) > 1:
                key = key.clone()  # kv is the keys' source for every stack
            branch = partial(attend, key=context.passes.rotate(key, axes), own=own)
            yield Sublayer(self.norm3, products["W_q"], branch, products["W_o"])

    def _mlp(self, hidden: list[Tensor], context: Context) -> list[Sublayer]:
        """The feed-forward, over chunks of rows."""
        products = _resolved(self.feed_forward, hidden[0])
        out = products["fc2"]

        def activated(normed: Callable[[], Any], view: Tensor, start: int) -> Any:
            return context.passes.silu(linear(normed(), *products["fc1"]), out[0])

        made = Sublayer(self.norm4, products["fc1"], activated, out, any_rows=True)
        return [made] * len(hidden)


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


#: Makes a sublayer for each stack's hidden states.
Make = Callable[[list[Tensor], Context], Iterable[Sublayer]]


def _whole(hidden: list[Tensor], make: Make, context: Context) -> list[Tensor]:
    """One sublayer over all hidden states; its weights are held no longer than that."""
    for i, sublayer in enumerate(make(hidden, context)):
        hidden[i] = _residual(hidden[i], sublayer, context)
    context.passes.settle(sublayer.out[1])  # the weights are the same for every stack
    return hidden


def _residual(x: Tensor, sublayer: Sublayer, context: Context) -> Tensor:
    """A sublayer over ``x [B, M, L, d]``, in chunks along M when in place."""
    norm, branch, out = sublayer.norm, sublayer.branch, sublayer.out
    if not context.in_place:
        return x + linear(branch(lambda: norm(x), x, 0), *out)
    rows = x.view(1, -1, 1, x.shape[-1]) if sublayer.any_rows else x
    for at in context.passes.chunks(rows.shape[1], rows.shape[0] * rows.shape[2], sublayer.most):
        view = rows[:, at]
        hidden = branch(
            lambda view=view: context.passes.norm(norm, view, out, sublayer.first[0]),
            view,
            at.start,
        )
        context.passes.accumulate(view, hidden, out)
        del hidden  # else it lives on while the next chunk's is made
    return x


def _take_turns(
    hidden: list[Tensor], sublayers: Sequence[list[Sublayer]], context: Context
) -> list[Tensor]:
    """Sublayers that mix nothing across layers, one after another on each chunk of whole layers.

    Between two of them the product is added, normed and quantized in one pass.
    """
    run = context.passes
    waiting = []  # what is pending before each sublayer
    for made in sublayers:
        waiting.append(run.pending)
        run.settle(made[0].out[1])
    after = run.pending
    for i, x in enumerate(hidden):
        own = [made[i] for made in sublayers]
        most = min(sublayer.most or x.shape[1] for sublayer in own)
        for at in run.chunks(x.shape[1], x.shape[0] * x.shape[2], most):
            view, first = x[:, at], own[0]
            run.resume(waiting[0])
            normed = [run.norm(first.norm, view, first.out, first.first[0])]
            for k, sublayer in enumerate(own):
                added = run.product(sublayer.branch(normed.pop, view, at.start), sublayer.out)
                if k + 1 == len(own):
                    view.add_(added)
                else:
                    following = own[k + 1]
                    run.resume(waiting[k + 1])
                    normed.append(run.add_norm(following.norm, view, added, following.first[0]))
                del added  # else it lives on in the next sublayer
    run.resume(after)
    return hidden
