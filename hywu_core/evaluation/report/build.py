"""What a report says, once, for both forms: title, facts, tables, charts, exhibits, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..generate import read_failures
from ..questionnaires import Questionnaire
from ..scores import OUTCOMES, SCORED, MethodScores, same_judge, scale
from ..store import StoreName
from ..tables import Bar, Table, bars, comparison_table, dimension_bars, summary_table
from .gallery import Exhibit, exhibits
from .published import BY_QUESTIONNAIRE

TITLES = {"wu-eval": "WU-Eval", "gedit": "GEdit-Bench", "imgedit": "ImgEdit-Bench"}


@dataclass(frozen=True)
class Report:
    """A report's content, in the order of reading."""

    title: str
    facts: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: tuple[tuple[str, tuple[Bar, ...]], ...]
    scale: tuple[float, float]
    exhibits: tuple[Exhibit, ...]
    unscored: tuple[str, ...]
    theirs: tuple[Table, ...]


def build_report(
    methods: Sequence[MethodScores], questionnaire: Questionnaire, each: int = 2
) -> Report:
    """Compare methods judged alike. each: exhibits per place.

    Raises HYWUError when judges, questionnaires or items differ.
    """
    name = same_judge(methods)
    charts = [("Overall by task", tuple(bars(methods)))]
    if name.questionnaire == "wu-eval":
        charts.insert(0, ("Dimensions", tuple(dimension_bars(methods))))
    return Report(
        title=f"{TITLES[name.questionnaire]}: {', '.join(scores.method for scores in methods)}",
        facts=tuple(_facts(methods, name, questionnaire)),
        tables=(comparison_table(methods), *map(summary_table, methods)),
        charts=tuple(charts),
        scale=scale(name.questionnaire),
        exhibits=tuple(exhibits(methods, each)),
        unscored=tuple(line for scores in methods for line in _unscored(scores)),
        theirs=(BY_QUESTIONNAIRE[name.questionnaire],),
    )


def _facts(
    methods: Sequence[MethodScores], name: StoreName, questionnaire: Questionnaire
) -> list[str]:
    first = methods[0]
    models = {model for scores in methods for model in scores.models if model}
    answered = f", answered by {', '.join(sorted(models))}" if models - {name.judge} else ""
    tokens = sum(s.tokens_in for s in methods), sum(s.tokens_out for s in methods)
    facts = [
        f"Judge: {name.judge}, version {name.judge_version}{answered}.",
        f"Questionnaire: {questionnaire.title}.",
        f"Items: {len(first.scores)} of the benchmark '{first.items.benchmark}' in "
        f"{len(first.tasks())} tasks; {len(first.items.bad)} rows could not be used.",
    ]
    if any(tokens):
        facts.append(f"Tokens: {tokens[0]:,} in, {tokens[1]:,} out.")
    facts += [f"{s.method}: {outcome_line(s)}." for s in methods]
    return facts


def outcome_line(scores: MethodScores) -> str:
    """For instance "98 scored, 2 unparsable of 100 items"."""
    counts = scores.outcomes()
    told = [f"{counts[name]} {name}" for name in OUTCOMES if counts[name] or name == SCORED]
    return f"{', '.join(told)} of {len(scores.scores)} items"


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
