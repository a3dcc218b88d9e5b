"""From raw answers to scores: every item gets exactly one outcome, and none goes uncounted."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import atomic_path, folder_lock, slug, write_json
from .benchmarks import load_questionnaire
from .benchmarks.base import Questionnaire
from .items import Item, ItemList
from .results import JUDGEMENTS, Results, open_results
from .run import ImageHashes
from .store import ANSWERED, FAILED, REFUSED, Judgement, JudgementStore, StoreName, choose_store
from .tables import plain_cell

SCORED, UNPARSABLE, MISSING, UNJUDGED = "scored", "unparsable", "missing", "unjudged"

#: In the order of reports. missing: no result; unjudged: not asked yet.
OUTCOMES = (SCORED, UNPARSABLE, REFUSED, FAILED, UNJUDGED, MISSING)


@dataclass(frozen=True)
class ItemScore:
    """One item's outcome.

    values: the questionnaire's numbers and "overall", empty unless scored.
    answers: raw text by question.
    """

    item: Item
    outcome: str
    values: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodScores:
    """All scores of one method by one judge and questionnaire."""

    results: Results
    items: ItemList
    questionnaire: Questionnaire
    name: StoreName
    scores: tuple[ItemScore, ...]
    models: Mapping[str, int]
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def method(self) -> str:
        return self.results.method

    def scored(self) -> list[ItemScore]:
        """The items with a score, in the benchmark's order."""
        return [score for score in self.scores if score.outcome == SCORED]

    def answered(self) -> list[ItemScore]:
        """The items with an answer to every question, whether it could be parsed or not."""
        return [score for score in self.scores if score.outcome in (SCORED, UNPARSABLE)]

    def by_task(self) -> dict[str, list[ItemScore]]:
        """The items with a score by task, in the benchmark's order; also tasks without any."""
        found: dict[str, list[ItemScore]] = {task: [] for task in self.tasks()}
        for score in self.scored():
            found[score.item.task].append(score)
        return found

    def outcomes(self) -> dict[str, int]:
        """How many items came to each outcome; they add up to the number of items."""
        return {name: sum(s.outcome == name for s in self.scores) for name in OUTCOMES}

    def outcome_line(self) -> str:
        """For instance "98 scored, 2 unparsable of 100 items"."""
        counts = self.outcomes()
        told = [f"{counts[name]} {name}" for name in OUTCOMES if counts[name] or name == SCORED]
        return f"{', '.join(told)} of {len(self.scores)} items"

    def tasks(self) -> list[str]:
        """Tasks in the benchmark's order."""
        return self.items.tasks()


