"""ImgEdit-Bench, Basic: its data, result names, questions, answers, roundings and files.

Follows the authors' published description and scripts (PKU-YuanGroup/ImgEdit, Benchmark/Basic): an
answer's score is the mean of the integers that stand alone after ": " on a line, rounded to two
decimals; a type's score is the mean over its items, rounded to two decimals; the published total is
the mean over types. Their scripts add with Python's `sum` and were run on Python 3.10, as the compiled
files in their repository show, so scores are added from left to right here on every Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....atomic import real_path
from ....errors import HYWUError
from ....files import check_name, is_file, read_json, write_json
from ...items import Item, ItemList, check_image, check_instruction, collect
from ...statistics import total
from ...tables import Table
from ..base import THEIRS, Benchmark, Question, Questionnaire

if TYPE_CHECKING:
    from ...scores import MethodScores

EDIT_TYPES = (
    "replace",
    "add",
    "adjust",
    "remove",
    "style",
    "action",
    "extract",
    "background",
    "compose",
)

QUESTION = "imgedit"

INDEX_FILE = "basic_edit.json"


# -- data ----------------------------------------------------------------------------------------


class ImgEdit(Benchmark):
    """A folder with ``basic_edit.json``; results ``<method>/<key>.png``."""

    name = usual = "imgedit"
    sample = Path(__file__).with_name("sample")

    def read(self, path: Path, beside: Path | None = None) -> ItemList:
        """Items of a folder with ``basic_edit.json``; images beside it or in a subfolder.

        Each entry: key -> ``{id: "animal/000342021.jpg", prompt, edit_type}``; ``target`` may name a
        known target. Images are looked for beside the file, then in the authors' usual subfolders.
        Raises HYWUError naming the file.
        """
        file = path if path.is_file() else path / INDEX_FILE
        if not file.is_file():
            raise HYWUError(f"{path}: holds no {INDEX_FILE}; give the benchmark's folder.")
        entries = read_json(file, dict, "export it again")
        roots = [file.parent, *sorted(p for p in file.parent.iterdir() if p.is_dir())]
        named = [
            (
                f"{file.name} {key!r}",
                {"key": key, **row} if isinstance(row, Mapping) else "is not a JSON object",
            )
            for key, row in entries.items()
        ]
        return collect(self.name, named, lambda row: _parse_entry(row, file.parent, roots))


BENCHMARK = ImgEdit()


def _parse_entry(row: Mapping[str, Any], root: Path, roots: list[Path]) -> Item:
    edit_type = check_name(row.get("edit_type"), "edit_type")
    if edit_type not in EDIT_TYPES:
        raise HYWUError(f"its edit_type is '{edit_type}', none of {', '.join(EDIT_TYPES)}")
    target = row.get("target")
    return Item(
        key=check_name(row["key"], "key"),
        task=edit_type,
        instruction=check_instruction(row.get("prompt")),
        source=_find(row.get("id"), roots),
        target=None if target is None else check_image(target, root, "target"),
    )


def _find(value: object, roots: list[Path]) -> Path:
    for root in roots:
        if isinstance(value, str) and value and is_file(root / value):
            return check_image(value, root, "id")
    return check_image(value, roots[0], "id")


# -- questions -----------------------------------------------------------------------------------


class ImgEditQuestions(Questionnaire):
    """One question an item, in the words of its edit type, answered in lines ``Name: N``."""

    name = "imgedit"
    heading = "ImgEdit-Bench"
    keys = instructed = EDIT_TYPES
    dimensions = ("overall",)
    scale = (1, 5)
    published = Table(
        "Published: ImgEdit-Bench of HY-WU",
        ("claim", "figure"),
        (("total", "4.05"), ("rank", "2")),
        THEIRS,
    )

    @classmethod
    def own_prompts(cls) -> dict[str, str]:
        return read_json(Path(__file__).with_name("prompts_v1.json"))

    def questions(self, item: Item) -> list[Question]:
        return [Question(QUESTION, self.prompt(item.task, item), ("source", "edited"), answer_of)]

    def parse(self, answers: Mapping[str, str]) -> dict[str, float] | None:
        score = item_score(answers[QUESTION])
        return None if score is None else {"overall": score}

    def table(self, scores: MethodScores) -> Table:
        return scores_table(scores.method, _item_scores(scores), scores.items)

    def write_files(self, folder: Path, scores: MethodScores) -> None:
        """The authors' ``result.json`` (answers), ``average_score.json`` and ``typescore.json``."""
        items = _item_scores(scores)
        types = {item.key: item.task for item in scores.items.items}
        answers = {score.item.key: score.answers[QUESTION] for score in scores.answered()}
        write_json(folder / "result.json", answers, 4, ascii=True, end="")
        write_json(folder / "average_score.json", items, ascii=True, end="")
        write_json(folder / "typescore.json", type_scores(items, types), ascii=True, end="")

    @classmethod
    def their_tables(cls, path: Path, data: str | None) -> list[Table]:
        """The table of a ``result.json``; `data` knows the edit types."""
        if path.is_dir() or path.name != "result.json":
            return []
        if data is None:
            raise HYWUError(
                f"{path}: needs --data, the ImgEdit-Bench folder, to know the edit types."
            )
        return [their_table(path, BENCHMARK.read(BENCHMARK.locate(data)))]


