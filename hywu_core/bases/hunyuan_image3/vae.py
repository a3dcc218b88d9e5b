"""The 3-D convolutional autoencoder, used on single images.

An image is a video of `temporal_factor` equal frames and becomes one latent frame; decoding gives as
many frames back, and the last is the image. Sampling down and up moves space into channels (DC-AE,
Chen et al. 2024) with a shortcut that averages or repeats channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig

#: log-variance of the latent's distribution is kept in this range
LOG_VARIANCE = (-30.0, 20.0)


def _norm(width: int, operations: Any) -> nn.Module:
    return operations.GroupNorm(32, width, eps=1e-6)


class ResidualBlock3D(nn.Module):
    """Two normalized convolutions beside the input; x ``[B, width, T, H, W]``."""

    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width, operations), _norm(width, operations)
        self.conv1 = operations.Conv3d(width, width, 3, padding=1)
        self.conv2 = operations.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """One head over all places."""

    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.norm = _norm(width, operations)
        self.q, self.k, self.v, self.proj_out = (
            operations.Conv3d(width, width, 1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(h.mT.reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.block_1 = ResidualBlock3D(width, operations)
        self.attn_1 = AttentionBlock(width, operations)
        self.block_2 = ResidualBlock3D(width, operations)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def space_to_channels(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """``[B, C, T·t, H·h, W·w]`` -> ``[B, t·h·w·C, T, H, W]``, the place in the cell outermost."""
    t, h, w = factor
    b, c, frames, rows, columns = x.shape
    cells = x.view(b, c, frames // t, t, rows // h, h, columns // w, w)
    return cells.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(
        b, -1, frames // t, rows // h, columns // w
    )


def channels_to_space(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """The inverse of `space_to_channels`."""
    t, h, w = factor
    b, c, frames, rows, columns = x.shape
    cells = x.view(b, t, h, w, c // (t * h * w), frames, rows, columns)
    return cells.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(b, -1, frames * t, rows * h, columns * w)


def mean_channels(x: Tensor, out: int) -> Tensor:
    """Neighbouring channels averaged down to `out`."""
    return x.unflatten(1, (out, -1)).mean(dim=2)


class Downsample(nn.Module):
    def __init__(self, width: int, out: int, factor: tuple[int, int, int], operations: Any) -> None:
        super().__init__()
        self.factor, self.out = factor, out
        self.conv = operations.Conv3d(width, out // math.prod(factor), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = mean_channels(space_to_channels(x, self.factor), self.out)
        return space_to_channels(self.conv(x), self.factor) + shortcut


class Upsample(nn.Module):
    def __init__(self, width: int, out: int, factor: tuple[int, int, int], operations: Any) -> None:
        super().__init__()
        self.factor = factor
        channels = out * math.prod(factor)
        self.repeats = channels // width
        self.conv = operations.Conv3d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x.repeat_interleave(self.repeats, dim=1)
        return channels_to_space(self.conv(x) + shortcut, self.factor)


class Level(nn.Module):
    """Blocks of one resolution, then a change of it (`downsample` or `upsample`) where there is one."""

    def __init__(
        self, width: int, blocks: int, change: tuple[str, nn.Module] | None, operations: Any
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock3D(width, operations) for _ in range(blocks))
        self.change = change[0] if change else ""
        if change:
            self.add_module(*change)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.change)(x) if self.change else x


def factors(config: VAEConfig) -> list[tuple[int, int, int]]:
    """(time, height, width) factor of each change of resolution, finest first.

    Time is halved by the last changes, of a count of log2(temporal_factor).
    """
    spatial = int(math.log2(config.spatial_factor))
    temporal = int(math.log2(config.temporal_factor))
    return [(2 if level >= spatial - temporal else 1, 2, 2) for level in range(spatial)]


class Encoder(nn.Module):
    """Pixels ``[B, 3, T, H, W]`` in -1..1 -> moments ``[B, 2·C, T/t, H/f, W/f]``."""

    def __init__(self, config: VAEConfig, operations: Any) -> None:
        super().__init__()
        widths, changes = config.channels, factors(config)
        self.conv_in = operations.Conv3d(3, widths[0], 3, padding=1)
        levels = []
        for i, width in enumerate(widths):
            change = None
            if i < len(changes):
                down = Downsample(width, widths[i + 1], changes[i], operations)
                change = ("downsample", down)
            levels.append(Level(width, config.layers_per_block, change, operations))
        self.down = nn.ModuleList(levels)
        self.mid = Middle(widths[-1], operations)
        self.norm_out = _norm(widths[-1], operations)
        self.moments = 2 * config.latent_channels
        self.conv_out = operations.Conv3d(widths[-1], self.moments, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x))) + mean_channels(x, self.moments)


class Decoder(nn.Module):
    """Latents ``[B, C, T, h, w]`` -> pixels ``[B, 3, T·t, h·f, w·f]``."""

    def __init__(self, config: VAEConfig, operations: Any) -> None:
        super().__init__()
        widths, changes = config.channels[::-1], factors(config)[::-1]
        self.repeats = widths[0] // config.latent_channels
        self.conv_in = operations.Conv3d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], operations)
        levels = []
        for i, width in enumerate(widths):
            change = None
            if i < len(changes):
                change = ("upsample", Upsample(width, widths[i + 1], changes[i], operations))
            levels.append(Level(width, config.layers_per_block + 1, change, operations))
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(widths[-1], operations)
        self.conv_out = operations.Conv3d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z) + z.repeat_interleave(self.repeats, dim=1))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Images into latents to sample in, and back."""

    def __init__(self, config: VAEConfig, operations: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations)
        self.decoder = Decoder(config, operations)

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance ``[B, 2·C, 1, h, w]`` of images ``[B, 3, H, W]`` in -1..1."""
        frames = pixels[:, :, None].expand(-1, -1, self.config.temporal_factor, -1, -1)
        return self.encoder(frames)

    def sample(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in -1..1; noise ``[B, C, (1,) h, w]``.

        A sample of the latent's distribution, scaled for the decoder-transformer.
        """
        mean, log_variance = self.moments(pixels)[:, :, 0].float().chunk(2, dim=1)
        deviation = (log_variance.clamp(*LOG_VARIANCE) / 2).exp()
        z = mean + deviation * noise.to(mean).view(mean.shape)
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """What the decoder reads, of latents as `sample` gives them."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in 0..1 of latents ``[B, C, h, w]`` as `sample` gives them."""
        weight = self.decoder.conv_in.weight
        frames = self.decoder(self.unscaled(latents)[:, :, None].to(weight.device, weight.dtype))
        return (frames[:, :, -1].float() / 2 + 0.5).clamp(0, 1)

    def frames(self, z: Tensor) -> Tensor:
        """All frames ``[B, 3, T, H, W]`` of unscaled latents ``[B, C, 1, h, w]``; for checks."""
        return self.decoder(z)


def draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal noise as the official pipeline draws it, float32: the dtype is that of drawing."""
    return torch.randn(shape, generator=generator, dtype=dtype).float()