def score_results(
    results: Results,
    items: ItemList,
    questionnaire: Questionnaire,
    name: StoreName,
    model: str | None = None,
) -> MethodScores:
    """Parse the stored answers about the images as they are now.

    model: count only answers of this model, where an endpoint served several under one name.
    Raises HYWUError when answers of several models would be mixed, or the prompts are not those that the
    answers were given to.
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
        hashes = ImageHashes(results)
        found = [(item, _judgements(item, questionnaire, store, hashes)) for item in items.items]
        models: dict[str, int] = {}
        for judgement in (j for _, js in found for j in (js or {}).values()):
            if judgement.status == ANSWERED and model in (None, judgement.model):
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
            questionnaire,
            name,
            tuple(_score(item, questionnaire, js, model) for item, js in found),
            models,
            sum(j.tokens_in for j in store),
            sum(j.tokens_out for j in store),
        )


def _judgements(
    item: Item, questionnaire: Questionnaire, store: JudgementStore, hashes: ImageHashes
) -> dict[str, Judgement] | None:
    """The judgements of an item by question; None when it has no result."""
    if not hashes.results.image(item).is_file():
        return None
    images = hashes.of(item)
    pairs = (
        (question.name, store.get(item.id, question.name, images, question.digest))
        for question in questionnaire.questions(item)
    )
    return {name: judgement for name, judgement in pairs if judgement}


def _score(
    item: Item,
    questionnaire: Questionnaire,
    judgements: Mapping[str, Judgement] | None,
    model: str | None,
) -> ItemScore:
    if judgements is None:
        return ItemScore(item, MISSING)
    kept = {
        name: j
        for name, j in judgements.items()
        if j.status != ANSWERED or model in (None, j.model)
    }
    answers = {name: judgement.text for name, judgement in kept.items()}
    for status in (FAILED, REFUSED):
        if any(judgement.status == status for judgement in kept.values()):
            return ItemScore(item, status, {}, answers)
    if set(kept) != {question.name for question in questionnaire.questions(item)}:
        return ItemScore(item, UNJUDGED, {}, answers)
    values = questionnaire.parse(answers)
    return ItemScore(item, UNPARSABLE if values is None else SCORED, values or {}, answers)


def open_scores(
    root: str | Path,
    benchmark: str | None = None,
    data: str | Path | None = None,
    questionnaire: str | None = None,
    prompts: str | Path | None = None,
    judged_by: str | None = None,
    answered_by: str | None = None,
) -> MethodScores:
    """One method's scores from its stored answers.

    benchmark, data: see `open_results`.
    questionnaire, judged_by: which answers, where there are several judges'.
    prompts: the questionnaire's file, where it isn't ours.
    Raises HYWUError.
    """
    results, items = open_results(root, benchmark, data)
    chosen = questionnaire or results.benchmark.usual
    name = choose_store(results.root / JUDGEMENTS, chosen, judged_by)
    asked = load_questionnaire(name.questionnaire, prompts)
    return score_results(results, items, asked, name, answered_by)


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


# -- files ---------------------------------------------------------------------------------------


def scores_folder(scores: MethodScores) -> Path:
    """``<method>/scores/<questionnaire>__<judge>__<version>/``"""
    name = scores.name
    parts = (name.questionnaire, name.judge, name.judge_version, name.questionnaire_version)
    return scores.results.root / "scores" / "__".join(map(slug, parts))


def write_scores(scores: MethodScores, price_in: float = 0.0, price_out: float = 0.0) -> Path:
    """Write items.csv, summary.json and the benchmark authors' files; returns the folder.

    price_in, price_out: money per million tokens, for the cost in the summary.
    """
    folder = scores_folder(scores)
    with folder_lock(folder):
        _write_items(folder / "items.csv", scores)
        write_json(folder / "summary.json", summarize(scores, price_in, price_out))
        scores.questionnaire.write_files(folder, scores)
    return folder


def summarize(
    scores: MethodScores, price_in: float = 0.0, price_out: float = 0.0
) -> dict[str, Any]:
    """Everything a report prints about one method, JSON-safe."""
    name = scores.name
    cost = (scores.tokens_in * price_in + scores.tokens_out * price_out) / 1e6
    return {
        "method": scores.method,
        "benchmark": scores.items.benchmark,
        "judge": {
            "name": name.judge,
            "version": name.judge_version,
            "answered_by": dict(scores.models),
        },
        "questionnaire": {"name": name.questionnaire, "version": name.questionnaire_version},
        "items": len(scores.scores),
        "outcomes": scores.outcomes(),
        "unusable_rows": [str(bad) for bad in scores.items.bad],
        "tokens": {"in": scores.tokens_in, "out": scores.tokens_out, "cost": round(cost, 6)},
        "table": scores.questionnaire.table(scores).as_json(),
    }


def _write_items(path: Path, scores: MethodScores) -> None:
    names = scores.questionnaire.dimensions
    with (
        atomic_path(path, overwrite=True) as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["item", "task", "language", "instruction", "outcome", *names])
        for score in scores.scores:
            item = score.item
            values = [score.values.get(name, "") for name in names]
            told = item.id, item.task, item.language, item.instruction, score.outcome
            writer.writerow([*map(plain_cell, told), *values])
