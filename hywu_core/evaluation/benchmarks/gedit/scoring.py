"""GEdit-Bench's questions, answers, aggregation and files.

Follows the authors' published description and scripts (stepfun-ai/Step1X-Edit, GEdit-Bench, scored
with VIEScore's task "tie"): two questions per item, each answered by a JSON object with a list of
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
from typing import TYPE_CHECKING

import numpy as np

from ....errors import HYWUError
from ....files import atomic_path, parse_json
from ...items import Item
from ...tables import Table
from ..base import THEIRS, Question, Questionnaire

if TYPE_CHECKING:
    from ...scores import MethodScores

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

SEMANTICS, QUALITY = "semantics", "quality"


class GEditQuestions(Questionnaire):
    """Two questions per item: semantics on both images, quality on the edited one."""

    name = "gedit"
    heading = "GEdit-Bench"
    keys = (SEMANTICS, QUALITY)
    instructed = (SEMANTICS,)
    dimensions = (SEMANTICS, QUALITY, "overall")
    scale = (0, 10)
    published = Table(
        "Published: GEdit-Bench of HY-WU",
        ("claim", "figure"),
        (("rank among open models", "1"),),
        THEIRS,
    )

    @classmethod
    def own_prompts(cls) -> dict[str, str]:
        folder = Path(__file__).parent
        return {key: (folder / f"{key}_v1.txt").read_text(encoding="utf-8") for key in cls.keys}

    def questions(self, item: Item) -> list[Question]:
        both, edited = ("source", "edited"), ("edited",)
        return [
            Question(SEMANTICS, self.prompt(SEMANTICS, item), both, _semantics_of),
            Question(QUALITY, self.prompt(QUALITY, item), edited, _quality_of),
        ]

    def parse(self, answers: Mapping[str, str]) -> dict[str, float] | None:
        semantics, quality = (parse_scores(answers[name]) for name in self.keys)
        if semantics is None or quality is None:
            return None
        overall = math.sqrt(semantics * quality)
        return {SEMANTICS: semantics, QUALITY: quality, "overall": overall}

    def table(self, scores: MethodScores) -> Table:
        return rows_table(scores.method, rows_of(scores))

    def write_files(self, folder: Path, scores: MethodScores) -> None:
        """``<method>_<task>_<language>_vie_score.csv``, and "all" languages together."""
        rows, written = rows_of(scores), set()
        for language in ("all", *sorted({row.language for row in rows})):
            for task in scores.tasks():
                chosen = [r for r in rows if r.task == task and language in ("all", r.language)]
                if chosen:
                    path = folder / f"{scores.method}_{task}_{language}{_ENDING}"
                    write_csv(path, chosen)
                    written.add(path)
        # A task that had scores before and has none now must not be averaged with its old ones
        for old in set(folder.glob(f"*{_ENDING}")) - written:
            old.unlink()

    @classmethod
    def their_tables(cls, path: Path, data: str | None) -> list[Table]:
        return their_tables(path) if path.is_dir() else []


# -- answers -------------------------------------------------------------------------------------

_DELIMITER = "||V^=^V||"


def _semantics_of(shares: Mapping[str, float], reason: str) -> str:
    """A computing judge's shares: instruction alignment and content consistency."""
    return _answer(list(shares.values())[:2], reason)


def _quality_of(shares: Mapping[str, float], reason: str) -> str:
    """A computing judge's shares: structural rationality and image quality."""
    return _answer(list(shares.values())[2:], reason)


