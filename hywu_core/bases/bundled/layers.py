"""Attention, MLP, positions and times of the bundled editor's transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(width, 3 * width)
        self.proj = operations.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        """x ``[B, L, C]``; rope ``[L, head_dim / 2, 2]`` or None; mask bool ``[B, 1, 1, L]`` or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = attend(q, k, v, mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(width, 4 * width)
        self.fc2 = operations.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention ``[B, heads, L, head_dim]``; True in the mask lets a key be seen."""
    if q.requires_grad and q.device.type == "cpu":
        # on so few tokens the CPU's fused backward takes three times as long as plain products
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on interleaved pairs; x ``[B, heads, L, head_dim]``."""
    cos, sin = rope.to(x).unbind(-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def rope_2d(grid: tuple[int, int], text: int, head_dim: int, device: torch.device) -> Tensor:
    """(cos, sin) ``[text + h*w, head_dim / 2, 2]``; half of the pairs turn with y, half with x.

    Text tokens are not turned. float32.
    """
    pairs = head_dim // 4
    frequency = 100.0 ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    y, x = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    angles = torch.cat([y.reshape(-1, 1) * frequency, x.reshape(-1, 1) * frequency], dim=1)
    angles = torch.cat([angles.new_zeros(text, 2 * pairs), angles])
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t in 0..1, ``[B, width]``, float32."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
