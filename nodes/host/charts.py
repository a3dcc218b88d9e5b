"""The report's bar chart as an image, for places that show no SVG; drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ...hywu_core.evaluation.report.charts import COLOURS
from ...hywu_core.evaluation.tables import Bar

_LEFT, _PLOT, _RIGHT, _ROW = 190, 440, 70, 22
_INK, _GRID = "#222222", "#dddddd"


def chart_image(bars: Sequence[Bar], scale: tuple[float, float], title: str) -> Image.Image:
    """Horizontal bars grouped by `Bar.group`, whiskers for the intervals, values in text. RGB."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    methods = list(dict.fromkeys(bar.method for bar in bars))
    by_key = {(bar.group, bar.method): bar for bar in bars}
    top = 34 + 20 * len(methods)
    bottom = top + len(groups) * (len(methods) * _ROW + 12)
    image = Image.new("RGB", (_LEFT + _PLOT + _RIGHT, bottom + 30), "white")
    draw = ImageDraw.Draw(image)
    draw.text((12, 8), title, _INK, font(15))
    for number, method in enumerate(methods):
        y = 32 + 20 * number
        draw.rectangle((_LEFT, y, _LEFT + 11, y + 11), COLOURS[number % len(COLOURS)])
        draw.text((_LEFT + 18, y + 6), method, _INK, font(13), anchor="lm")
    _axis(draw, scale, top, bottom)
    y = top
    for group in groups:
        middle = y + len(methods) * _ROW / 2
        draw.text((_LEFT - 10, middle), _short(group, 24), _INK, font(13), anchor="rm")
        for number, method in enumerate(methods):
            if bar := by_key.get((group, method)):
                _bar(draw, bar, y, COLOURS[number % len(COLOURS)], scale)
            y += _ROW
        y += 12
    return image


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; small and fixed where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):
        return ImageFont.load_default()


def _x(value: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return _LEFT + _PLOT * (min(max(value, low), high) - low) / (high - low)


def _axis(draw: ImageDraw.ImageDraw, scale: tuple[float, float], top: float, bottom: float) -> None:
    low, high = scale
    for value in range(int(low), int(high) + 1, 1 if high - low <= 5 else 2):
        x = _x(value, scale)
        draw.line((x, top, x, bottom), _GRID)
        draw.text((x, bottom + 6), str(value), _INK, font(13), anchor="ma")


def _bar(
    draw: ImageDraw.ImageDraw, bar: Bar, y: float, colour: str, scale: tuple[float, float]
) -> None:
    estimate, middle = bar.estimate, y + _ROW / 2
    if not estimate.count or math.isnan(estimate.mean):
        draw.text((_LEFT + 6, middle), "no score", "#666666", font(13), anchor="lm")
        return
    end = _x(estimate.mean, scale)
    draw.rectangle((_LEFT, y + 3, max(end, _LEFT + 1), y + _ROW - 4), colour)
    if not math.isnan(estimate.low):
        low, high = _x(estimate.low, scale), _x(estimate.high, scale)
        draw.line((low, middle, high, middle), _INK)
        for x in (low, high):
            draw.line((x, middle - 4, x, middle + 4), _INK)
        end = max(end, high)
    draw.text((end + 8, middle), f"{estimate.mean:.2f}", _INK, font(13), anchor="lm")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
