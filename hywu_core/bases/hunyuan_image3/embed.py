"""Times and latents into hidden states, and hidden states into a prediction."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Width of the sinusoid of a time.
SINUSOID = 256


def sinusoid(t: Tensor) -> Tensor:
    """cos, then sin, of t times falling frequencies: float32 ``[n]`` -> ``[n, SINUSOID]``."""
    half = SINUSOID // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * k / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """A time (1000·sigma) ``[n]`` as a vector ``[n, width]``."""

    def __init__(self, width: int, operations: Any = nn) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(SINUSOID, width), nn.GELU(), operations.Linear(width, width)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(t).to(dtype))


class ResidualBlock(nn.Module):
    """Convolutions whose second normalization is scaled and shifted by a time embedding."""

    def __init__(self, width: int, out: int, time_width: int, operations: Any = nn) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            operations.GroupNorm(32, width, eps=1e-5),
            nn.SiLU(),
            operations.Conv2d(width, out, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(time_width, 2 * out))
        # the place of a dropout, which the stored names count
        self.out_layers = nn.Sequential(
            operations.GroupNorm(32, out, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),
            operations.Conv2d(out, out, 3, padding=1),
        )
        self.skip_connection = operations.Conv2d(width, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x ``[B, width, h, w]``, time ``[B, time_width]`` -> ``[B, out, h, w]``."""
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(self.in_layers(x)) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class PatchEmbed(nn.Module):
    """Latents ``[B, C, h, w]`` at a time -> tokens ``[B, h*w, hidden]``."""

    def __init__(self, channels: int, width: int, hidden: int, operations: Any = nn) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                operations.Conv2d(channels, width, 3, padding=1),
                ResidualBlock(width, hidden, hidden, operations),
            ]
        )

    def forward(self, latent: Tensor, time: Tensor) -> Tensor:
        convolution, block = self.model
        return block(convolution(latent), time).flatten(2).mT


class FinalLayer(nn.Module):
    """Hidden states ``[B, h*w, hidden]`` at a time -> prediction ``[B, C, h, w]``."""

    def __init__(self, hidden: int, width: int, channels: int, operations: Any = nn) -> None:
        super().__init__()
        head = nn.Sequential(
            operations.GroupNorm(32, width, eps=1e-5),
            nn.SiLU(),
            operations.Conv2d(width, channels, 3, padding=1),
        )
        self.model = nn.ModuleList([ResidualBlock(hidden, width, hidden, operations), head])

    def forward(self, hidden: Tensor, time: Tensor, size: tuple[int, int]) -> Tensor:
        block, head = self.model
        return head(block(hidden.mT.unflatten(2, size), time))


class Aligner(nn.Module):
    """The vision tower's tokens in the decoder's width."""

    def __init__(self, vision: int, hidden: int, operations: Any = nn) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            operations.Linear(vision, hidden), nn.GELU(), operations.Linear(hidden, hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, in float32, back in x's dtype, times weight."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight
