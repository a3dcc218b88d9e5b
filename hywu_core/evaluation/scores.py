"""From raw answers to scores: every item gets exactly one outcome, and none goes uncounted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HYWUError
from . import gedit, imgedit, wu_eval
from .items import Item, ItemList
from .judging import pictures_hash
from .questionnaires import USUAL, Questionnaire, load_questionnaire
from .results import JUDGEMENTS, Results, open_results
from .store import (
    ANSWERED,
    FAILED,
    REFUSED,
    Judgement,
    JudgementStore,
    StoreName,
    choose_store,
)

SCORED, UNPARSABLE, MISSING, UNJUDGED = "scored", "unparsable", "missing", "unjudged"

#: In the order of reports. missing: no result; unjudged: not asked yet.
OUTCOMES = (SCORED, UNPARSABLE, REFUSED, FAILED, UNJUDGED, MISSING)


@dataclass(frozen=True)
class ItemScore:
    """One item's outcome. values: the questionnaire's numbers and "overall", empty unless scored;
    answers: raw text by question."""

    item: Item
    outcome: str
    values: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodScores:
    """All scores of one method by one judge and questionnaire."""

    results: Results
    items: ItemList
    name: StoreName
    scores: tuple[ItemScore, ...]
    models: Mapping[str, int]
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def method(self) -> str:
        return self.results.method

    @property
    def questionnaire(self) -> str:
        return self.name.questionnaire

    def scored(self) -> list[ItemScore]:
        """The items with a score, in the benchmark's order."""
        return [score for score in self.scores if score.outcome == SCORED]

    def outcomes(self) -> dict[str, int]:
        """How many items came to each outcome; they add up to the number of items."""
        return {name: sum(s.outcome == name for s in self.scores) for name in OUTCOMES}

    def tasks(self) -> list[str]:
        """Tasks in the benchmark's order."""
        return self.items.tasks()


def dimensions(questionnaire: str) -> tuple[str, ...]:
    """The numbers of one item's score, "overall" last."""
    return {
        "wu-eval": (*wu_eval.DIMENSIONS, "overall"),
        "gedit": ("semantics", "quality", "overall"),
        "imgedit": ("overall",),
    }[questionnaire]


def scale(questionnaire: str) -> tuple[float, float]:
    """The least and the greatest score."""
    return (0, 10) if questionnaire == "gedit" else (1, 5)


def score_results(
    results: Results,
    items: ItemList,
    questionnaire: Questionnaire,
    name: StoreName,
    model: str | None = None,
) -> MethodScores:
    """Parse the stored answers about the pictures as they are now.

    model: count only answers of this model, where an endpoint served several under one name.
    Raises HYWUError when answers of several models would be mixed, or the prompts are not those
    that the answers were given to.
    """
    if (name.questionnaire, name.questionnaire_version) != (
        questionnaire.name,
        questionnaire.version,
    ):
        raise HYWUError(
            f"{results.root}: was judged by {name.questionnaire} ({name.questionnaire_version}), not "
            f"{questionnaire.title}; give the same --prompts as when judging."
        )
    with JudgementStore(results.root / JUDGEMENTS, name) as store:
        found = [(item, _judgements(results, item, questionnaire, store)) for item in items.items]
        models: dict[str, int] = {}
        for judgement in (j for _, js in found for j in js.values() if j.status == ANSWERED):
            if model in (None, judgement.model):
                models[judgement.model] = models.get(judgement.model, 0) + 1
        if len(models) > 1:
            counts = ", ".join(f"{key or 'unnamed'} ({n})" for key, n in models.items())
            raise HYWUError(
                f"{results.root}: '{name.judge}' was answered by several models: {counts}; choose "
                "one with --answered-by, since judges are never mixed."
            )
        return MethodScores(
            results,
            items,
            name,
            tuple(_score(results, item, questionnaire, js, model) for item, js in found),
            models,
            sum(j.tokens_in for j in store),
            sum(j.tokens_out for j in store),
        )


def _judgements(
    results: Results, item: Item, questionnaire: Questionnaire, store: JudgementStore
) -> dict[str, Judgement]:
    if not results.picture(item).is_file():
        return {}
    pictures = pictures_hash(results, item)
    pairs = (
        (question.name, store.get(item.id, question.name, pictures, question.digest))
        for question in questionnaire.questions(item)
    )
    return {name: judgement for name, judgement in pairs if judgement}


