"""The bundled editor: a small U-Net in pixel space, steered by an instruction and by time.

Rectified flow (Liu et al. 2022): ``x_t = (1 - t) x0 + t noise``, velocity ``noise - x0``. The network
predicts the clean image as *source + correction*; the velocity is derived from it. Its blocks are those
of NAFNet (Chen et al. 2022, "Simple baselines for image restoration"), steered by the instruction as in
InstructIR (Conde et al. 2024), and by FiLM (Perez et al. 2018) instead of its task routing. It is
convolutional throughout and pools nowhere: what holds of a crop holds of an image of any size, and what
must be read off the whole image is left to the generator, which sees it.

Pointwise layers are Linear on channels-last tensors, so that they are LoRA targets; all of them lie in
numbered lists, where `LoRALayout.of` finds them. What turns words and time into the steering vector
does not: words are encoded before a LoRA is applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import HYWUError
from .text import TextEncoder, norm, word_ids

#: Channels of the sines and cosines of time.
TIME = 64
#: How far a new block's gate is open, so that gradients flow.
GATE = 0.3


#: What LoRAs for the editor of earlier releases adapt.
FORMER_TARGET = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])")


@dataclass(frozen=True)
class EditorConfig:
    """Hyperparameters, one entry per scale from full resolution down; each scale halves the sides.

    widths: channels.
    encode, decode: blocks on the way down and up; the coarsest scale has only the latter.
    steer: width of the vector that steers the blocks.
    text_width, text_heads, text_depth: of the text encoder.
    text_words: longest instruction, in words.
    buckets: embeddings that the words' pieces are hashed to.
    pool: the condition has at most ``pool x pool`` image tokens.
    max_pixels: larger images are edited in tiles.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    encode: tuple[int, ...] = (0, 2, 2, 0)
    decode: tuple[int, ...] = (2, 2, 3, 5)
    steer: int = 128
    text_width: int = 128
    text_heads: int = 4
    text_depth: int = 2
    text_words: int = 24
    buckets: int = 4096
    pool: int = 4
    max_pixels: int = 1 << 20

    def __post_init__(self) -> None:
        lists = {"widths": self.widths, "encode": self.encode, "decode": self.decode}
        if len({len(value) for value in lists.values()}) != 1 or len(self.widths) < 2:
            said = ", ".join(f"{name} {value}" for name, value in lists.items())
            raise HYWUError(
                f"editor config: {said}; they must be of one length, with 2 scales or more."
            )
        if self.encode[-1] or min(*self.encode, *self.decode) < 0 or min(self.widths) < 1:
            raise HYWUError(
                f"editor config: widths {self.widths} must be 1 or more, encode {self.encode} and decode "
                f"{self.decode} 0 or more, and the last of encode 0."
            )
        for name, value in asdict(self).items():
            if name not in lists and value < 1:
                raise HYWUError(f"editor config: {name} is {value}; it must be 1 or more.")
        if self.text_width % self.text_heads:
            raise HYWUError(
                f"editor config: text_width {self.text_width} must be divisible by text_heads "
                f"{self.text_heads}."
            )

    @property
    def multiple(self) -> int:
        """What the sides are padded to a multiple of."""
        return 2 ** (len(self.widths) - 1)

    @property
    def condition_parts(self) -> dict[str, int]:
        """Widths of the condition's image tokens and words."""
        return {"image": self.widths[-1], "words": self.text_width}

    #: Whether it is sampled in bfloat16 where that is fast.
    autocast = True
    #: Tiles that run at once.
    tiles_at_once = 1

    def tile(self, height: int, width: int) -> tuple[int, int]:
        """The sides of the tiles that an image is edited in: its own up to `max_pixels`."""
        if height * width <= self.max_pixels:
            return height, width
        side = math.isqrt(self.max_pixels) // self.multiple * self.multiple
        return min(side, height), min(side, width)

    def activations(self, items: int, height: int, width: int) -> int:
        """About how many values live at once while `items` images of this size are edited."""
        tall, wide = self.tile(height, width)
        # a block holds its input, twice as much before its gate and after its filter, and the gate
        at_most = max(width * 7 // 4**i for i, width in enumerate(self.widths))
        kept = sum(width // 4**i for i, width in enumerate(self.widths))
        return items * tall * wide * (at_most + kept)

    def to_json(self) -> dict[str, Any]:
        """JSON-safe; `from_json` restores an equal config."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EditorConfig:
        """Raises HYWUError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if unexpected := names.symmetric_difference(data):
            listed = ", ".join(sorted(unexpected))
            raise HYWUError(f"editor config: unknown or missing fields: {listed}.")
        return cls(
            **{n: tuple(map(int, v)) if isinstance(v, list) else int(v) for n, v in data.items()}
        )


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t in 0..1, ``[B, width]``, float32."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def space_to_depth(x: Tensor) -> Tensor:
    """``[B, 2h, 2w, C]`` -> ``[B, h, w, 4C]``."""
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # b h p w q c
    return x.transpose(2, 3).flatten(3)


def depth_to_space(x: Tensor) -> Tensor:
    """Inverse of `space_to_depth`."""
    x = x.unflatten(3, (2, 2, -1)).transpose(2, 3)  # b h p w q c
    return x.flatten(3, 4).flatten(1, 2)


def enlarge(x: Tensor) -> Tensor:
    """Twice the sides, bilinearly: ``[B, h, w, C]`` -> ``[B, 2h, 2w, C]``."""
    x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear")
    return x.permute(0, 2, 3, 1)


class Block(nn.Module):
    """``x + gate * mix(SimpleGate(filter(expand(norm(x) * (1 + scale) + shift))))``: NAFNet's, steered."""

    def __init__(self, width: int, steer: int, operations: Any) -> None:
        super().__init__()
        self.film = operations.Linear(steer, 3 * width)
        self.expand = operations.Linear(width, 2 * width)
        self.filter = operations.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.mix = operations.Linear(width, width)

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        """x ``[B, h, w, C]``, steer ``[B, S]``."""
        scale, shift, gate = self.film(steer)[:, None, None].chunk(3, dim=-1)
        y = self.expand(torch.addcmul(shift, norm(x), 1 + scale))
        y = self.filter(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        a, b = y.chunk(2, dim=-1)
        return torch.addcmul(x, self.mix(a * b), gate)


class Scale(nn.Module):
    """What happens at one resolution. enter: from the finer scale's 2 x 2 pixels, or from the image's
    own; encode and decode: blocks on the way down and up; leave: to the finer scale, or to colours.
    """

    def __init__(self, config: EditorConfig, index: int, operations: Any) -> None:
        super().__init__()
        width, finer = config.widths[index], config.widths[index - 1]
        self.sharp = finer if index == 1 else 0
        entering, leaving = (4 * finer, finer + 4 * self.sharp) if index else (6, 3)
        self.enter = operations.Linear(entering, width)
        self.encode, self.decode = (
            nn.ModuleList(Block(width, config.steer, operations) for _ in range(count))
            for count in (config.encode[index], config.decode[index])
        )
        self.leave = operations.Linear(width, leaving)

    def grow(self, x: Tensor) -> Tensor:
        """``[B, h, w, C]`` -> ``[B, 2h, 2w, finer C]``.

        Bilinear: a pixel shuffle alone leaves a ripple of two pixels at edges and echoes beside them.
        Towards full resolution both, since one scale holds detail that bilinear steps can't carry.
        """
        x = self.leave(x)
        if not self.sharp:
            return enlarge(x)
        detail, smooth = x.split([4 * self.sharp, x.shape[-1] - 4 * self.sharp], dim=-1)
        return depth_to_space(detail) + enlarge(smooth)


class Editor(nn.Module):
    """source ``[B, 3, H, W]`` in -1..1 and an instruction -> velocity of the flow to the edit.

    operations: namespace with Linear, Conv2d and Embedding (torch.nn, or a host's own).
    """

    #: Parameters that Muon leaves to AdamW: what is steered with, text, and the output's colours.
    adamw_only = ("text.*", "time?.*", "words.*", "steer.*", "*.film.*", "scales.0.leave.*")

    def __init__(self, config: EditorConfig | None = None, operations: Any = nn) -> None:
        super().__init__()
        self.config = c = config or EditorConfig()
        self.text = TextEncoder(
            c.text_width, c.text_heads, c.text_depth, c.text_words, c.buckets, operations
        )
        self.words = operations.Linear(c.text_width, c.steer)
        self.time1 = operations.Linear(TIME, c.steer)
        self.time2 = operations.Linear(c.steer, c.steer)
        self.steer = operations.Linear(c.steer, c.steer)
        self.scales = nn.ModuleList(Scale(c, i, operations) for i in range(len(c.widths)))

    @staticmethod
    def misfit(paths: Sequence[str]) -> str:
        """What is to be said where LoRA targets are no modules of this; "" for nothing in particular."""
        if not any(FORMER_TARGET.fullmatch(path) for path in paths):
            return ""
        return (
            "They are those of the bundled editor of an earlier release, whose network is another one: generate the "
            "LoRA anew with the bundled generator, or train yours anew."
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the identity: the correction is zero, and nothing is steered yet, by a vector that
        differs between instructions as much as it can.
        """
        for layer in (self.words, self.time1, self.time2, self.steer):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            layer.bias.zero_()
        self.scales[0].leave.weight.zero_()
        self.scales[0].leave.bias.zero_()
        for module in self.modules():
            if isinstance(module, Block):
                module.film.weight.zero_()
                module.film.bias.zero_()
                module.film.bias.chunk(3)[2].fill_(GATE)

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
        steer = self._steer(t, text, mask)
        y, skips = self._down(self._stacked(x, source), steer)
        y = self.scales[-1].grow(self._coarsest(y, steer))
        for scale, skip in zip(reversed(self.scales[:-1]), reversed(skips), strict=True):
            y = skip + y
            for block in scale.decode:
                y = block(y, steer)
            y = scale.grow(y) if scale is not self.scales[0] else scale.leave(y)
        correction = y.permute(0, 3, 1, 2)[..., : source.shape[2], : source.shape[3]]
        return source + correction.to(source)

    def hidden_states(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Image tokens of the coarsest scale at x_t = source, t = 0, averaged over ``pool x pool`` fields.

        ``[B, h*w, C]``; fewer where the image is smaller.
        """
        steer = self._steer(source.new_zeros(source.shape[0]), text, mask)
        y, _ = self._down(self._stacked(source, source), steer)
        y = self._coarsest(y, steer).permute(0, 3, 1, 2)
        size = tuple(min(side, self.config.pool) for side in y.shape[2:])
        return F.adaptive_avg_pool2d(y, size).flatten(2).mT

    def _stacked(self, x: Tensor, source: Tensor) -> Tensor:
        """x over source, ``[B, h, w, 6]``, padded right and below by repetition."""
        if x.shape != source.shape:
            raise HYWUError(
                f"The editor got an image of {tuple(x.shape)} and a source of {tuple(source.shape)}; "
                "they must be of one shape."
            )
        below, right = (-side % self.config.multiple for side in x.shape[2:])
        both = torch.cat([x, source], dim=1)
        if below or right:
            both = F.pad(both, (0, right, 0, below), mode="replicate")
        return both.permute(0, 2, 3, 1)

    def _steer(self, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The vector that steers all blocks ``[B, S]``, from time and the mean of the words."""
        mean = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).to(text)
        time = self.time2(F.silu(self.time1(time_embedding(t, TIME).to(text))))
        return F.silu(self.steer(F.silu(norm(time) + self.words(norm(mean)))))

    def _down(self, pixels: Tensor, steer: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What enters the coarsest scale, and what the finer ones keep for the way up."""
        y, skips = self.scales[0].enter(pixels.to(steer.dtype)), []
        for scale, coarser in zip(self.scales[:-1], self.scales[1:], strict=True):
            for block in scale.encode:
                y = block(y, steer)
            skips.append(y)
            y = coarser.enter(space_to_depth(y))
        return y, skips

    def _coarsest(self, y: Tensor, steer: Tensor) -> Tensor:
        for block in self.scales[-1].decode:
            y = block(y, steer)
        return y
