"""Sampling an edit: Euler steps of the flow, over blended tiles where the image exceeds one tile."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ...precision import usual_precision


@torch.no_grad()
def edit(
    editor: nn.Module,
    source: Tensor,
    instructions: Sequence[str],
    *,
    steps: int = 4,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Edits ``[B, 3, H, W]`` in 0..1 of source ``[B, 3, H, W]`` in 0..1; the same for the same seed.

    batch: tiles that run through the editor at once, None for its usual number.
    progress: called with (steps done, steps) after each step; what it raises ends the sampling.
    Raises HYWUError on a misfit of the arguments.
    """
    if source.ndim != 4 or source.shape[1] != 3 or len(instructions) != source.shape[0]:
        raise HYWUError(
            f"The source is {tuple(source.shape)} with {len(instructions)} instructions; it must be "
            "[batch, 3, height, width] with one instruction an image."
        )
    if steps < 1:
        raise HYWUError(f"{steps} sampling steps; it must be 1 or more.")
    text, mask = editor.encode_text(instructions)
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed))
    source = source * 2 - 1
    x = noise.to(source)
    times = torch.linspace(1, 0, steps + 1).tolist()
    for step, (t, following) in enumerate(itertools.pairwise(times), 1):
        x = x + (following - t) * tiled_velocity(editor, x, t, source, text, mask, batch)
        if progress is not None:
            progress(step, steps)
    return (x.float() / 2 + 0.5).clamp(0, 1)


def tiled_velocity(
    editor: nn.Module, x: Tensor, t: float | Tensor, source: Tensor, text: Tensor, mask: Tensor,
    batch: int | None = None,
) -> Tensor:  # fmt: skip
    """Velocity of images of any size; of large ones in tiles that overlap by a quarter, blended.

    t: one time for all items, or a tensor ``[B]``.
    Tiles run item by item within each position, so that an injected batch of LoRAs needs a `batch` of at
    least the number of images; smaller ones are raised to it.
    """
    items, (height, width) = source.shape[0], source.shape[2:]
    tall, wide = editor.config.tile(height, width)
    corners = [(y, x0) for y in _starts(height, tall) for x0 in _starts(width, wide)]
    window = _window(tall, height, source)[:, None] * _window(wide, width, source)
    total, weight = torch.zeros_like(source), source.new_zeros(height, width)
    moments = torch.as_tensor(t).to(source).expand(items)
    together = max(1, (batch or editor.config.tiles_at_once) // items)
    for first in range(0, len(corners), together):
        group = corners[first : first + together]
        n = len(group)

        def cut(image: Tensor, group=group) -> Tensor:
            # item-major: all tiles of item 0, then of item 1, as an injected LoRA's index expects
            tiles = [image[:, :, y : y + tall, x0 : x0 + wide] for y, x0 in group]
            return torch.stack(tiles, dim=1).flatten(0, 1)

        times = moments.repeat_interleave(n)
        words, keep = text.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        with _fast(editor, source):
            velocity = editor(cut(x), times, cut(source), words, keep).unflatten(0, (items, n))
        for i, (y, x0) in enumerate(group):
            total[:, :, y : y + tall, x0 : x0 + wide] += velocity[:, i] * window
            weight[y : y + tall, x0 : x0 + wide] += window
    return total / weight


def _fast(editor: nn.Module, like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Products in bfloat16 where that is fast, for an editor that is made for it; weights stay as they are."""
    device = like.device.type
    wanted = editor.config.autocast and usual_precision(device) == "bf16"
    return torch.autocast(device, torch.bfloat16, enabled=wanted)


def _starts(length: int, tile: int) -> list[int]:
    """First pixels of tiles that overlap by a quarter or more and cover the whole length."""
    count = 1 + math.ceil((length - tile) / max(1, tile - tile // 4))
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def _window(tile: int, length: int, like: Tensor) -> Tensor:
    """Weights ``[tile]``: raised cosine over a quarter at each end, one between, nowhere zero.

    Flat where one tile covers the length.
    """
    if tile == length:
        return like.new_ones(tile)
    at = torch.arange(tile, dtype=torch.float32) + 0.5
    ramp = torch.minimum(at, at.flip(0)) / max(1, tile // 4)
    return (0.5 - 0.5 * torch.cos(math.pi * ramp.clamp(max=1))).clamp_min(1e-3).to(like)
