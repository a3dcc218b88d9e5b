"""Scores on disk: the authors' own files for their scripts, and one summary for everyone else's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import atomic_path, slug, write_json
from . import gedit, imgedit
from .items import ItemList, read_json
from .scores import SCORED, UNPARSABLE, MethodScores, dimensions, gedit_rows, imgedit_scores
from .tables import Table, gedit_rows_table, imgedit_scores_table, summary_table


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
    rows, written = gedit_rows(scores), set()
    for language in ("all", *sorted({row.language for row in rows})):
        for task in scores.tasks():
            chosen = [r for r in rows if r.task == task and language in ("all", r.language)]
            if chosen:
                path = folder / gedit.csv_name(scores.method, task, language)
                gedit.write_csv(path, chosen)
                written.add(path)
    # A task that had scores before and has none now must not be averaged with its old ones
    for old in set(folder.glob("*_vie_score.csv")) - written:
        old.unlink()


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


# -- files that the authors' own scripts wrote -----------------------------------------------------


def their_gedit(folder: Path) -> list[Table]:
    """A table for each method whose ``<method>_<task>_<language>_vie_score.csv`` lie in the folder.

    The files of all languages count where there are some, else those of each. Empty without any.
    Raises HYWUError naming a file that can't be read.
    """
    found: dict[str, dict[str, list[gedit.Row]]] = {}
    for path in sorted(folder.glob("*_vie_score.csv")):
        name = path.name.removesuffix("_vie_score.csv")
        head, _, language = name.rpartition("_")
        # the longest: a task's name may end in another's
        tasks = sorted((t for t in gedit.TASKS if head.endswith(f"_{t}")), key=len)
        if not tasks:
            raise HYWUError(
                f"{path}: its name holds none of GEdit-Bench's {len(gedit.TASKS)} tasks."
            )
        rows = found.setdefault(head.removesuffix(f"_{tasks[-1]}"), {"all": [], "one": []})
        rows["all" if language == "all" else "one"] += gedit.read_csv(path, tasks[-1])
    return [gedit_rows_table(m, rows["all"] or rows["one"]) for m, rows in found.items()]


def their_imgedit(file: Path, items: ItemList) -> Table:
    """The table of a ``result.json``: key -> a judge's answer. Raises HYWUError naming the file."""
    answers = read_json(file)
    if not isinstance(answers, dict) or any(not isinstance(a, str) for a in answers.values()):
        raise HYWUError(f"{file}: must map an item's key to the judge's answer.")
    scores = {key: imgedit.item_score(answer) for key, answer in answers.items()}
    parsed = {key: score for key, score in scores.items() if score is not None}
    return imgedit_scores_table(file.resolve().parent.name, parsed, items)
