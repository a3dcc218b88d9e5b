"""The editor of 2026's first weights: a flow-matching transformer, one stream of text and image.

It goes when the U-Net's weights come (see `model`); what is here loads the old files until then.
Rectified flow (Liu et al. 2022): ``x_t = (1 - t) x0 + t noise``, velocity ``noise - x0``. The network
predicts the clean image as *source + correction*; the velocity is derived from it. Modulation is
shared by all blocks with a learned offset each (PixArt's adaLN-single).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import HYWUError
from .model import time_embedding
from .text import MLP, TextEncoder, attend, norm, word_ids


@dataclass(frozen=True)
class TransformerConfig:
    """Hyperparameters. width must be divisible by heads, and a head by 4 (two rotary axes of pairs).

    patch: side of a patch in pixels. text_words: longest instruction, in words. buckets: embeddings
    that the words' pieces are hashed to. train_size: side of the training crops; larger images are
    edited in tiles of that size. pool: the condition has at most ``pool x pool`` image tokens.
    channels: of the pixel head.
    """

    width: int = 192
    depth: int = 8
    heads: int = 6
    text_depth: int = 2
    patch: int = 8
    text_words: int = 24
    buckets: int = 4096
    train_size: int = 64
    pool: int = 4
    channels: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise HYWUError(f"editor config: {name} is {value}; it must be 1 or more.")
        if self.width % self.heads or self.width // self.heads % 4:
            raise HYWUError(
                f"editor config: width {self.width} over {self.heads} heads must give heads whose "
                "size is divisible by 4."
            )
        if self.train_size % self.patch:
            raise HYWUError(
                f"editor config: train_size {self.train_size} must be divisible by patch {self.patch}."
            )

    @property
    def condition_parts(self) -> dict[str, int]:
        """Widths of the condition's image tokens and words."""
        return {"image": self.width, "words": self.width}

    @property
    def multiple(self) -> int:
        """Pixels along a side for each token."""
        return self.patch

    #: Whether it is sampled in bfloat16 where that is fast.
    autocast = False
    #: Tiles that run at once.
    tiles_at_once = 32

    def tile(self, height: int, width: int) -> tuple[int, int]:
        """The sides of the tiles that an image is edited in."""
        return min(self.train_size, height), min(self.train_size, width)

    def activations(self, items: int, height: int, width: int) -> int:
        """About how many values live at once while `items` images of this size are edited."""
        tokens = (self.train_size // self.patch) ** 2 + self.text_words + 1
        per_tile = tokens * self.width * 24 + self.train_size**2 * self.channels * 8
        return max(self.tiles_at_once, items) * per_tile

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TransformerConfig:
        """Raises HYWUError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if odd := names.symmetric_difference(data):
            raise HYWUError(f"editor config: unknown or missing fields: {', '.join(sorted(odd))}.")
        return cls(**{name: int(value) for name, value in data.items()})


class RotaryAttention(nn.Module):
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


class Block(nn.Module):
    def __init__(self, width: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.attn = RotaryAttention(width, heads, operations)
        self.mlp = MLP(width, operations)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, modulation: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """modulation ``[B, 6, C]``, to which the block adds its own offsets."""
        parts = (modulation + self.modulation.to(modulation)).unsqueeze(2).unbind(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attn(norm(x) * (1 + scale1) + shift1, rope, mask)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


class PixelHead(nn.Module):
    """Convolutions over the pixels, steered by their patch's token (FiLM, Perez et al. 2018).

    A patch has as many values as a token is wide, so tokens alone can't carry a filter that is finer
    than a patch; here they only say how much of each of the bank's filters there should be.
    """

    def __init__(self, config: TransformerConfig, operations: Any) -> None:
        super().__init__()
        channels = config.channels
        self.steer = operations.Linear(config.width, 6 * channels)
        self.filters = operations.Conv2d(6, channels, 5, padding=2)
        self.mix = nn.ModuleList(
            operations.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in (2, 3)
        )
        self.out = operations.Conv2d(channels, 3, 1)

    def forward(self, pixels: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """pixels ``[B, 6, h*p, w*p]``, tokens ``[B, h*w, C]`` -> ``[B, 3, h*p, w*p]``."""
        # between the patches' centres the steering is interpolated: a step would show as a grid
        film = self.steer(tokens).mT.unflatten(2, grid)
        film = F.interpolate(film, pixels.shape[2:], mode="bilinear").chunk(6, dim=1)
        y = self.filters(pixels.to(tokens.dtype))
        for i, conv in enumerate(self.mix):
            scale, shift = film[2 * i : 2 * i + 2]
            y = y + conv(F.silu(y * (1 + scale) + shift))
        scale, shift = film[4:]
        return self.out(y * (1 + scale) + shift)


class TransformerEditor(nn.Module):
    """source ``[B, 3, H, W]`` in -1..1 and an instruction -> velocity of the flow to the edit.

    operations: namespace with Linear, Conv2d and Embedding (torch.nn, or a host's own).
    """

    def __init__(self, config: TransformerConfig | None = None, operations: Any = nn) -> None:
        super().__init__()
        self.config = config = config or TransformerConfig()
        width, pixels = config.width, 3 * config.patch**2
        self.image_in = operations.Linear(2 * pixels, width)
        self.text = TextEncoder(
            width, config.heads, config.text_depth, config.text_words, config.buckets, operations
        )
        self.time1 = operations.Linear(width, width)
        self.time2 = operations.Linear(width, width)
        self.text_pool = operations.Linear(width, width)
        self.modulate = operations.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, operations) for _ in range(config.depth)
        )
        self.final_modulate = operations.Linear(width, 2 * width)
        self.image_out = operations.Linear(width, 4 * pixels)  # twice a patch's side: they overlap
        self.pixels = PixelHead(config, operations)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the identity: the correction is zero."""
        for module in (self.image_out, self.pixels.out, self.modulate, self.final_modulate):
            module.weight.zero_()
            module.bias.zero_()
        for block in self.blocks:
            block.modulation[[2, 5]] = 0.2  # gates: open a little, so that gradients flow

    def encode_text(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Instructions -> tokens ``[B, T, C]`` and mask bool ``[B, T]``, True where a token counts.

        A text of more than `text_words` words is cut there.
        """
        ids, mask = word_ids(instructions, self.config, self.text.position.device)
        return self.text(ids, mask), mask

    def embed_words(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `encode_text`, but each word by itself, before the text encoder's layers."""
        ids, mask = word_ids(instructions, self.config, self.text.position.device)
        return self.text.words(ids), mask

    def forward(self, x: Tensor, t: Tensor, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Velocity ``[B, 3, H, W]`` at x = x_t and t ``[B]`` in (0, 1]."""
        clean = self.predict(x, t, source, text, mask)
        return (x - clean) / t.to(x)[:, None, None, None].clamp_min(1e-3)

    def predict(self, x: Tensor, t: Tensor, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The clean image ``[B, 3, H, W]`` as source + correction. Any size of one pixel or more."""
        pixels = self._stacked(x, source)
        hidden, time, grid = self._run(pixels, t, text, mask)
        shift, scale = self.final_modulate(F.silu(time)).unsqueeze(1).chunk(2, dim=-1)
        tokens = norm(hidden[:, text.shape[1] :]) * (1 + scale) + shift
        correction = overlap_add(self.image_out(tokens), grid, self.config.patch)
        correction = correction + self.pixels(pixels, tokens, grid)
        return source + correction[..., : source.shape[2], : source.shape[3]]

    def hidden_states(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Image tokens of the last layer, before the final norm, at x_t = source, t = 0.

        ``[B, h*w, C]``, pooled to at most `pool` x `pool`.
        """
        t = source.new_zeros(source.shape[0])
        hidden, _, grid = self._run(self._stacked(source, source), t, text, mask)
        size = tuple(min(side, self.config.pool) for side in grid)
        image = hidden[:, text.shape[1] :].mT.unflatten(2, grid)
        return F.adaptive_avg_pool2d(image, size).flatten(2).mT

    def _stacked(self, x: Tensor, source: Tensor) -> Tensor:
        """x over source, ``[B, 6, h*p, w*p]``."""
        if x.shape != source.shape:
            raise HYWUError(
                f"The editor got an image of {tuple(x.shape)} and a source of {tuple(source.shape)}; "
                "they must be of one shape."
            )
        return pad_to(torch.cat([x, source], dim=1), self.config.patch)

    def _run(
        self, pixels: Tensor, t: Tensor, text: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(hidden states of text then image ``[B, T + h*w, C]``, time embedding, grid (h, w))."""
        patches, grid = patchify(pixels, self.config.patch)
        image = self.image_in(patches)
        count = mask.sum(1, keepdim=True).to(text)
        pooled = (text * mask[..., None]).sum(1) / count
        time = self.time2(F.silu(self.time1(time_embedding(t, self.config.width).to(text))))
        time = time + self.text_pool(pooled)
        modulation = self.modulate(F.silu(time)).unflatten(-1, (6, -1))
        rope = rope_2d(grid, text.shape[1], self.config.width // self.config.heads, image.device)
        keep = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)[:, None, None]
        hidden = torch.cat([text.to(image), image], dim=1)
        for block in self.blocks:
            hidden = block(hidden, modulation, rope, keep)
        return hidden, time, grid
