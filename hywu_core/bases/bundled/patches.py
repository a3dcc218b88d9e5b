"""Pictures as rows of patches, and back: cut, blended where they overlap."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pad right and below to a multiple by reflection; by repetition where that is too narrow."""
    height, width = x.shape[-2:]
    right, below = -width % multiple, -height % multiple
    if not right and not below:
        return x
    mode = "reflect" if right < width and below < height else "replicate"
    return F.pad(x, (0, right, 0, below), mode=mode)


def patchify(x: Tensor, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """``[B, C, h*p, w*p]`` -> ``[B, h*w, C*p*p]`` and (h, w)."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # b c h p w q
    grid = (x.shape[2], x.shape[4])
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), grid


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Inverse of `patchify`."""
    x = x.unflatten(2, (-1, patch, patch)).unflatten(1, grid)  # b h w c p q
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def overlap_add(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Blend squares of twice a patch's side, each around its patch, by a raised cosine.

    ``[B, h*w, C*(2p)*(2p)]`` -> ``[B, C, h*p, w*p]``. Without it neighbours meet in a visible step.
    """
    rise = torch.arange(2 * patch, device=x.device, dtype=torch.float32) + 0.5
    window = (rise * (math.pi / (2 * patch))).sin().square()
    squares = x.unflatten(2, (-1, 2, patch, 2, patch))  # b hw c (2 p) (2 q)
    squares = squares * (window[:, None] * window).view(2, patch, 2, patch).to(x)
    height, width = (side * patch for side in grid)
    canvas = x.new_zeros(x.shape[0], squares.shape[2], height + patch, width + patch)
    for row in (0, 1):
        for column in (0, 1):
            quarter = unpatchify(squares[:, :, :, row, :, column].flatten(2), grid, patch)
            top, left = row * patch, column * patch
            canvas[..., top : top + height, left : left + width] += quarter
    cut = patch // 2
    weight = [_covered(window, count)[cut : cut + count * patch].to(x) for count in grid]
    canvas = canvas[..., cut : cut + height, cut : cut + width]
    return canvas / (weight[0][:, None] * weight[1])


def _covered(window: Tensor, count: int) -> Tensor:
    """Sum of `count` windows, each half a window after the last: 1 but at both ends."""
    first, second = window.chunk(2)
    ones = (first + second).repeat(max(count - 1, 0))
    return torch.cat([first, ones, second])