def _answer(pair: Sequence[float], reason: str) -> str:
    return json.dumps({"score": [round(10 * value, 2) for value in pair], "reasoning": reason})


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
            answer = parse_json(text[start:end].replace("\n", ""), "the answer", finite=False)
            scores = answer.get("score") if isinstance(answer, dict) else None
        else:
            scores = parse_json(text, "the answer", finite=False)
    except HYWUError:
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

    language: "en", "cn" or None for all.
    intersection: only items with ``intersection_exist``.
    A task without items is left out of the average (the authors' script would give NaN); with no item at all
    the average is NaN.
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


# -- the authors' files ----------------------------------------------------------------------------


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
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            if missing := set(COLUMNS) - set(reader.fieldnames or ()):
                raise HYWUError(f"{path}: lacks the columns {', '.join(sorted(missing))}.")
            return [_row(row, task) for row in reader]
        except UnicodeDecodeError as error:
            raise HYWUError(f"{path}: not UTF-8 text ({error}).") from error
        except (TypeError, ValueError, AttributeError, csv.Error) as error:
            if isinstance(error, HYWUError):
                raise
            raise HYWUError(
                f"{path}: line {reader.line_num} has no two scores ({error})."
            ) from error


def _row(row: Mapping[str, str], task: str) -> Row:
    semantics, quality = (float(row[name]) for name in ("sementics_score", "quality_score"))
    if not (0 <= semantics < math.inf and 0 <= quality < math.inf):
        raise ValueError(f"they are {semantics:g} and {quality:g}")
    return Row(
        task,
        row["source_image"],
        row["edited_image"],
        row["instruction"],
        semantics,
        quality,
        row["intersection_exist"].strip().lower() in ("true", "1"),
        row["instruction_language"],
    )


_ENDING = "_vie_score.csv"


def rows_of(scores: MethodScores) -> list[Row]:
    """The scored items as rows of the authors' CSV."""
    results = scores.results
    return [
        Row(
            score.item.task,
            results.judged_source(score.item).as_posix(),
            results.image(score.item).as_posix(),
            score.item.instruction,
            score.values[SEMANTICS],
            score.values[QUALITY],
            score.item.intersection,
            score.item.language,
        )
        for score in scores.scored()
    ]


def their_tables(folder: Path) -> list[Table]:
    """A table for each method whose ``<method>_<task>_<language>_vie_score.csv`` lie in the folder.

    The files of all languages count where there are some, else those of each. Empty without any.
    Raises HYWUError naming a file that can't be read.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    for path in sorted(folder.glob(f"*{_ENDING}")):
        head, _, language = path.name.removesuffix(_ENDING).rpartition("_")
        # the longest: a task's name may end in another's
        tasks = sorted((t for t in TASKS if head.endswith(f"_{t}")), key=len)
        if not tasks:
            raise HYWUError(f"{path}: its name holds none of GEdit-Bench's {len(TASKS)} tasks.")
        rows = found.setdefault(head.removesuffix(f"_{tasks[-1]}"), {"all": [], "one": []})
        rows["all" if language == "all" else "one"] += read_csv(path, tasks[-1])
    return [rows_table(m, rows["all"] or rows["one"]) for m, rows in found.items()]


# -- the table -------------------------------------------------------------------------------------


def rows_table(method: str, rows: Sequence[Row]) -> Table:
    """Tasks × (semantics, quality, overall) for all items, then averages of the subsets."""
    everything = aggregate(rows)
    lines = [
        (task, str(everything.counts[task]), *map(_three, everything.tasks[task]))
        for task in everything.tasks
    ]
    for language in (None, *sorted({row.language for row in rows})):
        for intersection in (False, True):
            part = aggregate(rows, language, intersection)
            title = f"Average {language or ''}".rstrip() + (
                ", intersection" if intersection else ""
            )
            lines.append((title, str(sum(part.counts.values())), *map(_three, part.average)))
    absent = [task for task in TASKS if task not in everything.tasks]
    note = "Scale 0 to 10; averages are means of the task means."
    if absent:
        note += f" No score for {', '.join(absent)}: not comparable with published averages."
    return Table(
        f"{GEditQuestions.heading}: {method}",
        ("task", "items", "semantics", "quality", "overall"),
        tuple(lines),
        note,
    )


def _three(value: float) -> str:
    """Three decimals, as the authors print; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"
