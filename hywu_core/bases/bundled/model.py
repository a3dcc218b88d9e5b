"""The bundled editor: a small flow-matching transformer in pixel space, one stream of text and image.

Rectified flow (Liu et al. 2022): ``x_t = (1 - t) x0 + t noise``, velocity ``noise - x0``. The network
predicts the clean image as *source + correction*; the velocity is derived from it. Modulation is
shared by all blocks with a learned offset each (PixArt's adaLN-single).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import HYWUError
from .config import EditorConfig
from .layers import MLP, Attention, norm, rope_2d, time_embedding
from .patches import overlap_add, pad_to, patchify
from .text import TextEncoder, word_ids

__all__ = ["Editor", "EditorConfig"]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.attn = Attention(width, heads, operations)
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

    def __init__(self, config: EditorConfig, operations: Any) -> None:
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


class Editor(nn.Module):
    """source ``[B, 3, H, W]`` in -1..1 and an instruction -> velocity of the flow to the edit.

    operations: namespace with Linear, Conv2d and Embedding (torch.nn, or a host's own).
    """

    def __init__(self, config: EditorConfig | None = None, operations: Any = nn) -> None:
        super().__init__()
        self.config = config = config or EditorConfig()
        width, pixels = config.width, 3 * config.patch**2
        self.image_in = operations.Linear(2 * pixels, width)
        self.text = TextEncoder(config, operations)
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
