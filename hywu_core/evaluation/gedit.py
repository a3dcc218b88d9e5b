"""GEdit-Bench: its data, its result tree, its answers and its aggregation.

Follows the authors' published description and scripts (stepfun-ai/Step1X-Edit, GEdit-Bench, scored
with VIEScore's task "tie"): two questions an item, each answered by a JSON object with a list of
scores from 0 to 10; the minimum of a list counts; overall = sqrt(semantics * quality); the mean over
tasks of the means over items. One difference is deliberate: where the authors' parser gives up it
draws a random number, ours counts the answer as unparsable and leaves it out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HYWUError
from ..files import atomic_path, check_name
from .items import (
    Item,
    ItemList,
    check_image,
    check_instruction,
    collect,
    first_file,
    read_rows,
)

TASKS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)

#: The authors' columns, spelt as they spell them.
COLUMNS = (
    "source_image",
    "edited_image",
    "instruction",
    "sementics_score",
    "quality_score",
    "intersection_exist",
    "instruction_language",
)

QUESTIONS = ("semantics", "quality")

INDEX_FILES = ("gedit.jsonl", "gedit.json", "metadata.jsonl")


# -- data ----------------------------------------------------------------------------------------


def read_gedit(path: str | Path, unpack_to: Path | None = None) -> ItemList:
    """Items of a GEdit-Bench folder: parquet or arrow files as published, or an exported folder.

    The exported folder has ``gedit.jsonl`` (or gedit.json, metadata.jsonl): rows with the
    dataset's own fields ``task_type, key, instruction, instruction_language, input_image,
    input_image_raw, Intersection_exist``, where the two pictures are paths relative to the file
    (either may be left out) and ``target_image`` may name a known target.
    """
    path = Path(path)
    if path.is_dir() and not any((path / name).is_file() for name in INDEX_FILES):
        from .gedit_unpack import packed_files, unpack

        if files := packed_files(path):
            if unpack_to is None:
                raise HYWUError(
                    f"{path}: holds parquet or arrow files; unpack them first with "
                    "`hywu eval unpack`."
                )
            path = unpack(files, unpack_to)
    file = path if path.is_file() else first_file(path, INDEX_FILES, "benchmark's items")
    root = file.parent
    return collect("gedit", read_rows(file), lambda row: _parse_row(row, root))


def _parse_row(row: Mapping[str, Any], root: Path) -> Item:
    task = check_name(row.get("task_type"), "task_type")
    if task not in TASKS:
        raise HYWUError(f"its task_type is '{task}', none of the {len(TASKS)} of GEdit-Bench")
    shown, raw = (
        check_image(row[name], root, name) if row.get(name) is not None else None
        for name in ("input_image", "input_image_raw")
    )
    if (source := raw or shown) is None:
        raise HYWUError("it has neither input_image nor input_image_raw")
    target = row.get("target_image")
    return Item(
        key=check_name(row.get("key"), "key"),
        task=task,
        instruction=check_instruction(row.get("instruction")),
        source=source,
        language=check_name(row.get("instruction_language"), "instruction_language"),
        target=None if target is None else check_image(target, root, "target_image"),
        shown_source=shown or raw,
        intersection=bool(row.get("Intersection_exist", False)),
    )


def reference_size(width: int, height: int, area: int = 512 * 512) -> tuple[int, int]:
    """The authors' size of the picture given to an editor: about `area`, sides multiples of 32."""
    ratio = width / height
    wide = math.sqrt(area * ratio)
    new_width, new_height = round(wide / 32) * 32, round(wide / ratio / 32) * 32
    if new_width * new_height < area:
        new_width += 32
    elif new_width * new_height > area:
        new_width -= 32
    # Beyond the authors: a strip so thin that a side rounds to nothing keeps 32 pixels
    return max(new_width, 32), max(new_height, 32)


def result_path(root: Path, item: Item) -> Path:
    """``<method>/fullset/<task>/<language>/<key>.png``"""
    return root / "fullset" / item.task / item.language / f"{item.key}.png"


