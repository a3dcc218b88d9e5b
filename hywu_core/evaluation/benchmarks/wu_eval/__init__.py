"""WU-Eval: four dimensions, each 1 to 5 by a judge, with bootstrap intervals.

The dimensions and their scale are the published ones; the published prompt is not public, so the
prompt is our own (`prompt_v1.txt`), versioned and named in every report. Overall is the mean of the
four dimensions of an item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import HYWUError
from ....files import parse_json
from ...items import Item
from ...statistics import Estimate, bootstrap_mean, total
from ...tables import Bar, Table
from ..base import THEIRS, Question, Questionnaire, columns

if TYPE_CHECKING:
    from ...scores import ItemScore, MethodScores

DIMENSIONS = (
    "instruction_alignment",
    "content_consistency",
    "structural_rationality",
    "image_quality",
)

QUESTION = "wu-eval"

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


class WUEval(Questionnaire):
    """One question an item, answered by a JSON object with the four dimensions."""

    name = "wu-eval"
    heading = "WU-Eval"
    keys = instructed = (QUESTION,)
    dimensions = (*DIMENSIONS, "overall")
    scale = (1, 5)
    published = Table(
        "Published: WU-Eval of HY-WU",
        ("dimension", "score"),
        (
            ("overall", "4.27"),
            ("content consistency", "4.13"),
            ("structural rationality", "4.30"),
            ("image quality", "3.98"),
        ),
        THEIRS + " Their prompt is not public, so scores by ours are not comparable with these.",
    )

    @classmethod
    def own_prompts(cls) -> dict[str, str]:
        file = Path(__file__).with_name("prompt_v1.txt")
        return {QUESTION: file.read_text(encoding="utf-8")}

    def questions(self, item: Item) -> list[Question]:
        prompt = self.prompt(QUESTION, item)
        return [Question(QUESTION, prompt, ("source", "edited"), answer_of)]

    def parse(self, answers: Mapping[str, str]) -> dict[str, float] | None:
        values = parse_answer(answers[QUESTION])
        return None if values is None else {**values, "overall": overall(values)}

    def overall(self, scores: MethodScores) -> Estimate:
        """The mean over all items, whatever their tasks."""
        return bootstrap_mean(*columns(scores.scored()))

    def charts(self, methods: Sequence[MethodScores]) -> list[tuple[str, tuple[Bar, ...]]]:
        return [("Dimensions", tuple(dimension_bars(methods))), *super().charts(methods)]

    def table(self, scores: MethodScores) -> Table:
        """Tasks × dimensions, each mean with its interval."""
        rows = []
        for task in (None, *scores.tasks()):
            chosen = [s for s in scores.scored() if task in (None, s.item.task)]
            found = estimates(chosen)
            cells = (str(found[name]) for name in self.dimensions)
            rows.append((task or "all tasks", str(len(chosen)), *cells))
        return Table(
            f"{self.heading}: {scores.method}",
            ("task", "items", *(name.replace("_", " ") for name in self.dimensions)),
            tuple(rows),
            "Mean and 95 % interval (bootstrap over photographs, 10,000 resamples), scale 1 to 5.",
        )


QUESTIONNAIRE = WUEval


def answer_of(shares: Mapping[str, float], reason: str) -> str:
    """A computing judge's shares 0..1 as the answer that the prompt asks for."""
    scores = {name: round(1 + 4 * value, 3) for name, value in shares.items()}
    return json.dumps({**scores, "reason": reason})


def parse_answer(text: str) -> dict[str, float] | None:
    """The four scores of an answer, or None when it is anything but what the prompt asks for.

    Strict: one JSON object (a code fence around it is allowed), each dimension once, a number from
    1 to 5, and beside them nothing but an optional text ``reason``.
    """
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        answer = parse_json(text, "the answer", dict, finite=False, unique=True)
    except HYWUError:
        return None
    if not isinstance(answer.pop("reason", ""), str):
        return None
    if set(answer) != set(DIMENSIONS) or not all(map(_is_score, answer.values())):
        return None
    return {name: float(answer[name]) for name in DIMENSIONS}


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= 5


def overall(scores: Mapping[str, float]) -> float:
    """Mean of the four dimensions."""
    return total(scores[name] for name in DIMENSIONS) / len(DIMENSIONS)


def estimates(scores: Sequence[ItemScore]) -> dict[str, Estimate]:
    """Each dimension and "overall": mean and 95 % interval by bootstrap over photographs."""
    clusters = [score.item.cluster for score in scores]
    return {
        name: bootstrap_mean([score.values[name] for score in scores], clusters)
        for name in WUEval.dimensions
    }


def dimension_bars(methods: Sequence[MethodScores]) -> list[Bar]:
    """The dimensions over all tasks, for every method."""
    return [
        Bar(name.replace("_", " "), scores.method, estimate)
        for scores in methods
        for name, estimate in estimates(scores.scored()).items()
    ]
