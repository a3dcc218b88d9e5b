"""Rotary position tables of the generator, kept separable, and their application.

Interleaved pairs ``(x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos)``, theta 10000 (RoFormer, Su et al.
2021). Every attention of a block splits the head's pairs in two halves, one per axis, but for the
attention across layers, whose pairs all turn by the layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import GeneratorConfig, RoPEPrecision

THETA = 10000.0


def axis_table(
    length: int, dim: int, precision: RoPEPrecision, device: torch.device, offset: int = 0
) -> Tensor:
    """Table of one axis: (cos, sin) of position x frequency, float32 ``[length, dim / 2, 2]``.

    precision "bfloat16" rounds positions, frequencies, angles and the result as autocast does in
    the official CUDA pipeline, where 1,379 positions collapse to 557 distinct ones.
    """
    positions = torch.arange(offset, offset + length, device=device, dtype=torch.float32)
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    frequencies = 1.0 / THETA**exponents
    if precision == "bfloat16":
        positions, frequencies = positions.bfloat16(), frequencies.bfloat16()
    angles = positions[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


class Axes(NamedTuple):
    """A table for ``x [M, L, H, hd]`` as its two halves of pairs, each broadcastable along M and L.

    first, second: ``[M or 1, L or 1, hd/4, 2]``.
    Kernels read the halves where they are.
    """

    first: Tensor
    second: Tensor

    def whole(self) -> Tensor:
        """Both halves in one tensor ``[M or 1, L or 1, hd/2, 2]``."""
        return _two_axes(self.first, self.second)

    @classmethod
    def of(cls, table: Tensor) -> Axes:
        """From a whole table ``[(M,) L, hd/2, 2]``."""
        table = table if table.ndim == 4 else table[None]
        half = table.shape[2] // 2
        return cls(table[:, :, :half], table[:, :, half:])


class StackTables:
    """The position tables of one stack on one device.

    layers ``[1, N, hd/4, 2]`` twice: attention across layers. within ``[1, S, hd/4, 2]`` twice: token
    index and row group. The query of the cross attention has one half per layer, one half per position
    (`query_layer` ``[N, hd/4, 2]``, `query_position` ``[S, hd/4, 2]``): the whole table would have a
    row for every position of every layer.
    """

    def __init__(self, config: GeneratorConfig, stack: int, device: torch.device) -> None:
        grid, rows = config.grids[stack], config.rows_per_token
        head, half, precision = config.head_dim, config.head_dim // 2, config.rope_precision
        tokens, layers, length = grid.num_tokens, grid.num_layers, grid.num_tokens * rows
        self._half, self._precision = half, precision
        # kernels read these as they lie
        self.layers = Axes(
            *(t.contiguous() for t in Axes.of(axis_table(layers, head, precision, device)))
        )
        within = _two_axes(
            axis_table(tokens, half, precision, device)[:, None],
            axis_table(rows, half, precision, device)[None],
        )
        self.within = Axes.of(within.flatten(0, 1))
        self.query_layer = axis_table(layers, half, precision, device)
        self.query_position = axis_table(length, half, precision, device)
        self.key_offset = max(tokens, rows)

    def query(self, start: int, count: int, batch: int) -> Axes:
        """Query tables of layers [start, start + count), for ``x [batch * count, S, H, hd]``."""
        layers = self.query_layer[start : start + count].repeat(batch, 1, 1)
        return Axes(layers[:, None], self.query_position[None])

    def key(self, length: int, positions: Tensor | None) -> Axes:
        """Key tables for ``x [B, length, H, hd]``.

        positions ``[B, length]``: the index of each token among those that count, None for all.
        """
        device = self.query_layer.device
        half = axis_table(length, self._half, self._precision, device, self.key_offset)
        half = half[None] if positions is None else half[positions]
        return Axes(half, half)

    def tensors(self) -> list[Tensor]:
        """All tables, to share them between streams."""
        return [*self.layers, *self.within, self.query_layer, self.query_position]


def _two_axes(first: Tensor, second: Tensor) -> Tensor:
    """Broadcast two axes' tables against each other and join their pairs."""
    shape = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    first = first.expand(*shape, *first.shape[-2:])
    second = second.expand(*shape, *second.shape[-2:])
    return torch.cat([first, second], dim=-2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the interleaved pairs of ``x [..., hd]`` by ``table [..., hd/2, 2]`` (broadcast).

    Computed in float32 or wider, returned in x's dtype, contiguous.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    pairs = wide.unflatten(-1, (-1, 2))
    table = table.to(wide.dtype)
    if not _complex(x):
        x0, x1 = pairs.unbind(-1)
        cos, sin = table.unbind(-1)
        turned = torch.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


def rotate_(x: Tensor, table: Tensor) -> Tensor:
    """`rotate` over x itself where its dtype allows that, else as `rotate`; the result either way.

    For tensors nothing else reads and no gradient flows to.
    """
    if x.dtype != torch.float32 or not _complex(x):
        return rotate(x, table)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.view_as_complex(table))
    return x


def _complex(x: Tensor) -> bool:
    # inductor has no kernels for complex numbers; it fuses the other form by itself
    return not torch.compiler.is_compiling() and x.device.type != "mps"
