"""ImgEdit-Bench, Basic: its data, result names, answers and roundings.

Follows the authors' published description and scripts (PKU-YuanGroup/ImgEdit, Benchmark/Basic): an
answer's score is the mean of the integers that stand alone after ": " on a line, rounded to two
decimals; a type's score is the mean over its items, rounded to two decimals; the published total is
the mean over types. Their scripts add with Python's `sum` and were run on Python 3.10, as the compiled
files in their repository show, so scores are added from left to right here on every Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from ..errors import HYWUError
from ..files import check_name, read_json
from .items import Item, ItemList, check_image, check_instruction, collect
from .statistics import total

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

QUESTIONS = ("imgedit",)

INDEX_FILE = "basic_edit.json"


def read_imgedit(path: str | Path) -> ItemList:
    """Items of a folder with ``basic_edit.json``; pictures beside it or in a subfolder.

    Each entry: key -> ``{id: "animal/000342021.jpg", prompt, edit_type}``; ``target`` may name a
    known target. Pictures are looked for beside the file, then in the authors' usual subfolders.
    """
    path = Path(path)
    file = path if path.is_file() else path / INDEX_FILE
    if not file.is_file():
        raise HYWUError(f"{path}: holds no {INDEX_FILE}; give the benchmark's folder.")
    if not isinstance(entries := read_json(file), Mapping):
        raise HYWUError(
            f"{file}: holds a {type(entries).__name__}; an object key -> entry is needed."
        )
    roots = [file.parent, *sorted(p for p in file.parent.iterdir() if p.is_dir())]

    def parse(row: Mapping[str, Any]) -> Item:
        edit_type = check_name(row.get("edit_type"), "edit_type")
        if edit_type not in EDIT_TYPES:
            raise HYWUError(f"its edit_type is '{edit_type}', none of {', '.join(EDIT_TYPES)}")
        target = row.get("target")
        return Item(
            key=check_name(row["key"], "key"),
            task=edit_type,
            instruction=check_instruction(row.get("prompt")),
            source=_find(row.get("id"), roots),
            target=None if target is None else check_image(target, file.parent, "target"),
        )

    named = [
        (f"{file.name} {key!r}", {"key": key, **row} if isinstance(row, Mapping) else row)
        for key, row in entries.items()
    ]
    return collect("imgedit", named, parse)


def _find(value: object, roots: list[Path]) -> Path:
    for root in roots:
        if isinstance(value, str) and value and (root / value).is_file():
            return check_image(value, root, "id")
    return check_image(value, roots[0], "id")


def result_path(root: Path, item: Item) -> Path:
    """``<method>/<key>.png``"""
    return root / f"{item.key}.png"


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
    """Mean per edit type, rounded to 2 decimals. scores: key -> score; types: key -> edit type."""
    groups: dict[str, list[float]] = {}
    for key, score in scores.items():
        if key in types:
            groups.setdefault(types[key], []).append(score)
    return {name: round(total(values) / len(values), 2) for name, values in groups.items()}


def total_score(by_type: Mapping[str, float]) -> float | None:
    """Mean over the types, rounded to 2 decimals; None without any."""
    return round(total(by_type.values()) / len(by_type), 2) if by_type else None


def write_json(path: Path, data: Mapping[str, Any], indent: int) -> None:
    """One of the authors' files: result.json (indent 4), average_score.json, typescore.json (2)."""
    files.write_json(path, data, indent, ascii=True, end="")
