"""What a report says, once, for both forms: title, opening lines, tables, charts, exhibits, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..results import read_failures
from ..scores import SCORED, MethodScores, same_judge
from ..store import StoreName
from ..tables import Bar, Table, comparison_table


@dataclass(frozen=True)
class Panel:
    """One image with the line under it; no image where there is none."""

    caption: str
    image: Path | None


@dataclass(frozen=True)
class Exhibit:
    """One item: its place (best, median, worst), instruction and panels."""

    place: str
    item: str
    instruction: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Report:
    """A report's content, in the order of reading."""

    title: str
    opening: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: tuple[tuple[str, tuple[Bar, ...]], ...]
    scale: tuple[float, float]
    exhibits: tuple[Exhibit, ...]
    unscored: tuple[str, ...]
    theirs: tuple[Table, ...]


def build_report(methods: Sequence[MethodScores], each: int = 2) -> Report:
    """Compare methods judged alike.

    each: exhibits per place.

    Raises HYWUError when judges, questionnaires or items differ.
    """
    name = same_judge(methods)
    asked = methods[0].questionnaire
    return Report(
        title=f"{asked.heading}: {', '.join(scores.method for scores in methods)}",
        opening=tuple(_opening(methods, name)),
        tables=(comparison_table(methods), *map(asked.table, methods)),
        charts=tuple(asked.charts(methods)),
        scale=asked.scale,
        exhibits=tuple(exhibits(methods, each)),
        unscored=tuple(line for scores in methods for line in _unscored(scores)),
        theirs=(asked.published,),
    )


def _opening(methods: Sequence[MethodScores], name: StoreName) -> list[str]:
    first = methods[0]
    models = {model for scores in methods for model in scores.models if model}
    answered = f", answered by {', '.join(sorted(models))}" if models - {name.judge} else ""
    tokens = sum(s.tokens_in for s in methods), sum(s.tokens_out for s in methods)
    lines = [
        f"Judge: {name.judge}, version {name.judge_version}{answered}.",
        f"Questionnaire: {first.questionnaire.title}.",
        f"Items: {len(first.scores)} of the benchmark '{first.items.benchmark}' in "
        f"{len(first.tasks())} tasks; {len(first.items.bad)} rows could not be used.",
    ]
    if any(tokens):
        lines.append(f"Tokens: {tokens[0]:,} in, {tokens[1]:,} out.")
    lines += [f"{s.method}: {s.outcome_line()}." for s in methods]
    return lines


def _unscored(scores: MethodScores) -> list[str]:
    reasons = read_failures(scores.results.root)
    lines = [f"{scores.method}: unusable row {bad}" for bad in scores.items.bad]
    for score in scores.scores:
        if score.outcome != SCORED:
            why = "; ".join(score.answers.values()) or reasons.get(score.item.id, "")
            shown = " ".join(why.split())[:200]
            lines.append(
                f"{scores.method}: {score.item.id}: {score.outcome}{': ' + shown if shown else ''}"
            )
    return lines


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
        image = scores.results.image(item)
        panels.append(Panel(f"{scores.method}: {told}", image if image.is_file() else None))
    return Exhibit(place, item_id, item.instruction, tuple(panels))
