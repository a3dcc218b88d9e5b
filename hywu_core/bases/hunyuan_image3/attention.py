"""Attention over segments of a sequence, without masks over all of it; keys and values kept by index."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from .config import HunyuanConfig
from .embed import rms_norm
from .rope import rotate


class Segment(NamedTuple):
    """Neighbouring tokens [start, stop) that see alike: all up to `stop` (full), or up to themselves."""

    start: int
    stop: int
    full: bool


@dataclass(frozen=True)
class Rows:
    """The tokens of one batch item that a pass computes: its segments, without a gap, in order.

    Rows of the batch after the last segment's are padding: they see nothing, and nothing sees them.
    """

    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def stop(self) -> int:
        return self.segments[-1].stop


class KVCache:
    """Keys and values of all layers by index of the sequence: ``[B, kv heads, capacity, d]`` a layer.

    A later pass overwrites what it computes again and reads the rest. `close` gives the memory back;
    `KVCache.live` counts the bytes of all that are open.
    device: where they rest between uses, None where they are made; elsewhere one layer's are copied to the
        device at a time.
    """

    _open: weakref.WeakSet[KVCache] = weakref.WeakSet()

    def __init__(
        self, config: HunyuanConfig, batch: int, capacity: int, device: torch.device | None = None
    ) -> None:
        self.capacity, self._device = capacity, device
        self._shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * config.num_layers
        KVCache._open.add(self)

    @classmethod
    def live(cls) -> int:
        """Bytes of all caches that were not closed."""
        return sum(cache.nbytes for cache in cls._open)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self._layers if pair is not None for t in pair)

    def close(self) -> None:
        self._layers = [None] * len(self._layers)
        KVCache._open.discard(self)

    def grow(self, capacity: int) -> None:
        """Make room for a longer sequence; what is kept stays."""
        if any(pair is not None and pair[0].is_pinned() for pair in self._layers):
            torch.cuda.synchronize()  # copies to host memory may be under way
        kept, before = self._layers, self.capacity
        self._shape = (*self._shape[:2], capacity, self._shape[3])
        self.capacity = capacity
        self._layers = [pair and tuple(self._grown(t, before) for t in pair) for pair in kept]

    def _grown(self, kept: Tensor, before: int) -> Tensor:
        made = torch.zeros(
            self._shape, dtype=kept.dtype, device=kept.device, pin_memory=kept.is_pinned()
        )
        made[:, :, :before] = kept
        return made

    def put(self, layer: int, k: Tensor, v: Tensor, plan: Sequence[Rows]) -> tuple[Tensor, Tensor]:
        """Keep ``[B, kv heads, S, d]`` at each item's own index; returns all that is kept."""
        pair = self._layers[layer]
        if pair is None:
            pair = tuple(self._empty(t) for t in (k, v))
            self._layers[layer] = pair
        away = self._device is not None
        for kept, new in zip(pair, (k, v), strict=True):
            if away:
                _keep_away(kept, new.contiguous(), plan)
                continue
            for items, rows in _alike(plan):
                kept[items, :, rows.start : rows.stop] = new[items, :, : rows.stop - rows.start]
        if away:
            # page-locked memory is read behind what was queued before, and written to behind this
            made = (t.to(k.device, copy=True, non_blocking=t.is_pinned()) for t in pair)
            return tuple(made)  # type: ignore[return-value]
        return pair

    def _empty(self, like: Tensor) -> Tensor:
        """Zeros for a layer; in host memory page-locked where the device is CUDA, ten times as fast to copy."""
        if self._device is not None and self._device.type == "cpu" and like.is_cuda:
            return torch.zeros(self._shape, dtype=like.dtype, pin_memory=True)
        return like.new_zeros(self._shape, device=self._device)


def _keep_away(kept: Tensor, new: Tensor, plan: Sequence[Rows]) -> None:
    """Copy each item's rows head by head: both sides are whole there, so that nothing is staged between."""
    pinned = kept.is_pinned()
    for item, rows in enumerate(plan):
        for head in range(kept.shape[1]):
            here = kept[item, head, rows.start : rows.stop]
            here.copy_(new[item, head, : rows.stop - rows.start], non_blocking=pinned)


def _alike(plan: Sequence[Rows]) -> list[tuple[Any, Rows]]:
    """(batch items, their rows) of each group of items with equal rows."""
    groups: dict[Rows, list[int]] = {}
    for item, rows in enumerate(plan):
        groups.setdefault(rows, []).append(item)
    if len(groups) == 1:
        return [(slice(None), plan[0])]
    return [(items, rows) for rows, items in groups.items()]


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Rows]) -> Tensor:
    """q ``[B, heads, S, d]``, each item's rows from `Rows.start` on; k, v ``[B, kv heads, C, d]`` by
    index of the sequence. Returns ``[B, heads, S, d]``; heads share keys in groups.
    """
    out = torch.zeros_like(q)
    for items, rows in _alike(plan):
        for start, stop, full in rows.segments:
            here = slice(start - rows.start, stop - rows.start)
            mask = None if full else _causal(stop - start, stop, q)
            out[items, :, here] = F.scaled_dot_product_attention(
                q[items, :, here], k[items, :, :stop], v[items, :, :stop], mask, enable_gqa=True
            )
    return out


def _causal(rows: int, keys: int, q: Tensor) -> Tensor:
    """The last `rows` of `keys` tokens, each seeing itself and what came before.

    On CUDA as torch's own kind of mask, with which flash attention holds neither it nor the scores; kernels that
    take a mask of booleans there make all scores a tensor where heads share keys.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return causal_lower_right(rows, keys)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    return seen.tril_(keys - rows)


class Attention(nn.Module):
    """Grouped-query attention; rotated first, then normalized over the head.

    `qkv_proj`'s rows are a group per key head: its query heads, its key, its value.
    """

    def __init__(self, config: HunyuanConfig, operations: Any = nn) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.eps = config.head_dim, config.eps
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = operations.Linear(config.hidden_size, width, bias=False)
        self.o_proj = operations.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.query_layernorm = Norm(self.head_dim, config.eps)
        self.key_layernorm = Norm(self.head_dim, config.eps)

    def forward(
        self, x: Tensor, turn: Tensor, plan: Sequence[Rows], cache: KVCache | None, layer: int
    ) -> Tensor:
        """x ``[B, S, hidden]``; turn ``[2, B, S, d]``: cos and sin of the rows."""
        q, k, v = self.project(x, turn)
        if cache is not None:
            k, v = cache.put(layer, k, v, plan)
        return self.o_proj(attend(q, k, v, plan).transpose(1, 2).flatten(2))

    def project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, heads, S, d]``, keys and values ``[B, kv heads, S, d]``."""
        each = self.heads // self.kv_heads
        groups = self.qkv_proj(x).unflatten(-1, (self.kv_heads, each + 2, self.head_dim))
        q, k, v = groups.split((each, 1, 1), dim=3)
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        q = self.query_layernorm(rotate(q, turn)).to(v.dtype)
        return q, self.key_layernorm(rotate(k, turn)).to(v.dtype), v


class Norm(nn.Module):
    """Root mean square normalization, computed in float32 (see `rms_norm`)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.device), self.eps)