def _score(
    results: Results,
    item: Item,
    questionnaire: Questionnaire,
    judgements: Mapping[str, Judgement],
    model: str | None,
) -> ItemScore:
    asked = [question.name for question in questionnaire.questions(item)]
    kept = {
        name: j
        for name, j in judgements.items()
        if j.status != ANSWERED or model in (None, j.model)
    }
    answers = {name: judgement.text for name, judgement in kept.items()}
    if not results.picture(item).is_file():
        return ItemScore(item, MISSING)
    for status in (FAILED, REFUSED):
        if any(judgement.status == status for judgement in kept.values()):
            return ItemScore(item, status, {}, answers)
    if set(kept) != set(asked):
        return ItemScore(item, UNJUDGED, {}, answers)
    values = parse(questionnaire.name, answers)
    return ItemScore(item, UNPARSABLE if values is None else SCORED, values or {}, answers)


def parse(questionnaire: str, answers: Mapping[str, str]) -> dict[str, float] | None:
    """The numbers of an item's answers, "overall" among them; None when one can't be parsed."""
    if questionnaire == "wu-eval":
        values = wu_eval.parse_answer(answers["wu-eval"])
        return None if values is None else {**values, "overall": wu_eval.overall(values)}
    if questionnaire == "imgedit":
        score = imgedit.item_score(answers["imgedit"])
        return None if score is None else {"overall": score}
    pair = [gedit.parse_scores(answers[name]) for name in gedit.QUESTIONS]
    if pair[0] is None or pair[1] is None:
        return None
    return {
        "semantics": pair[0],
        "quality": pair[1],
        "overall": math.sqrt(pair[0] * pair[1]),
    }


def gedit_rows(scores: MethodScores) -> list[gedit.Row]:
    """The scored items as rows of the authors' CSV."""
    return [
        gedit.Row(
            score.item.task,
            _posix(scores.results.judged_source(score.item)),
            _posix(scores.results.picture(score.item)),
            score.item.instruction,
            score.values["semantics"],
            score.values["quality"],
            score.item.intersection,
            score.item.language,
        )
        for score in scores.scored()
    ]


def imgedit_scores(scores: MethodScores) -> tuple[dict[str, float], dict[str, float]]:
    """The authors' two tables: key -> item score, and edit type -> mean."""
    items = {score.item.key: score.values["overall"] for score in scores.scored()}
    types = {item.key: item.task for item in scores.items.items}
    return items, imgedit.type_scores(items, types)


def same_judge(methods: Sequence[MethodScores]) -> StoreName:
    """The judge and questionnaire of all methods. Raises HYWUError when there are two."""
    names = list(dict.fromkeys(scores.name for scores in methods))
    models = {model for scores in methods for model in scores.models}
    if len(names) != 1 or len(models) > 1:
        told = "; ".join(str(name) for name in names)
        raise HYWUError(
            f"One report has one judge, here are several: {told}"
            f"{' answered by ' + ', '.join(sorted(models)) if len(models) > 1 else ''}; make a report "
            "for each, or judge all methods by the same."
        )
    benchmarks = {(s.items.benchmark, s.items.fingerprint()) for s in methods}
    if len(benchmarks) != 1:
        raise HYWUError(
            "The methods were given different items; a table compares the same items only."
        )
    return names[0]


def _posix(path: Path) -> str:
    return path.as_posix()


def open_scores(
    root: str | Path,
    benchmark: str | None = None,
    data: str | Path | None = None,
    questionnaire: str | None = None,
    prompts: str | Path | None = None,
    judged_by: str | None = None,
    answered_by: str | None = None,
) -> tuple[MethodScores, Questionnaire]:
    """One method's scores from its stored answers, and by which questions.

    benchmark, data: see `open_results`; questionnaire, judged_by: which answers, where there are several
    judges'; prompts: the questionnaire's file, where it isn't ours. Raises HYWUError.
    """
    results, items = open_results(root, benchmark, data)
    chosen = questionnaire or USUAL[results.benchmark]
    name = choose_store(results.root / JUDGEMENTS, chosen, judged_by)
    questions = load_questionnaire(name.questionnaire, prompts)
    return score_results(results, items, questions, name, answered_by), questions
