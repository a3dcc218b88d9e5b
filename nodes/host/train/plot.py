"""The loss of a training as an image, drawn with Pillow alone, and what a running node shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..charts import font

WIDTH, HEIGHT = 640, 360
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 34, 14, 40
_INK, _GRID, _RAW, _SMOOTH = "#222222", "#dddddd", "#b9c7d6", "#1f5fa8"


def loss_plot(rows: Sequence[Mapping[str, float]], steps: int) -> Image.Image:
    """Loss over steps, raw and smoothed; rows with "step" and "loss". The axis is logarithmic unless the loss
    is a logarithm itself (the bundled editor's) and so below 0."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, 9), "loss", _INK, font(15))
    draw.text((WIDTH - _RIGHT, HEIGHT - 8), f"step, of {steps:,}", _INK, font(12), anchor="rb")
    losses = [float(row["loss"]) for row in rows]
    if not losses:
        return image
    logarithmic = min(losses) >= 0

    def height(loss: float) -> float:
        return math.log10(max(loss, 1e-12)) if logarithmic else loss

    low, high = height(min(losses)), height(max(losses))
    low, high = low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * step / max(1, steps)
        y = _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - height(loss)) / (high - low)
        return x, y

    for i in range(5):
        value = low + (high - low) * i / 4
        value = 10**value if logarithmic else value
        y = place(0, value)[1]
        draw.line((_LEFT, y, WIDTH - _RIGHT, y), _GRID)
        draw.text((_LEFT - 8, y), f"{value:.3g}", _INK, font(12), anchor="rm")
        x = place(steps * i / 4, value)[0]
        draw.text((x, HEIGHT - _BOTTOM + 6), f"{steps * i // 4:,}", _INK, font(12), anchor="mt")
    smooth, value = [], losses[0]
    for loss in losses:
        value += 0.1 * (loss - value)
        smooth.append(value)
    for values, colour, width in ((losses, _RAW, 1), (smooth, _SMOOTH, 2)):
        points = [place(row["step"], v) for row, v in zip(rows, values, strict=True)]
        if len(points) > 1:
            draw.line(points, colour, width)
    return image


def grid(columns: Sequence[Tensor]) -> Tensor:
    """``[1, H, W, 3]`` of columns ``[B, 3, h, w]`` in 0..1: one row per item, a gap between columns."""
    rows = [
        torch.nn.functional.pad(c.detach().float().cpu(), (2, 2, 2, 2), value=1.0) for c in columns
    ]
    whole = torch.cat(list(torch.cat(rows, dim=3)), dim=1)
    return whole.clamp(0, 1).movedim(0, -1)[None]


def to_tensor(image: Image.Image) -> Tensor:
    """``[1, H, W, 3]`` in 0..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def side_by_side(plot: Image.Image, samples: Tensor | None) -> Image.Image:
    """The plot, and under it the samples as wide as it; what the node shows while it runs."""
    if samples is None:
        return plot
    pixels = samples[0].mul(255).round().byte().numpy()
    below = Image.fromarray(pixels)
    below = below.resize((plot.width, max(1, round(below.height * plot.width / below.width))))
    whole = Image.new("RGB", (plot.width, plot.height + below.height), "white")
    whole.paste(plot, (0, 0))
    whole.paste(below, (0, plot.height))
    return whole
