"""Benchmark items: what an editor is asked, and where its result belongs.

One Item is one image, one instruction and (where known) the image wanted. Readers turn what the
benchmarks' authors publish, or a folder of the user's own, into items; rows that can't be used are
returned by name beside them, never dropped in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import fingerprint
from ..errors import HYWUError
from ..files import is_file, read_json, read_json_lines, same_name


@dataclass(frozen=True)
class Item:
    """One edit to make.

    source: the image given to the editor.
    shown_source: the one given to the judge, where a benchmark keeps the two apart (GEdit-Bench), else None.
    target: the image wanted, if known.
    intersection: GEdit's mark of the items that every compared system answered.
    photograph: what the source was cut or made from, where several sources share one.
    """

    key: str
    task: str
    instruction: str
    source: Path
    language: str = "en"
    target: Path | None = None
    shown_source: Path | None = None
    intersection: bool = False
    photograph: str = ""

    @property
    def id(self) -> str:
        """Unique within one benchmark: ``task/language/key``."""
        return f"{self.task}/{self.language}/{self.key}"

    @property
    def judged_source(self) -> Path:
        return self.shown_source or self.source

    @property
    def cluster(self) -> str:
        """The photograph that intervals count the item under: items of one are not independent."""
        return self.photograph or str(self.source)


@dataclass(frozen=True)
class BadItem:
    """A row that can't be evaluated: its name in the file it came from, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class ItemList:
    """Items in the order of their file, the rows that could not be used, and the benchmark's name."""

    benchmark: str
    items: tuple[Item, ...]
    bad: tuple[BadItem, ...] = ()

    def tasks(self) -> list[str]:
        """Tasks in order of first appearance."""
        return list(dict.fromkeys(item.task for item in self.items))

    def select(
        self,
        tasks: Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> ItemList:
        """The items of some tasks and languages, at most `limit` a task. Raises HYWUError if none."""
        if unknown := set(map(str, tasks or ())) - set(self.tasks()):
            raise HYWUError(
                f"There are no items of the task {', '.join(sorted(unknown))}; the tasks are "
                f"{', '.join(self.tasks())}."
            )
        taken: dict[str, int] = {}
        chosen = []
        for item in self.items:
            if (tasks and item.task not in tasks) or (languages and item.language not in languages):
                continue
            taken[item.task] = taken.get(item.task, 0) + 1
            if limit is None or taken[item.task] <= limit:
                chosen.append(item)
        if not chosen:
            raise HYWUError("The selection of tasks and languages leaves no item.")
        return replace(self, items=tuple(chosen))

    def fingerprint(self) -> str:
        """Hash of what is asked (not of the pixels), so that results of other items are recognized."""
        rows = [[i.id, i.instruction, i.intersection] for i in self.items]
        return fingerprint.of_json(rows, 16, ensure_ascii=False)


def check_image(value: object, root: Path, what: str) -> Path:
    """The path of an existing file inside `root`. Raises HYWUError saying what is wrong."""
    if not isinstance(value, str) or not value or "\0" in value or not _encodable(value):
        raise HYWUError(f"its {what} is {value!r}, not a path")
    path = Path(os.path.realpath(root / value))
    if not path.is_relative_to(os.path.realpath(root)):
        raise HYWUError(f"its {what} '{value}' lies outside {root}")
    if not is_file(path):
        raise HYWUError(f"its {what} '{value}' does not exist")
    return path


def check_instruction(value: object) -> str:
    """A non-empty instruction. Raises HYWUError saying what is wrong."""
    if not isinstance(value, str) or not value.strip() or not _encodable(value):
        raise HYWUError(f"its instruction is {value!r}")
    return value


def _encodable(text: str) -> bool:
    """Whether a file can hold the text: JSON may hold half of an emoji (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def collect(
    benchmark: str, rows: Iterable[tuple[str, Mapping[str, Any] | str]], parse: Any
) -> ItemList:
    """Parse named rows with ``parse(row) -> Item``; a row given as text is bad, and that is why.

    Raises HYWUError when nothing usable is left.
    """
    items: dict[str, Item] = {}
    alike: dict[str, str] = {}
    bad: list[BadItem] = []
    for name, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise HYWUError(row if isinstance(row, str) else "is not a JSON object")
            item = parse(row)
            if item.id in items:
                raise HYWUError(f"repeats the item {item.id}")
            if (other := alike.setdefault(same_name(item.id), item.id)) != item.id:
                raise HYWUError(
                    f"is called {item.id}, which many disks don't tell apart from {other}; give it another key"
                )
            items[item.id] = item
        except HYWUError as error:
            bad.append(BadItem(name, str(error)))
    if not items:
        reasons = "; ".join(map(str, bad[:3])) or "there are no rows"
        raise HYWUError(f"No usable item of {benchmark}: {reasons}.")
    return ItemList(benchmark, tuple(items.values()), tuple(bad))


def read_rows(path: Path) -> list[tuple[str, Mapping[str, Any] | str]]:
    """Named rows of a JSON list or a JSONL file; a line that is not JSON comes as its complaint."""
    if path.suffix.lower() != ".jsonl":
        rows = read_json(path, list, "export it again")
        return [(f"{path.name} row {n}", _object(row)) for n, row in enumerate(rows, 1)]
    rows = []
    for number, row in read_json_lines(path):
        if isinstance(row, HYWUError):
            row = "is " + str(row).removeprefix(f"{path}, line {number}: ").rstrip(".")
        else:
            row = _object(row)
        rows.append((f"{path.name} line {number}", row))
    return rows


def _object(row: Any) -> Mapping[str, Any] | str:
    """A row that is no object as its complaint: its own text is none."""
    return row if isinstance(row, Mapping) else "is not a JSON object"


def first_file(folder: Path, names: Iterable[str], what: str) -> Path:
    """The first of the names that lies in the folder. Raises HYWUError listing them."""
    if not folder.is_dir():
        raise HYWUError(f"{folder}: there is no such file or folder.")
    names = list(names)
    for name in names:
        if is_file(folder / name):
            return folder / name
    raise HYWUError(f"{folder}: holds none of {', '.join(names)}, which list the {what}.")
