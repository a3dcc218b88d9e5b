"""WU-Eval: four dimensions, each 1 to 5 by a judge, with bootstrap intervals.

The dimensions and their scale are the published ones; the published prompt is not public, so the
prompt is our own (`prompts/wu_eval_v1.txt`), versioned and named in every report. Overall is the
mean of the four dimensions of an item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import Estimate, bootstrap_mean, total

DIMENSIONS = (
    "instruction_alignment",
    "content_consistency",
    "structural_rationality",
    "image_quality",
)

QUESTIONS = ("wu-eval",)

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


def parse_answer(text: str) -> dict[str, float] | None:
    """The four scores of an answer, or None when it is anything but what the prompt asks for.

    Strict: one JSON object (a code fence around it is allowed), each dimension once, a number from
    1 to 5, and beside them nothing but an optional text ``reason``.
    """
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        answer = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or not isinstance(answer.pop("reason", ""), str):
        return None
    if set(answer) != set(DIMENSIONS) or not all(map(_is_score, answer.values())):
        return None
    return {name: float(answer[name]) for name in DIMENSIONS}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= 5


def overall(scores: Mapping[str, float]) -> float:
    """Mean of the four dimensions."""
    return total(scores[name] for name in DIMENSIONS) / len(DIMENSIONS)


def estimates(
    scores: Sequence[Mapping[str, float]], photographs: Sequence[str], resamples: int | None = None
) -> dict[str, Estimate]:
    """Each dimension and "overall": mean and 95 % interval by bootstrap over photographs.

    scores: one mapping of the four dimensions an item; photographs: the one of each item.
    """
    more = {} if resamples is None else {"resamples": resamples}
    columns = {name: [row[name] for row in scores] for name in DIMENSIONS}
    columns["overall"] = [overall(row) for row in scores]
    return {name: bootstrap_mean(v, photographs, **more) for name, v in columns.items()}
