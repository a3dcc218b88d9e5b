"""Scores on disk: the authors' own files for their scripts, and one summary for everyone else's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ..files import atomic_path
from . import gedit, imgedit
from .judges.base import slug
from .results import write_json
from .scores import SCORED, UNPARSABLE, MethodScores, dimensions, gedit_rows, imgedit_scores
from .tables import summary_table


def scores_folder(scores: MethodScores) -> Path:
    """``<method>/scores/<questionnaire>__<judge>__<version>/``"""
    name = scores.name
    parts = (name.questionnaire, name.judge, name.judge_version, name.questionnaire_version)
    return scores.results.root / "scores" / "__".join(map(slug, parts))


def write_scores(scores: MethodScores, price_in: float = 0.0, price_out: float = 0.0) -> Path:
    """Write items.csv, summary.json, and for GEdit and ImgEdit the authors' files; returns the folder.

    price_in, price_out: money per million tokens, for the cost in the summary.
    """
    folder = scores_folder(scores)
    _write_items(folder / "items.csv", scores)
    write_json(folder / "summary.json", summarize(scores, price_in, price_out))
    if scores.questionnaire == "gedit":
        _write_gedit(folder, scores)
    if scores.questionnaire == "imgedit":
        _write_imgedit(folder, scores)
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
        "table": summary_table(scores).as_json(),
    }


def _write_items(path: Path, scores: MethodScores) -> None:
    names = dimensions(scores.questionnaire)
    with (
        atomic_path(path, overwrite=True) as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["item", "task", "language", "instruction", "outcome", *names])
        for score in scores.scores:
            item = score.item
            values = [score.values.get(name, "") for name in names]
            writer.writerow(
                [item.id, item.task, item.language, item.instruction, score.outcome, *values]
            )


def _write_gedit(folder: Path, scores: MethodScores) -> None:
    rows = gedit_rows(scores)
    for language in ("all", *sorted({row.language for row in rows})):
        for task in scores.tasks():
            chosen = [r for r in rows if r.task == task and language in ("all", r.language)]
            if chosen:
                gedit.write_csv(folder / gedit.csv_name(scores.method, task, language), chosen)


def _write_imgedit(folder: Path, scores: MethodScores) -> None:
    items, types = imgedit_scores(scores)
    answers = {
        score.item.key: score.answers["imgedit"]
        for score in scores.scores
        if score.outcome in (SCORED, UNPARSABLE)
    }
    imgedit.write_json(folder / "result.json", answers, indent=4)
    imgedit.write_json(folder / "average_score.json", items, indent=2)
    imgedit.write_json(folder / "typescore.json", types, indent=2)
