"""2-D rotary positions: text counts on both axes, image tokens stand in a square around their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """height x width image tokens, row by row, from index `start` of a sequence on."""

    start: int
    height: int
    width: int

    @property
    def stop(self) -> int:
        return self.start + self.height * self.width


def positions(length: int, grids: Sequence[Grid]) -> Tensor:
    """(y, x) of every token, int64 ``[length, 2]``.

    A grid is centred on a square of height * width tokens that starts at the grid's index; halves are
    cut off. The index goes on after it as if the tokens were text.
    """
    yx = torch.arange(length)[:, None].repeat(1, 2)
    for start, height, width in grids:
        area = height * width
        y = [math.trunc(start + (area - height) / 2 + row) for row in range(height)]
        x = [math.trunc(start + (area - width) / 2 + column) for column in range(width)]
        square = torch.cartesian_prod(torch.tensor(y), torch.tensor(x))
        yx[start : start + area] = square.view(area, 2)
    return yx


def rotation(yx: Tensor, head_dim: int, theta: float) -> Tensor:
    """cos and sin, float32 ``[2, ..., head_dim]``, of positions ``[..., 2]``.

    Frequency k turns by y where k is even and by x where it is odd.
    """
    k = torch.arange(head_dim // 2, dtype=torch.float32, device=yx.device)
    frequency = theta ** (-2 * k / head_dim)
    axis = torch.arange(head_dim // 2, device=yx.device) % 2
    angle = yx.float()[..., axis] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x ``[B, heads, L, d]`` turned by ``turn [2, B or 1, L, d]``, halves as pairs; float32."""
    cos, sin = turn[:, :, None]
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
