"""Bar charts with intervals as inline SVG: no script, no font file, readable in print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..tables import Bar

#: Colour-blind safe (Okabe and Ito), told apart also by order and legend.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#222222")

_LEFT, _ROW, _WIDTH, _PLOT = 190, 18, 760, 500


def bar_chart(bars: Sequence[Bar], scale: tuple[float, float], title: str) -> str:
    """Horizontal bars grouped by `Bar.group`, whiskers for the intervals, values in text."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    methods = list(dict.fromkeys(bar.method for bar in bars))
    by_key = {(bar.group, bar.method): bar for bar in bars}
    height = 46 + len(groups) * (len(methods) * _ROW + 12) + 18 * _legend_rows(methods)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        *_legend(methods),
    ]
    y = 18 * _legend_rows(methods) + 8
    top = y
    for group in groups:
        middle = y + len(methods) * _ROW / 2 + 4
        parts.append(
            f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(group)}</text>'
        )
        for number, method in enumerate(methods):
            if bar := by_key.get((group, method)):
                parts += _bar(bar, y, COLOURS[number % len(COLOURS)], scale)
            y += _ROW
        y += 12
    parts += _axis(scale, top, y)
    return "\n".join([*parts, "</svg>"])


def _x(value: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return _LEFT + _PLOT * (min(max(value, low), high) - low) / (high - low)


def _bar(bar: Bar, y: float, colour: str, scale: tuple[float, float]) -> list[str]:
    estimate = bar.estimate
    if not estimate.count or math.isnan(estimate.mean):
        return [f'<text x="{_LEFT + 4}" y="{y + 12}" fill="#666">no score</text>']
    end = _x(estimate.mean, scale)
    parts = [
        f'<rect x="{_LEFT}" y="{y + 1}" width="{max(end - _LEFT, 1):.1f}" height="13" fill="{colour}">'
        f"<title>{escape(bar.method)}, {escape(bar.group)}: {estimate}, n={estimate.count}</title></rect>"
    ]
    if not math.isnan(estimate.low):
        low, high = _x(estimate.low, scale), _x(estimate.high, scale)
        parts.append(
            f'<path d="M{low:.1f} {y + 7.5}H{high:.1f}M{low:.1f} {y + 4}v7M{high:.1f} {y + 4}v7" '
            'stroke="#111" fill="none"/>'
        )
        end = max(end, high)
    return [*parts, f'<text x="{end + 6:.1f}" y="{y + 12}">{estimate.mean:.2f}</text>']


def _axis(scale: tuple[float, float], top: float, bottom: float) -> list[str]:
    low, high = scale
    parts = []
    for value in range(int(low), int(high) + 1, 1 if high - low <= 5 else 2):
        x = _x(value, scale)
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#0002"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{value}</text>')
    return parts


def _legend_rows(methods: Sequence[str]) -> int:
    return (len(methods) + 2) // 3


def _legend(methods: Sequence[str]) -> list[str]:
    parts = []
    for number, method in enumerate(methods):
        x, y = _LEFT + (number % 3) * 185, (number // 3) * 18 + 4
        colour = COLOURS[number % len(COLOURS)]
        name = method if len(method) <= 24 else method[:23] + "…"
        parts.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 10}">{escape(name)}</text>')
    return parts
