"""Which items a report shows: best, worst and median of the first method, all methods side by side."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...errors import HYWUError
from ...images import encode_image, load_image
from ..scores import MethodScores

#: Longest side of an embedded picture, in pixels.
SIDE = 320


@dataclass(frozen=True)
class Panel:
    """One picture with the line under it; no picture where there is none."""

    caption: str
    picture: Path | None


@dataclass(frozen=True)
class Exhibit:
    """One item: its place (best, median, worst), instruction and panels."""

    place: str
    item: str
    instruction: str
    panels: tuple[Panel, ...]


def exhibits(methods: Sequence[MethodScores], each: int = 2) -> list[Exhibit]:
    """`each` best, median and worst items by the first method's overall; ties by the items' order."""
    ranked = sorted(methods[0].scored(), key=lambda s: -s.values["overall"])
    if not ranked:
        return []
    each = min(each, max(1, len(ranked) // 3))
    middle = (len(ranked) - each) // 2
    places = [("best", ranked[:each]), ("median", ranked[middle : middle + each])]
    places.append(("worst", ranked[::-1][:each]))
    chosen, seen = [], set()
    for place, scores in places:
        for score in scores:
            if score.item.id not in seen:
                seen.add(score.item.id)
                chosen.append(_exhibit(place, score.item.id, methods))
    return chosen


def _exhibit(place: str, item_id: str, methods: Sequence[MethodScores]) -> Exhibit:
    rows = [next(s for s in scores.scores if s.item.id == item_id) for scores in methods]
    item = rows[0].item
    panels = [Panel("source", item.judged_source)]
    if item.target is not None:
        panels.append(Panel("target", item.target))
    for scores, row in zip(methods, rows, strict=True):
        told = f"{row.values['overall']:.2f}" if row.values else row.outcome
        picture = scores.results.picture(item)
        panels.append(Panel(f"{scores.method}: {told}", picture if picture.is_file() else None))
    return Exhibit(place, item_id, item.instruction, tuple(panels))


def data_uri(path: Path) -> str | None:
    """A small JPEG of the picture for embedding; None when it can't be read."""
    try:
        image = load_image(path)
    except HYWUError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = encode_image(image, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