def source_path(root: Path, item: Item) -> Path:
    """``<method>/fullset/<task>/<language>/<key>_SRCIMG.png``"""
    return root / "fullset" / item.task / item.language / f"{item.key}_SRCIMG.png"


# -- answers -------------------------------------------------------------------------------------

_DELIMITER = "||V^=^V||"


def parse_scores(text: str) -> float | None:
    """The smallest score of an answer ``{"score": [..], "reasoning": ".."}``, or None.

    As in VIEScore, text or a code fence around the object, the delimiter, a single number in place
    of the list, and an answer that is nothing but a list or a number are accepted; a score outside
    0..10 is not.
    """
    if text.count(_DELIMITER) == 2:
        text = text.split(_DELIMITER)[1]
    start, end = text.find("{"), text.rfind("}") + 1
    try:
        if start >= 0 and end > start:
            # VIEScore removes line breaks first: models break strings across lines
            answer = json.loads(text[start:end].replace("\n", ""))
            scores = answer.get("score") if isinstance(answer, dict) else None
        else:
            scores = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: not JSON, or a number of thousands of digits
        return None
    scores = scores if isinstance(scores, list) else [scores]
    if not scores or not all(_is_score(value) for value in scores):
        return None
    return min(scores)


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 10


# -- aggregation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One judged item, as in the authors' CSV."""

    task: str
    source_image: str
    edited_image: str
    instruction: str
    semantics: float
    quality: float
    intersection: bool
    language: str

    @property
    def overall(self) -> float:
        return math.sqrt(self.semantics * self.quality)


@dataclass(frozen=True)
class Aggregate:
    """Means of one subset: (semantics, quality, overall) per task and over the task means."""

    tasks: Mapping[str, tuple[float, float, float]]
    counts: Mapping[str, int]
    average: tuple[float, float, float]


def aggregate(
    rows: Iterable[Row], language: str | None = None, intersection: bool = False
) -> Aggregate:
    """Mean per task, then the mean of the task means (numpy's mean, as in the authors' script).

    language: "en", "cn" or None for all; intersection: only items with ``intersection_exist``.
    A task without items is left out of the average (the authors' script would give NaN); with no
    item at all the average is NaN.
    """
    chosen = [
        row
        for row in rows
        if (language is None or row.language == language) and (row.intersection or not intersection)
    ]
    groups = {task: [row for row in chosen if row.task == task] for task in TASKS}
    groups = {task: group for task, group in groups.items() if group}
    means = {
        task: tuple(
            float(np.mean([getattr(row, name) for row in group]))
            for name in ("semantics", "quality", "overall")
        )
        for task, group in groups.items()
    }
    average = tuple(
        float(np.mean([mean[i] for mean in means.values()])) if means else math.nan
        for i in range(3)
    )
    return Aggregate(means, {task: len(group) for task, group in groups.items()}, average)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One file in the authors' columns."""
    with (
        atomic_path(path, overwrite=True) as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(
                [
                    row.source_image,
                    row.edited_image,
                    row.instruction,
                    row.semantics,
                    row.quality,
                    row.intersection,
                    row.language,
                ]
            )


def read_csv(path: Path, task: str) -> list[Row]:
    """Rows of one of the authors' per-task files, whoever wrote it. Raises HYWUError."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise HYWUError(f"{path}: lacks the columns {', '.join(sorted(missing))}.")
        try:
            return [
                Row(
                    task,
                    row["source_image"],
                    row["edited_image"],
                    row["instruction"],
                    float(row["sementics_score"]),
                    float(row["quality_score"]),
                    row["intersection_exist"].strip().lower() in ("true", "1"),
                    row["instruction_language"],
                )
                for row in reader
            ]
        except (TypeError, ValueError, AttributeError) as error:
            raise HYWUError(
                f"{path}: line {reader.line_num} has no two scores ({error})."
            ) from error


def csv_name(method: str, task: str, language: str = "all") -> str:
    """The authors' file name of one task's scores."""
    return f"{method}_{task}_{language}_vie_score.csv"
