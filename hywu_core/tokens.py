"""Rank-anchored two-dimensional tokenization: LoRA matrices <-> a grid of tokens.

A token is an area of ``rank x token_dim`` values. Each matrix is flattened row-major and takes
``ceil(numel / (rank * token_dim))`` tokens; the last one is padded with zeros on the way in and
truncated on the way out. Within a layer all A matrices come first, then all B; each by the index of
the first module name that is a substring of its own (the official rule: with modules ``to_k, to_v,
to_k_img`` the order is to_k, to_k_img, to_v), stable otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .errors import HYWUError
from .layout import Stack


@dataclass(frozen=True)
class Segment:
    """The tokens of one matrix: ``[start, start + count)`` of a layer's grid."""

    module: int
    side: str
    start: int
    count: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TokenGrid:
    """Where each matrix of a stack lies in the stack's grid ``[layers, tokens, rank, token_dim]``."""

    stack: Stack
    rank: int
    token_dim: int

    def __post_init__(self) -> None:
        if self.token_dim < 1:
            raise HYWUError(f"token_dim is {self.token_dim}; it must be 1 or more.")

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        names = [module.name for module in self.stack.modules]

        def anchor(m: int) -> int:
            return next(i for i, name in enumerate(names) if name in names[m])

        segments, start = [], 0
        for side in "AB":
            for m in sorted(range(len(names)), key=anchor):
                shape = self.stack.modules[m].shape(side, self.rank)
                count = -(-math.prod(shape) // (self.rank * self.token_dim))
                segments.append(Segment(m, side, start, count, shape))
                start += count
        return tuple(segments)

    @cached_property
    def num_a_tokens(self) -> int:
        return sum(s.count for s in self.segments if s.side == "A")

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of one layer."""
        return sum(s.count for s in self.segments)

    @property
    def num_layers(self) -> int:
        return len(self.stack.layers)

    def tokenize(self, factors: dict[tuple[int, str], Tensor]) -> Tensor:
        """Pack matrices into a grid.

        factors: (module index, "A" or "B") -> ``[..., layers, *shape]``, equal leading dimensions.
        Returns ``[..., layers, tokens, rank, token_dim]``. Raises HYWUError on a wrong shape.
        """
        pieces = []
        for segment in self.segments:
            value = factors[segment.module, segment.side]
            dims = 1 + len(segment.shape)
            if value.shape[-dims:] != (self.num_layers, *segment.shape):
                raise HYWUError(
                    f"{self.stack.modules[segment.module].name}.lora_{segment.side} is "
                    f"{tuple(value.shape[-dims:])}; the layout says "
                    f"{(self.num_layers, *segment.shape)}."
                )
            flat = value.flatten(-len(segment.shape))
            padding = segment.count * self.rank * self.token_dim - segment.numel
            flat = torch.nn.functional.pad(flat, (0, padding))
            pieces.append(flat.unflatten(-1, (segment.count, self.rank, self.token_dim)))
        return torch.cat(pieces, dim=-3)

    def detokenize(self, grid: Tensor) -> dict[tuple[int, str], Tensor]:
        """Unpack a contiguous grid ``[..., layers, tokens, rank, token_dim]`` into views of it.

        Returns (module index, "A" or "B") -> ``[..., layers, *shape]``. Raises HYWUError.
        """
        expected = (self.num_layers, self.num_tokens, self.rank, self.token_dim)
        if grid.shape[-4:] != expected:
            raise HYWUError(f"token grid is {tuple(grid.shape[-4:])}; the layout needs {expected}.")
        factors = {}
        for segment in self.segments:
            area = grid[..., segment.start : segment.start + segment.count, :, :]
            flat = area.flatten(-3)[..., : segment.numel]
            factors[segment.module, segment.side] = flat.unflatten(-1, segment.shape)
        return factors


@lru_cache(maxsize=256)
def token_grid(stack: Stack, rank: int, token_dim: int) -> TokenGrid:
    """The grid of a stack; cached, since a layout is asked for it on every request."""
    return TokenGrid(stack, rank, token_dim)