QUESTIONNAIRE = ImgEditQuestions


def answer_of(shares: Mapping[str, float], reason: str) -> str:
    """A computing judge's shares 0..1 in the authors' lines.

    They hold whole numbers, and the first caps the others.
    """
    alignment, consistency, _, quality = (int(1 + 4 * share + 0.5) for share in shares.values())
    values = (alignment, min(alignment, consistency), min(alignment, quality))
    names = ("Prompt Compliance", "Content Preservation", "Rendering Quality")
    lines = [f"{name}: {value}" for name, value in zip(names, values, strict=True)]
    return "\n".join([f"Brief reasoning: {reason}", *lines])


def integers(answer: str) -> list[int]:
    """The integers that stand alone after the only ": " of a line, in order."""
    found = []
    for line in answer.splitlines():
        parts = line.strip().split(": ")
        # isdecimal where the authors use isdigit: the same numbers, and no crash on a superscript, nor
        # on a number of thousands of digits
        if len(parts) == 2 and parts[1].isdecimal() and len(parts[1]) < 10:
            found.append(int(parts[1]))
    return found


def item_score(answer: str) -> float | None:
    """Mean of an answer's integers, rounded to 2 decimals; None when it has none."""
    scores = integers(answer)
    return round(sum(scores) / len(scores), 2) if scores else None


def type_scores(scores: Mapping[str, float], types: Mapping[str, str]) -> dict[str, float]:
    """Mean per edit type, rounded to 2 decimals.

    scores: key -> score.
    types: key -> edit type.
    """
    groups: dict[str, list[float]] = {}
    for key, score in scores.items():
        if key in types:
            groups.setdefault(types[key], []).append(score)
    return {name: round(total(values) / len(values), 2) for name, values in groups.items()}


def total_score(by_type: Mapping[str, float]) -> float | None:
    """Mean over the types, rounded to 2 decimals; None without any."""
    return round(total(by_type.values()) / len(by_type), 2) if by_type else None


# -- tables and files ------------------------------------------------------------------------------


def _item_scores(scores: MethodScores) -> dict[str, float]:
    return {score.item.key: score.values["overall"] for score in scores.scored()}


def scores_table(method: str, items: Mapping[str, float], asked: ItemList) -> Table:
    """Edit types and the total, in the authors' roundings.

    items: key -> score.
    asked: the benchmark's items, which know the types.
    """
    of = {item.key: item.task for item in asked.items if item.key in items}
    types = type_scores(items, of)
    counts = Counter(of.values())
    lines = [(n, str(counts[n]), f"{types[n]:.2f}") for n in EDIT_TYPES if n in types]
    whole = total_score(types)
    lines.append(("Total", str(len(of)), "–" if whole is None else f"{whole:.2f}"))
    absent = [name for name in EDIT_TYPES if name not in types]
    note = "Scale 1 to 5; the total is the mean over types."
    if absent:
        note += f" No score for {', '.join(absent)}: not comparable with published totals."
    heading = f"{ImgEditQuestions.heading}: {method}"
    return Table(heading, ("type", "items", "score"), tuple(lines), note)


def their_table(file: Path, items: ItemList) -> Table:
    """The table of a ``result.json``: key -> a judge's answer. Raises HYWUError naming the file."""
    answers = read_json(file)
    if not isinstance(answers, dict) or any(not isinstance(a, str) for a in answers.values()):
        raise HYWUError(f"{file}: must map an item's key to the judge's answer.")
    scores = {key: item_score(answer) for key, answer in answers.items()}
    parsed = {key: score for key, score in scores.items() if score is not None}
    return scores_table(real_path(file).parent.name, parsed, items)
